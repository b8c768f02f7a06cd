"""Where compute goes, class by class: mean maps of kept tokens, and the cheapest and the most expensive test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaformer.evaluation.calibration import LabelledBatch
from miaformer.evaluation.extremes import as_picture
from miaformer.evaluation.looks import FAINT, INK, new_figure, save, short
from miaformer.model.model import MIAFormer


@dataclass
class _OfClass:
    """What was seen of a class."""

    count: int = 0
    macs_fraction: float = 0.0  # sum
    kept: Tensor | float = 0.0  # (N,), sum over images of the share of blocks that kept each token
    least: list[tuple[float, Tensor]] = field(default_factory=list)  # MACs fraction, image (3, H, W)
    most: list[tuple[float, Tensor]] = field(default_factory=list)


def plot_classes(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    path: str | Path,
    budget: float,
    classes: Sequence[str],
    count: int = 5,
) -> None:
    """One row per class: where its tokens are kept on average, its `count` cheapest and most expensive images, and the
    MACs that they take.

    batches: passed over once. classes: names of the labels; the twelve with the most images are drawn.

    Raises ValueError where there are no images.
    """
    seen = _gathered(model, batches, budget, count)
    if not seen:
        raise ValueError("plot_classes() was given no images")
    labels = sorted(sorted(seen, key=lambda label: -seen[label].count)[:12])
    columns = 2 * count + 2  # the map, the cheapest, a gap, the most expensive
    figure, _ = new_figure(1.0 * columns + 1.6, 1.08 * len(labels) + 0.8, axes=False)
    widths = [1.15, *[1.0] * count, 0.25, *[1.0] * count]
    grid = figure.add_gridspec(
        len(labels), columns, width_ratios=widths,
        left=0.12, right=0.99, bottom=0.02, top=0.92, hspace=0.28, wspace=0.06,
    )  # fmt: skip
    rows, cols = model.backbone.patch_embed.dynamic_feat_size(model.image_size())
    maps = {label: torch.as_tensor(seen[label].kept / seen[label].count).view(rows, cols) for label in labels}
    low, high = (float(end(value for one in maps.values() for value in one.flatten())) for end in (min, max))
    config = model.data_config()
    for row, label in enumerate(labels):
        one = seen[label]
        cell = figure.add_subplot(grid[row, 0])
        if high > low:  # else no tokens are chosen
            cell.imshow(maps[label], cmap="Blues", vmin=low, vmax=high)
        name = f"{short(classes[label])}\n{one.macs_fraction / one.count:.3f}"
        cell.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
        _bare(cell)
        if row == 0 and high > low:
            cell.set_title("tokens kept", fontsize=8.5, color=INK, loc="left")
        for start, found, title in ((1, one.least, "cheapest"), (count + 2, one.most, "most expensive")):
            for place, (fraction, image) in enumerate(found):
                cell = figure.add_subplot(grid[row, start + place])
                cell.imshow(as_picture(image, config), interpolation="nearest")
                cell.set_xlabel(f"{fraction:.2f}", fontsize=7, color=FAINT, labelpad=1)
                _bare(cell)
                if row == 0 and place == 0:
                    cell.set_title(title, fontsize=8.5, color=INK, loc="left")
    figure.suptitle(
        f"Where compute goes at a budget of {budget:g}: mean share of the MACs by class, and of each image",
        x=0.12, y=0.985, ha="left", va="top", color=INK, fontsize=11,
    )  # fmt: skip
    save(figure, path)


@torch.inference_mode()
def _gathered(model: MIAFormer, batches: Iterable[LabelledBatch], budget: float, count: int) -> dict[int, _OfClass]:
    """By label."""
    parameter = next(model.parameters())
    decides = torch.tensor([bool(controller.rank) for controller in model.controllers] or [False] * model.cost().depth)
    seen: dict[int, _OfClass] = {}
    for batch in batches:
        trace = model.run(batch.images.to(parameter), budget=budget).trace
        executed = (trace.depth.cpu() & decides)[:, :, None]
        share = (trace.tokens.cpu() & executed).sum(dim=1) / executed.sum(dim=1).clamp(min=1)  # (B, N)
        for i, label in enumerate(batch.labels.tolist()):
            one = seen.setdefault(label, _OfClass())
            fraction, image = float(trace.macs_fraction[i]), batch.images[i].float().cpu()
            one.count += 1
            one.macs_fraction += fraction
            one.kept = one.kept + share[i]
            one.least = sorted([*one.least, (fraction, image)], key=_fraction)[:count]
            one.most = sorted([*one.most, (fraction, image)], key=_fraction, reverse=True)[:count]
    return seen


def _fraction(found: tuple[float, Tensor]) -> float:
    return found[0]


def _bare(cell: Any) -> None:
    cell.set_xticks([])
    cell.set_yticks([])
    cell.spines[:].set_visible(False)
