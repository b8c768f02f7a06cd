"""Pictures of a report, and of what a model does to its images. Drawn for a light page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from miaformer.evaluation.calibration import LabelledBatch
from miaformer.model import MIAFormer

Array = NDArray[Any]

_INK, _FAINT, _PAPER = "#22262b", "#8a9099", "#ffffff"
_KEPT, _SKIPPED = "#1f6fb2", "#eceef1"
_RIGHT, _WRONG = "#2e7d4f", "#c0392b"
_LOOKS = {  # colour, marker, what it is
    "learned": ("#1f6fb2", "o", "per image"),
    "static": ("#d98a1f", "s", "same for all"),
    "random": ("#8a9099", "^", "by chance, as often"),
    "cls-attention": ("#7a5aa6", "D", "most attended tokens"),
}


def plot_tradeoff(report: Mapping[str, Any], path: str | Path) -> None:
    """Accuracy over MACs of a report of `evaluate`: one line a policy, and the dense model.

    Raises ValueError where the report has no points.
    """
    points = report["points"]
    if not points:
        raise ValueError("the report has no points to plot")
    figure, axes = _figure(7.2, 4.6)
    dense = 100 * report["dense"]["accuracy"]
    axes.axhline(dense, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    starts = []
    for name, (colour, marker, _) in _LOOKS.items():
        own = sorted((p["macs_fraction"], 100 * p["accuracy"]) for p in points if p["policy"] == name)
        if own:
            xs, ys = zip(*own, strict=True)
            axes.plot(xs, ys, color=colour, marker=marker, linewidth=1.8, markersize=6, zorder=3)
            starts.append((xs[0], ys[0], name, colour))
    for point in points:
        if point["policy"] == "full":
            at = point["macs_fraction"], 100 * point["accuracy"]
            axes.plot(*at, marker="D", color=_INK, markersize=6, zorder=4)
            _beside(axes, at, "everything\nexecuted", (0, -9), "center", "top", _INK)
    axes.plot(1.0, dense, marker="*", color=_INK, markersize=14, zorder=4)
    reference = f"dense: {dense:.1f} % at {_macs(report['dense']['macs'])}"
    _beside(axes, (1.0, dense), reference, (8, 12), "right", "bottom", _INK)
    least, most = min(p["macs_fraction"] for p in points), max(p["macs_fraction"] for p in points)
    axes.set_xlim(least - 0.26 * (1.0 - least), max(1.03, most))
    accuracies = [dense, *(100 * p["accuracy"] for p in points)]
    low, high = min(accuracies), max(accuracies)
    margin = max(high - low, 2.0) * 0.1
    axes.set_ylim(low - margin, high + 1.8 * margin)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - margin <= tick <= 100])
    _label_starts(axes, starts)
    axes.set_xlabel("mean MACs per image, as a fraction of the dense model's")
    axes.set_ylabel("accuracy, %")
    images = f", {report['num_images']:,} images" if "num_images" in report else ""
    where = f" on {report['data']}" if "data" in report else ""
    axes.set_title(f"Accuracy per compute{where}{images}", loc="left", color=_INK, pad=22)
    named = "  ·  ".join(f"{name}: {_LOOKS[name][2]}" for _, _, name, _ in starts)
    axes.text(0, 1.03, named, transform=axes.transAxes, fontsize=7.5, color=_FAINT)
    axes.grid(color=_SKIPPED, linewidth=0.8)
    _save(figure, path)


def _label_starts(axes: Any, starts: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the left of the lines' first points, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    apart = (high - low) * 0.055
    ordered = sorted(starts, key=lambda start: start[1])
    heights = np.array([y for _, y, _, _ in ordered])
    for _ in range(100):  # each overlapping pair gives way by halves
        for lower, upper in pairwise(range(len(heights))):
            overlap = apart - (heights[upper] - heights[lower])
            if overlap > 0:
                heights[[lower, upper]] += [-overlap / 2, overlap / 2]
    left = min((x for x, *_ in ordered), default=0.0)
    for (_, _, name, colour), height in zip(ordered, heights, strict=True):
        _beside(axes, (left, height), name, (-9, 0), "right", "center", colour)


def _beside(
    axes: Any,
    at: tuple[float, float],
    text: str,
    offset: tuple[int, int],
    horizontal: str,
    vertical: str,
    colour: str,
) -> None:
    """Text at `offset` points from a point."""
    axes.annotate(text, at, offset, textcoords="offset points", ha=horizontal, va=vertical, color=colour, fontsize=9)


@dataclass(frozen=True)
class _Shown:
    """One image and what was done with it."""

    image: Tensor  # (3, H, W), normalised
    macs_fraction: float
    depth: Tensor  # (L,)
    heads: Tensor  # (L, H)
    tokens: Tensor  # (L, N)
    predicted: int
    label: int  # negative: unknown


def plot_adaptivity(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    path: str | Path,
    budget: float | None = None,
    cap: float | None = None,
    data_config: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    count: int = 5,
) -> None:
    """The images that get the least and the most compute at a budget, and what is executed for each of them.

    Beside each image a copy whose tokens fade the earlier they are skipped, and its blocks and heads.
    batches: passed over once. data_config: timm's, for the `mean` and `std` that images were normalised with.
    classes: names of the labels, of which negative ones are unknown.

    Raises ValueError where there are fewer than two images.
    """
    least, most = _extremes(model, batches, budget, cap, count)
    rows = min(count, len(least))
    figure, _ = _figure(10.6, 0.95 + 1.28 * rows, axes=False)
    grid = figure.add_gridspec(
        rows,
        9,
        width_ratios=[1, 1, 0.82, 1.15, 0.22, 1, 1, 0.82, 1.15],
        left=0.012,
        right=0.995,
        bottom=0.015,
        top=1 - 0.78 / (0.95 + 1.28 * rows),
        hspace=0.13,
        wspace=0.1,
    )
    spent = "everything executed" if budget is None else f"budget {budget:g} of the dense MACs on average"
    figure.suptitle(f"What each image gets: {spent}", x=0.012, y=0.985, ha="left", va="top", color=_INK)
    for side, (title, shown) in enumerate((("least compute", least), ("most compute", most))):
        for row, one in enumerate(shown[:rows]):
            cells = [figure.add_subplot(grid[row, side * 5 + column]) for column in range(4)]
            _draw_row(cells, one, model, data_config or {}, classes)
            if row == 0:
                for cell, text in zip(cells, (title, "tokens kept", "blocks × heads", ""), strict=True):
                    weight = "bold" if text == title else "normal"
                    cell.set_title(text, fontsize=9, loc="left", color=_INK, weight=weight)
    _save(figure, path)


@torch.inference_mode()
def _extremes(
    model: MIAFormer, batches: Iterable[LabelledBatch], budget: float | None, cap: float | None, count: int
) -> tuple[list[_Shown], list[_Shown]]:
    """The `count` images with the fewest MACs, and those with the most, each in order."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    least: list[_Shown] = []
    most: list[_Shown] = []
    for batch in batches:
        output = model.run(batch.images.to(parameter), budget=budget, cap=cap)
        trace, predicted = output.trace, output.logits.argmax(dim=1)
        order = trace.macs.argsort(stable=True).tolist()
        found = {
            i: _Shown(
                batch.images[i].float().cpu(),
                trace.macs_fraction[i].item(),
                trace.depth[i].cpu(),
                trace.heads[i].cpu(),
                trace.tokens[i].cpu(),
                int(predicted[i]),
                int(batch.labels[i]),
            )
            for i in {*order[:count], *order[-count:]}
        }
        least = sorted(least + [found[i] for i in order[:count]], key=_spent)[:count]
        most = sorted(most + [found[i] for i in order[-count:]], key=_spent, reverse=True)[:count]
    model.train(training)
    if len(least) < 2:
        raise ValueError("plot_adaptivity() needs at least two images")
    return least, most


def _spent(one: _Shown) -> float:
    return one.macs_fraction


def _draw_row(
    cells: Sequence[Any],
    one: _Shown,
    model: MIAFormer,
    data_config: Mapping[str, Any],
    classes: Sequence[str] | None,
) -> None:
    picture = _picture(one.image, data_config)
    smooth = "nearest" if picture.shape[0] < 100 else "antialiased"
    cells[0].imshow(picture, interpolation=smooth)
    cells[1].imshow(_faded(picture, one, model), interpolation=smooth)
    _draw_blocks(cells[2], one)
    for cell in cells[:2]:
        cell.set_xticks([])
        cell.set_yticks([])
        cell.spines[:].set_visible(False)
    name = (lambda label: classes[label]) if classes is not None else str
    right = one.predicted == one.label
    cells[3].set_axis_off()
    verdict = "right" if right else f"wrong: {_short(name(one.label))}" if one.label >= 0 else ""
    lines = (
        (_short(name(one.predicted)), 11, _INK),
        *([(verdict, 9, _RIGHT if right else _WRONG)] if one.label >= 0 else []),
        (f"{one.macs_fraction:.2f} of the MACs", 9, _INK),
        (f"{int(one.depth.sum())} of {len(one.depth)} blocks", 9, _FAINT),
    )
    for index, (text, size, colour) in enumerate(lines):
        cells[3].text(
            0.0,
            0.88 - 0.25 * index,
            text,
            fontsize=size,
            color=colour,
            va="center",
            transform=cells[3].transAxes,
        )


def _draw_blocks(cell: Any, one: _Shown) -> None:
    """A square for each head of each block, the first block on top: filled where it was executed."""
    depth, heads = one.heads.shape
    for block in range(depth):
        for head in range(heads):
            colour = _KEPT if one.heads[block, head] else _SKIPPED
            cell.add_patch(_rectangle((head + 0.07, block + 0.09), 0.86, 0.82, colour))
    cell.set_xlim(0, heads)
    cell.set_ylim(depth, 0)
    cell.set_axis_off()


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="none")


def _picture(image: Tensor, data_config: Mapping[str, Any]) -> Array:
    """(3, H, W) normalised to (H, W, 3) in 0 to 1."""
    mean, std = (torch.tensor(data_config.get(name, (0.5,))).view(-1, 1, 1) for name in ("mean", "std"))
    picture: Array = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return picture


def _faded(picture: Array, one: _Shown, model: MIAFormer) -> Array:
    """The picture, each patch faded by the share of the blocks that decide tokens which skipped it."""
    height, width = picture.shape[:2]
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    decides = one.depth & torch.tensor([bool(controller.rank) for controller in model.controllers])
    kept = one.tokens[decides].float().mean(dim=0) if decides.any() else torch.ones(one.tokens.shape[1])
    weight = F.interpolate(kept.view(1, 1, rows, columns), (height, width))[0, 0, :, :, None].numpy()
    faded: Array = picture * weight + (1 - weight) * (0.9 + 0.1 * picture)
    return faded


def _short(name: str, most: int = 14) -> str:
    name = name.partition(",")[0]
    return name if len(name) <= most else name[: most - 1] + "…"


def _macs(macs: float) -> str:
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g}{unit} MACs"
    return f"{macs:.0f} MACs"


def _figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    """A figure of its own, without the state that pyplot keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=_PAPER, dpi=150)
    FigureCanvasAgg(figure)
    if not axes:
        return figure, None
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color(_FAINT)
    plot.tick_params(colors=_INK, length=0)
    return figure, plot


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
