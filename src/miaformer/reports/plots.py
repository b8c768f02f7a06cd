"""Pictures of a report, and of what a model does to its images. Drawn for a light page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from numpy.typing import NDArray

from miaformer.data import LabelledBatch
from miaformer.model.model import MIAFormer
from miaformer.reports.extremes import Extreme, as_picture, extremes, kept_share
from miaformer.reports.style import (
    FAINT,
    INK,
    KEPT,
    POLICIES,
    RIGHT,
    SKIPPED,
    WRONG,
    bare,
    new_figure,
    rectangle,
    reference_line,
    save,
    short,
    with_unit,
)

Array = NDArray[Any]


def plot_tradeoff(report: Mapping[str, Any], path: str | Path) -> None:
    """`tradeoff_figure` as a file."""
    save(tradeoff_figure(report), path)


def tradeoff_figure(report: Mapping[str, Any]) -> Any:
    """Accuracy over MACs of a report of `evaluate`: one line a policy, and the dense model.

    Raises ValueError where the report has no points.
    """
    points = report["points"]
    if not points:
        raise ValueError("the report has no points to plot")
    figure, axes = new_figure(7.2, 4.6)
    dense = 100 * report["dense"]["accuracy"]
    reference_line(axes, dense)
    for name, (colour, marker) in POLICIES.items():
        own = sorted((p["macs_fraction"], 100 * p["accuracy"]) for p in points if p["policy"] == name)
        if own:
            label = "everything executed" if name == "full" else name
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, linewidth=1.8, label=label, zorder=3)
    reference = f"dense: {dense:.1f} % at {with_unit(report['dense']['macs'])} MACs"
    axes.plot(1.0, dense, marker="*", color=INK, markersize=14, linestyle="none", label=reference, zorder=4)
    axes.margins(0.05, 0.08)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("mean MACs per image, as a fraction of the dense model's")
    axes.set_ylabel("accuracy, %")
    images = f", {report['num_images']:,} images" if "num_images" in report else ""
    where = f" on {report['data']}" if "data" in report else ""
    axes.set_title(f"Accuracy per compute{where}{images}", loc="left", color=INK)
    return figure


def plot_adaptivity(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    path: str | Path,
    budget: float | None = None,
    classes: Sequence[str] | None = None,
    count: int = 5,
) -> None:
    """`adaptivity_figure` as a file."""
    save(adaptivity_figure(model, batches, budget, classes, count), path)


def adaptivity_figure(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    budget: float | None = None,
    classes: Sequence[str] | None = None,
    count: int = 5,
) -> Any:
    """The images that get the least and the most compute at a budget, and what is executed for each of them.

    Beside each image a copy whose tokens fade the earlier they are skipped, and its blocks and heads.
    batches: passed over once, normalised as the model's `data_config` says. classes: names of the labels, of which
    negative ones are unknown.

    Raises ValueError where there are fewer than two images.
    """
    ends = extremes(model, batches, budget, count)
    rows = len(ends.least)
    figure, _ = new_figure(10.6, 0.95 + 1.28 * rows, axes=False)
    grid = figure.add_gridspec(
        rows, 9, width_ratios=[1, 1, 0.82, 1.15, 0.22, 1, 1, 0.82, 1.15],
        left=0.012, right=0.995, bottom=0.015, top=1 - 0.78 / (0.95 + 1.28 * rows), hspace=0.13, wspace=0.1,
    )  # fmt: skip
    spent = "everything executed" if budget is None else f"budget {budget:g} of the dense MACs on average"
    figure.suptitle(f"What each image gets: {spent}", x=0.012, y=0.985, ha="left", va="top", color=INK)
    for side, (title, shown) in enumerate((("least compute", ends.least), ("most compute", ends.most))):
        for row, one in enumerate(shown):
            cells = [figure.add_subplot(grid[row, side * 5 + column]) for column in range(4)]
            _draw_row(cells, one, model, classes)
            if row == 0:
                for cell, text in zip(cells, (title, "tokens kept", "blocks × heads", ""), strict=True):
                    weight = "bold" if text == title else "normal"
                    cell.set_title(text, fontsize=9, loc="left", color=INK, weight=weight)
    return figure


def _draw_row(cells: Sequence[Any], one: Extreme, model: MIAFormer, classes: Sequence[str] | None) -> None:
    picture = as_picture(one.image, model.data_config())
    smooth = "nearest" if picture.shape[0] < 100 else "antialiased"
    cells[0].imshow(picture, interpolation=smooth)
    cells[1].imshow(_faded(picture, one, model), interpolation=smooth)
    _draw_blocks(cells[2], one)
    for cell in cells[:2]:
        bare(cell)
    name = (lambda label: classes[label]) if classes is not None else str
    right = one.predicted == one.label
    cells[3].set_axis_off()
    verdict = "right" if right else f"wrong: {short(name(one.label))}" if one.label >= 0 else ""
    lines = (
        (short(name(one.predicted)), 11, INK),
        *([(verdict, 9, RIGHT if right else WRONG)] if one.label >= 0 else []),
        (f"{one.macs_fraction:.3f} of the MACs", 9, INK),
        (f"{int(one.depth.sum())} of {len(one.depth)} blocks", 9, FAINT),
    )
    for index, (text, size, colour) in enumerate(lines):
        at = 0.0, 0.88 - 0.25 * index
        cells[3].text(*at, text, fontsize=size, color=colour, va="center", transform=cells[3].transAxes)


def _draw_blocks(cell: Any, one: Extreme) -> None:
    """A square for each head of each block, the first block on top: filled where it was executed."""
    depth, heads = one.heads.shape
    for block in range(depth):
        for head in range(heads):
            colour = KEPT if one.heads[block, head] else SKIPPED
            cell.add_patch(rectangle((head + 0.07, block + 0.09), 0.86, 0.82, colour))
    cell.set_xlim(0, heads)
    cell.set_ylim(depth, 0)
    cell.set_axis_off()


def _faded(picture: Array, one: Extreme, model: MIAFormer) -> Array:
    """The picture, each patch faded by the share of the blocks that decide tokens which skipped it."""
    height, width = picture.shape[:2]
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    weight = F.interpolate(kept_share(one, model).view(1, 1, rows, columns), (height, width))[0, 0, :, :, None].numpy()
    faded: Array = picture * weight + (1 - weight) * (0.9 + 0.1 * picture)
    return faded
