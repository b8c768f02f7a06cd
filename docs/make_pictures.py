"""Draws the pictures of the site, each for light and for dark pages: docs/images/NAME-{light,dark}.svg, and its icon.

    .venv/bin/python docs/make_pictures.py

The same bytes every time. What shows numbers takes them from benchmarks/results; the rest shows an idea.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from svg import DARK, LIGHT, Canvas

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
# What an image is given --------------------------------------------------------------------------------------------

SIDE, HEADS = 4, 4  # patches along a side
Block = tuple[int, Sequence[int]]  # heads, and the patches that are kept, row by row; no head: the block is skipped
_ALL = tuple(range(16))
_BOAT, _BOAT_LATE = (1, 2, 5, 6, 9, 10, 12), (5, 6, 9, 10)
_CROWD, _CROWD_LATE = tuple(i for i in _ALL if i not in (3,)), tuple(i for i in _ALL if i not in (0, 3, 8))
EASY: tuple[Block, ...] = ((4, _ALL), (2, _BOAT), (0, ()), (3, _BOAT), (0, ()), (1, _BOAT_LATE))
HARD: tuple[Block, ...] = ((4, _ALL), (4, _ALL), (4, _CROWD), (3, _CROWD), (0, ()), (4, _CROWD_LATE))


def grains(canvas: Canvas) -> None:
    """Two pictures through six blocks: what is filled is computed."""
    left, top, step, cell = 136, 44, 96, 5.0
    for index in range(6):
        canvas.text(left + index * step + 40, 22, f"block {index + 1}", "faint", 13, "middle")
    for row, (name, draw, blocks) in enumerate((("easy", _boat, EASY), ("hard", _regatta, HARD))):
        y = top + row * 140
        draw(canvas, 8, y)
        last = next(kept for heads, kept in reversed(blocks) if heads)
        for patch in set(_ALL) - set(last):
            canvas.rect(8 + patch % 4 * 24, y + patch // 4 * 24, 24, 24, "paper", opacity="0.78")
        for line in range(5):
            canvas.line((8, y + line * 24), (104, y + line * 24), stroke="paper", width=1)
            canvas.line((8 + line * 24, y), (8 + line * 24, y + 96), stroke="paper", width=1)
        canvas.line((112, y + 48), (left + 6 * step - 4, y + 48), stroke="faint", width=1.5)
        for index, (heads, kept) in enumerate(blocks):
            x = left + index * step
            canvas.rect(x - 3, y + 5, 86, 86, "paper", stroke="line" if heads else "empty", rx=5)
            if not heads:
                canvas.line((x - 3, y + 48), (x + 83, y + 48), stroke="faint")
                canvas.text(x + 40, y + 40, "skipped", "faint", 12, "middle")
                continue
            for head in range(HEADS):
                for patch in range(16):
                    filled = head < heads and patch in kept
                    canvas.rect(x + patch * cell, y + 9 + head * 20, cell - 1, 18, "kept" if filled else "empty")
        share = sum(heads * len(kept) for heads, kept in blocks) / (6 * 16 * HEADS)
        canvas.text(8, y + 115, f"{name}: {100 * share:.0f} % filled", size=13, bold=True)
    canvas.text(left, 314, "A row of a block is a head, a column one patch of the picture: what is filled is computed.",
                "faint", 13)  # fmt: skip


def _boat(canvas: Canvas, x: float, y: float) -> None:
    canvas.rect(x, y, 96, 64, "#bcd9ee")
    canvas.rect(x, y + 64, 96, 32, "#3f7fa8")
    _ship(canvas, x + 48, y + 70, 1.0, "#ffffff", "#c0392b")


def _regatta(canvas: Canvas, x: float, y: float) -> None:
    canvas.rect(x, y, 96, 50, "#8fa3ad")
    canvas.rect(x, y + 50, 96, 46, "#4d6d7a")
    canvas.polygon((x, y + 50), (x + 22, y + 26), (x + 40, y + 44), (x + 66, y + 18), (x + 96, y + 50), fill="#6f8077")
    for place, (dx, dy, size) in enumerate(
        ((20, 66, 0.55), (46, 58, 0.45), (70, 74, 0.8), (36, 88, 0.7), (86, 60, 0.4))
    ):
        colours = (("#d9d4c5", "#7a3b2e"), ("#a9b8a4", "#39414a"), ("#e8e4da", "#5a4632"))[place % 3]
        _ship(canvas, x + dx, y + dy, size, *colours)


def _ship(canvas: Canvas, x: float, y: float, size: float, sail: str, hull: str) -> None:
    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + size * dx, y + size * dy

    canvas.polygon(at(-22, 0), at(22, 0), at(14, 11), at(-16, 11), fill=hull)
    canvas.polygon(at(1, -48), at(1, -4), at(-20, -4), fill=sail)
    canvas.polygon(at(4, -38), at(4, -4), at(18, -4), fill=sail, opacity="0.85")


# Budget, cap, price --------------------------------------------------------------------------------------------------


def budget(canvas: Canvas) -> None:
    """What 10,000 test images took at a budget of one half."""
    spent = np.load(RESULTS / "cifar10-small/learned/seed0/measured.npz")["macs_fraction6"]  # its sixth: 0.5
    counts, edges = np.histogram(spent, bins=50, range=(0.0, 1.0))
    left, bottom, across, tallest, cap = 40, 240, 640, 180, 0.6

    def at(fraction: float) -> float:
        return left + across * fraction

    for count, (start, end) in zip(counts, pairwise(edges), strict=True):
        height = tallest * count / counts.max()
        colour = "other" if start >= cap - 1e-9 else "kept"
        canvas.rect(at(start) + 0.5, bottom - height, at(end) - at(start) - 1.0, height, colour)
    canvas.line((left, bottom), (at(1.0), bottom))
    for tenth in range(0, 11, 2):
        canvas.text(at(tenth / 10), bottom + 20, f"{tenth / 10:.1f}", "faint", 13, "middle")
    canvas.text(at(0.5), bottom + 42, "MACs of an image, as a fraction of the dense model's", "faint", 13, "middle")
    mean = float(spent.mean())
    canvas.line((at(mean), bottom), (at(mean), 38), stroke="ink", width=2.0)
    canvas.text(at(mean) - 8, 34, f"budget 0.5: the mean, {mean:.3f}", anchor="end", bold=True)
    canvas.line((at(cap), bottom), (at(cap), 38), stroke="other", width=2.0, stroke_dasharray="5 4")
    canvas.text(at(cap) + 8, 34, "a cap of 0.6", "other", bold=True)
    above = float((spent > cap).mean())
    for place, said in enumerate(
        (f"without it {100 * above:.0f} % of", "the images take more,", f"up to {spent.max():.2f}")
    ):
        canvas.text(at(0.72), 60 + 18 * place, said, "faint", 13)
    canvas.line((at(1.0), bottom), (at(1.0), bottom - 12), stroke="ink", width=2.0)
    canvas.text(at(1.0), bottom - 18, "dense", "ink", 13, "middle")


def price(canvas: Canvas) -> None:
    """Three images that pay one price: each is given compute until more of it gains less than that."""
    left, bottom, across, tallest, slope = 50, 256, 560, 210, 1.1

    def at(compute: float, loss: float) -> tuple[float, float]:
        return left + across * compute, bottom - tallest * loss

    canvas.line(at(0, 1.1), at(0, 0), at(1.05, 0), stroke="line")
    canvas.text(left - 30, 20, "loss", "faint", 13)
    canvas.text(left + across, bottom + 22, "compute", "faint", 13, "end")
    for name, start, rate, colour in (
        ("easy", 0.35, 9.0, "third"),
        ("ordinary", 0.7, 5.0, "kept"),
        ("hard", 1.05, 2.6, "other"),
    ):

        def loss(compute: float, start: float = start, rate: float = rate) -> float:
            return start * math.exp(-rate * compute) + 0.04

        where = math.log(start * rate / slope) / rate
        canvas.line(*(at(step / 100, loss(step / 100)) for step in range(101)), stroke=colour, width=2.5)
        ends = (where - 0.11, where + 0.11)
        canvas.line(*(at(c, loss(where) - slope * (c - where)) for c in ends), stroke="ink", width=1.5)
        x, y = at(where, loss(where))
        canvas.line((x, y), (x, bottom), stroke=colour, width=1.5, stroke_dasharray="4 4")
        canvas.dot(x, y, 5, colour)
        canvas.text(x, bottom + 20, f"{where:.2f}", colour, 13, "middle", bold=True)
        canvas.text(left + 20, at(0, loss(0))[1] - 1, name, colour, 14, bold=True)
    canvas.text(left + 240, 60, "the slopes are the same: the price", "ink", 13)


# Masked and sparse, stages, time -------------------------------------------------------------------------------------


def execution(canvas: Canvas) -> None:
    """Three images of eight tokens: masked computes all of them, sparse the eleven that are kept."""
    kept = ((0, 2, 3), (0, 1, 2, 4, 6, 7), (3, 5))
    colours = ("kept", "other", "third")
    canvas.text(8, 22, "masked: compute all, multiply by 0 or 1", bold=True, size=13)
    canvas.text(430, 22, "sparse: only what is kept", bold=True, size=13)
    for image, tokens in enumerate(kept):
        y = 44 + image * 52
        canvas.text(8, y + 23, f"image {image + 1}", "faint", 13)
        for token in range(8):
            x = 74 + token * 36
            canvas.rect(x, y, 32, 34, colours[image], rx=3, opacity="1" if token in tokens else "0.35")
            if token not in tokens:
                canvas.text(x + 16, y + 22, "× 0", "ink", 12, "middle")
    row = 0
    for image, tokens in enumerate(kept):
        for _ in tokens:
            canvas.rect(430 + row * 23, 96, 20, 34, colours[image], rx=3)
            row += 1
    canvas.text(430, 152, "one matrix, no padding;", "faint", 13)
    canvas.text(430, 170, "attention knows where images begin", "faint", 13)
    canvas.text(74, 216, "24 rows: differentiable, for training", "faint", 13)
    canvas.text(430, 216, "11 rows: for use", "faint", 13)


STAGES = (
    ("backbone", "the ViT itself,", "as always"),
    ("elastic", "weights get used", "to skipping"),
    ("supervised", "controllers learn,", "through soft gates"),
    ("reinforce", "decide for real,", "and pay for it"),
    ("calibration", "which price brings", "which budget"),
)


def training(canvas: Canvas) -> None:
    for place, (name, *about) in enumerate(STAGES):
        x, wide = 4 + place * 144, 128
        first, last = place == 0, place == len(STAGES) - 1
        canvas.rect(x, 20, wide, 86, "empty", rx=6)
        canvas.rect(x, 20, wide, 5, "faint" if first else "third" if last else "kept", rx=2)
        canvas.text(x + 10, 48, name, bold=True, size=15)
        for row, said in enumerate(about):
            canvas.text(x + 10, 70 + 18 * row, said, "faint", 12)
        if not last:
            canvas.arrow(x + wide + 1, 63, x + 143)
    canvas.text(4, 136, "given, or trained", "faint", 13)
    canvas.text(148, 136, "one objective: the task, and what images cost on average", "kept", 13)
    canvas.text(580, 136, "nothing learns", "third", 13)


def time(canvas: Canvas) -> None:
    """MACs and time of three ViTs at a budget of one half, as `miaformer bench` measured them."""
    left, across = 190, 430
    y = 40
    for name, file in (("DeiT-Ti", "speed-deit-tiny"), ("DeiT-S", "speed-deit-small"), ("DeiT-B", "speed-deit-base")):
        rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
        for batch in (1, 8):
            row = next(
                r for r in rows if (r["engine"], r["batch"], r["grains"], r["budget"]) == ("eager", batch, "all", 0.5)
            )
            canvas.text(left - 12, y + 17, f"{name}, batch {batch}", "ink", 13, "end")
            for offset, key, colour in ((0, "macs_fraction", "line"), (13, "time_fraction", "kept")):
                canvas.rect(left, y + offset, across * row[key], 11, colour, rx=2)
                canvas.text(left + across * row[key] + 6, y + offset + 10, f"{row[key]:.2f}", "faint", 12)
            y += 36
    canvas.line((left + across, 32), (left + across, y), stroke="faint", stroke_dasharray="4 4")
    canvas.text(left + across, 24, "dense: 1", "faint", 12, "middle")
    canvas.rect(left, 12, 12, 12, "line", rx=2)
    canvas.text(left + 18, 23, "MACs", "faint", 13)
    canvas.rect(left + 76, 12, 12, 12, "kept", rx=2)
    canvas.text(left + 94, 23, "time", "faint", 13)


PICTURES: dict[str, tuple[Callable[[Canvas], None], int, str]] = {
    "grains": (
        grains,
        330,
        "An easy and a hard picture through six blocks: blocks, heads and tokens that are computed",
    ),
    "budget": (budget, 300, "Histogram of what images take at a budget of 0.5, with a cap of 0.6"),
    "price": (
        price,
        290,
        "Loss over compute of three images; each stops where one more unit gains less than the price",
    ),
    "execution": (execution, 232, "Masked execution computes everything; sparse execution packs what is kept"),
    "training": (training, 152, "Stages of training: backbone, elastic, supervised, reinforce, calibration"),
    "time": (time, 262, "MACs and time of three models as fractions of the dense model's"),
}
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="6" fill="#1f6fb2"/>
<path fill="#fff" d="M6 7h5v5H6zM13.500 7h5v5h-5zM21 7h5v5h-5zM6 14h5v5H6zM6 21h5v5H6zM13.500 21h5v5h-5z"/>
<path fill="#fff" opacity=".35" d="M13.500 14h5v5h-5zM21 14h5v5h-5zM21 21h5v5h-5z"/>
</svg>
"""


def pictures() -> dict[str, str]:
    """Names of files, and what is in them."""
    made = {"favicon.svg": ICON}
    for name, (draw, height, title) in PICTURES.items():
        for shade, palette in (("light", LIGHT), ("dark", DARK)):
            canvas = Canvas(palette, height, title)
            draw(canvas)
            made[f"{name}-{shade}.svg"] = canvas.svg()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write to (default: docs/images)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in pictures().items():
        (out / name).write_text(content, encoding="utf-8")
    print(f"{len(pictures())} pictures in {out}")


if __name__ == "__main__":
    main()
