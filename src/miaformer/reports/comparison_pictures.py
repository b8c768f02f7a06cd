"""Where compute goes, class by class: mean maps of kept tokens, and the cheapest and the most expensive test images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.model.model import MIAFormer
from miaformer.reports.extremes import Ends, Extreme, as_picture, kept_share, run_each
from miaformer.reports.style import FAINT, INK, bare, new_figure, save, short

COUNT = 5  # of a class's cheapest and of its most expensive


class _OfClass(Ends):
    """What was seen of a class."""

    def __init__(self, model: MIAFormer) -> None:
        super().__init__(COUNT)
        self._model = model
        self.images = 0
        self.macs_fraction = 0.0  # sum
        self.kept: Tensor | float = 0.0  # (N,), sum over images of the share of blocks that kept each token

    def add(self, one: Extreme) -> None:
        super().add(one)
        self.images += 1
        self.macs_fraction += one.macs_fraction
        self.kept = self.kept + kept_share(one, self._model)


def plot_classes(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    path: str | Path,
    budget: float,
    classes: Sequence[str],
) -> None:
    """One row per class: where its tokens are kept on average, its `COUNT` cheapest and most expensive images, and the
    MACs that they take.

    batches: passed over once. classes: names of the labels; the twelve with the most images are drawn.

    Raises ValueError where there are no images.
    """
    seen: dict[int, _OfClass] = defaultdict(lambda: _OfClass(model))
    for image in run_each(model, batches, budget):
        seen[image.label].add(image)
    if not seen:
        raise ValueError("plot_classes() was given no images")
    labels = sorted(sorted(seen, key=lambda label: -seen[label].images)[:12])
    columns = 2 * COUNT + 2  # the map, the cheapest, a gap, the most expensive
    figure, _ = new_figure(1.0 * columns + 1.6, 1.08 * len(labels) + 0.8, axes=False)
    widths = [1.15, *[1.0] * COUNT, 0.25, *[1.0] * COUNT]
    grid = figure.add_gridspec(
        len(labels), columns, width_ratios=widths,
        left=0.12, right=0.99, bottom=0.02, top=0.92, hspace=0.28, wspace=0.06,
    )  # fmt: skip
    rows, cols = model.backbone.patch_embed.dynamic_feat_size(model.image_size())
    maps = {label: torch.as_tensor(seen[label].kept / seen[label].images).view(rows, cols) for label in labels}
    low, high = (float(end(value for one in maps.values() for value in one.flatten())) for end in (min, max))
    config = model.data_config()
    for row, label in enumerate(labels):
        one = seen[label]
        cell = figure.add_subplot(grid[row, 0])
        if high > low:  # else no tokens are chosen
            cell.imshow(maps[label].numpy(), cmap="Blues", vmin=low, vmax=high)
        name = f"{short(classes[label])}\n{one.macs_fraction / one.images:.3f}"
        cell.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
        bare(cell)
        if row == 0 and high > low:
            cell.set_title("tokens kept", fontsize=8.5, color=INK, loc="left")
        for start, found, title in ((1, one.least, "cheapest"), (COUNT + 2, one.most, "most expensive")):
            for place, shown in enumerate(found):
                cell = figure.add_subplot(grid[row, start + place])
                cell.imshow(as_picture(shown.image, config), interpolation="nearest")
                cell.set_xlabel(f"{shown.macs_fraction:.2f}", fontsize=7, color=FAINT, labelpad=1)
                bare(cell)
                if row == 0 and place == 0:
                    cell.set_title(title, fontsize=8.5, color=INK, loc="left")
    figure.suptitle(
        f"Where compute goes at a budget of {budget:g}: mean share of the MACs by class, and of each image",
        x=0.12, y=0.985, ha="left", va="top", color=INK, fontsize=11,
    )  # fmt: skip
    save(figure, path)
