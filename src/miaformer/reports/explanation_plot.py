"""What one picture was given, as a picture: what the model says, and a strip over depth for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from miaformer.prediction.explanation import Explanation
from miaformer.reports.style import FAINT, INK, KEPT, SKIPPED, new_figure, rectangle, save, short, with_unit

Array = NDArray[Any]

# Inches.
_WIDTH, _LEFT, _TEXT = 11.0, 0.0, 1.95  # of the figure; where everything starts; of the text beside a strip
_HERO, _GAP, _ROW = 2.3, 0.1, 0.5  # the picture's longest side; between blocks; between budgets
_A_LINE = 12  # blocks
_DIMMED = 0.14  # of a skipped patch that still shows


def plot_explanation(
    shown: Sequence[Explanation], seen: Image.Image, path: str | Path, name: str, dense_macs: int
) -> None:
    """One picture at one or several budgets; seen: of `seen_picture`; name: of the picture; dense_macs: of a picture.

    Raises ValueError where nothing is shown.
    """
    if not shown:
        raise ValueError("there is no explanation to plot")
    strips = [_Strip(one, seen) for one in shown]
    scale = _HERO / max(seen.size)
    width, height = seen.width * scale, seen.height * scale
    most = max(len(one.prediction.top_k) for one in shown)
    top = max(height, 0.78 + 0.24 * most) + _ROW
    total = top + sum(strip.height + _ROW for strip in strips) - 0.15
    figure, _ = new_figure(_WIDTH, total, axes=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _show(axes, np.asarray(seen) / 255, _LEFT, 0.0, width, height)
    _say(axes, shown, width + 0.45, name)
    for strip in strips:
        axes.plot((0, _WIDTH), (top - _ROW / 2 - 0.02,) * 2, color=SKIPPED, linewidth=0.8)
        _spent(axes, strip.shown, top, dense_macs)
        strip.draw(axes, _LEFT + _TEXT, top)
        top += strip.height + _ROW
    axes.set_xlim(-0.02, _WIDTH + 0.02)
    axes.set_ylim(total, 0)
    axes.set_aspect("equal")
    save(figure, path)


def _say(axes: Any, shown: Sequence[Explanation], left: float, name: str) -> None:
    """What the model says at each budget: the likeliest classes, with bars."""
    _text(axes, left, 0.1, short(name, 70), 9, FAINT)
    column = min((_WIDTH - left) / len(shown), 3.0)
    for place, one in enumerate(shown):
        x, length = left + place * column, column - 0.35
        _text(axes, x, 0.42, one.asked.capitalize(), 9.5, INK, weight="bold")
        for rank, guess in enumerate(one.prediction.top_k):
            y = 0.68 + 0.24 * rank
            _text(axes, x, y, short(guess.title, 6 + int(8 * length)), 9, INK if rank == 0 else FAINT)
            _text(axes, x + length, y, f"{100 * guess.probability:.1f} %", 8.5, INK if rank == 0 else FAINT, ha="right")
            _bar(axes, x, y + 0.09, length, guess.probability, 0.03, faint=rank > 0)


def _spent(axes: Any, one: Explanation, top: float, dense_macs: int) -> None:
    """MACs against the budget and the dense model's."""
    spent = one.prediction
    length = _TEXT - 0.45
    _text(axes, _LEFT, top + 0.06, one.asked.capitalize(), 9.5, INK, weight="bold")
    _bar(axes, _LEFT, top + 0.25, length, spent.macs_fraction, 0.06)
    for tick in (one.budget, one.cap):
        if tick is not None:
            axes.add_patch(rectangle((_LEFT + length * min(tick, 1.0) - 0.01, top + 0.2), 0.02, 0.16, INK))
    lines = (
        (f"{spent.macs_fraction:.3f} of the dense MACs", INK),
        (f"{with_unit(spent.macs_fraction * dense_macs)} MACs", FAINT),
        (f"{sum(one.depth)} of {len(one.depth)} blocks", FAINT),
        (f"{100 * spent.heads_kept:.0f} % of their heads", FAINT),
        (f"{100 * spent.tokens_kept:.0f} % of their patches", FAINT),
        *([(f"second look, {one.grid[0]} × {one.grid[1]} patches", FAINT)] if one.looks > 1 else []),
    )
    for place, (line, colour) in enumerate(lines):
        _text(axes, _LEFT, top + 0.5 + 0.19 * place, line, 8.5, colour)


class _Strip:
    """A block after the other: the patches it attends to, and its heads, `_A_LINE` blocks in a line."""

    def __init__(self, shown: Explanation, seen: Image.Image) -> None:
        self.shown = shown
        self._picture = np.asarray(seen) / 255  # (H, W, 3)
        blocks, heads = len(shown.depth), len(shown.heads[0])
        self._columns = min(blocks, _A_LINE)
        self._width = min((_WIDTH - _LEFT - _TEXT + _GAP) / self._columns - _GAP, 1.45)
        self._square = self._width * seen.height / seen.width
        self._head = min(0.075, 0.85 / heads)  # from one head to the next
        self._line = 0.2 + self._square + 0.07 + heads * self._head + 0.18
        self.height = max(self._line * -(-blocks // self._columns) - 0.18, 1.35)

    def draw(self, axes: Any, left: float, top: float) -> None:
        for block, runs in enumerate(self.shown.depth):
            x = left + block % self._columns * (self._width + _GAP)
            y = top + block // self._columns * self._line
            count = sum(self.shown.tokens[block])
            _text(axes, x, y + 0.06, str(block + 1), 7.5, INK)
            _text(axes, x + self._width, y + 0.06, str(count) if runs else "skipped", 7.5, FAINT, ha="right")
            y += 0.2
            if runs:
                _show(axes, self._dimmed(block), x, y, self._width, self._square)
            else:
                box = rectangle((x, y), self._width, self._square, "none")
                box.set(edgecolor=FAINT, linestyle=(0, (3, 3)), linewidth=0.7)
                axes.add_patch(box)
            y += self._square + 0.07
            for place, kept in enumerate(self.shown.heads[block]):
                colour = KEPT if kept else SKIPPED
                axes.add_patch(rectangle((x, y + place * self._head), self._width, 0.75 * self._head, colour))

    def _dimmed(self, block: int) -> Array:
        """The picture, patches dimmed that the block skips."""
        rows, columns = self.shown.grid
        height, width = self._picture.shape[:2]
        kept = np.array(self.shown.tokens[block]).reshape(rows, columns)
        row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
        weight = kept[row][:, column, None].astype(float)
        weight = _DIMMED + (1 - _DIMMED) * weight
        dimmed: Array = self._picture * weight + (1 - weight)
        return dimmed


def _show(axes: Any, picture: Array, left: float, top: float, width: float, height: float) -> None:
    smooth = "nearest" if max(picture.shape[:2]) < 100 else "antialiased"
    axes.imshow(picture, interpolation=smooth, extent=(left, left + width, top + height, top), aspect="auto")


def _bar(axes: Any, left: float, top: float, length: float, share: float, thick: float, faint: bool = False) -> None:
    axes.add_patch(rectangle((left, top), length, thick, SKIPPED))
    filled = rectangle((left, top), length * min(share, 1.0), thick, KEPT)
    filled.set_alpha(0.45 if faint else 1.0)
    axes.add_patch(filled)


def _text(axes: Any, x: float, y: float, text: str, size: float, colour: str, **how: Any) -> None:
    """Centred on y. A dollar in a name is a dollar."""
    axes.text(x, y, text, fontsize=size, color=colour, va="center", parse_math=False, **how)
