"""The images of a data set that take least and most, what was done with each, and both as a section of a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.evaluation.contenders import inference_batches
from miaformer.model.model import MIAFormer
from miaformer.reports.page import Markup, data_uri, is_small, tag

Array = NDArray[Any]

COUNT = 6  # of the cheapest and of the most expensive


@dataclass(frozen=True)
class Extreme:
    """One image and what was done with it."""

    image: Tensor  # (3, H, W), normalised
    macs_fraction: float
    depth: Tensor  # (L,)
    heads: Tensor  # (L, H)
    tokens: Tensor  # (L, N)
    predicted: int
    label: int  # negative: unknown


@torch.inference_mode()
def run_each(model: MIAFormer, batches: Iterable[LabelledBatch], budget: float | None) -> Iterator[Extreme]:
    """Every image, and what is done with it at a budget."""
    for images, labels in inference_batches(model, batches):
        output = model.run(images, budget=budget)
        trace, predicted = output.trace, output.logits.argmax(dim=1)
        for i, image in enumerate(images):
            yield Extreme(
                image.float().cpu().clone(),
                trace.macs_fraction[i].item(),
                trace.depth[i].cpu(),
                trace.heads[i].cpu(),
                trace.tokens[i].cpu(),
                int(predicted[i]),
                int(labels[i]),
            )


class Ends:
    """Of the images that were added, the `count` with the fewest MACs, and those with the most, each in order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.least: list[Extreme] = []
        self.most: list[Extreme] = []

    def add(self, one: Extreme) -> None:
        spent = attrgetter("macs_fraction")
        self.least = sorted([*self.least, one], key=spent)[: self._count]
        self.most = sorted([*self.most, one], key=spent, reverse=True)[: self._count]


def extremes(model: MIAFormer, batches: Iterable[LabelledBatch], budget: float | None, count: int) -> Ends:
    """The ends of all images. Raises ValueError where there are fewer than two."""
    ends = Ends(count)
    for one in run_each(model, batches, budget):
        ends.add(one)
    if len(ends.least) < 2:
        raise ValueError("the least and the most of them: give at least two images")
    return ends


def kept_share(one: Extreme, model: MIAFormer) -> Tensor:
    """Of the executed blocks that decide tokens, the share that kept each of them (N,); 1 where there are none."""
    decides = [bool(controller.rank) for controller in model.controllers] or [False] * len(one.depth)
    executed = one.depth & torch.tensor(decides)
    return one.tokens[executed].float().mean(dim=0) if executed.any() else torch.ones(one.tokens.shape[1])


def as_picture(image: Tensor, data_config: Mapping[str, Any]) -> Array:
    """(3, H, W) normalised to (H, W, 3) in 0 to 1."""
    mean, std = (torch.tensor(data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    picture: Array = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return picture


def extremes_section(
    model: MIAFormer, batches: Iterable[LabelledBatch], about: str, budget: float | None, classes: Sequence[str]
) -> Iterable[Markup]:
    """about: what the images are; classes: names of labels. Raises ValueError where there are fewer than two images."""
    ends = extremes(model, batches, budget, COUNT)
    at = "everything executed" if budget is None else f"budget {budget:g}"
    config = model.data_config()
    yield tag("h2", "The cheapest and the most expensive images")
    yield tag("p", f"Of {about}, at {at}. Patches fade by how often they are skipped.", class_="quiet")
    for title, found in (("Least compute", ends.least), ("Most compute", ends.most)):
        yield tag("h3", title, class_="group")
        yield tag("ul", *(_card(one, model, config, classes) for one in found), class_="cards small")


def middle_budget(model: MIAFormer) -> float | None:
    """Of those it can meet, the nearest to a half; None for a model that knows none."""
    if model.calibration is None:
        return None
    least, most = model.calibration.range
    return round(min(max(0.5, least), most), 2) if most - least > 0.02 else most


def _card(one: Extreme, model: MIAFormer, config: Mapping[str, Any], classes: Sequence[str]) -> Markup:
    said, label = classes[one.predicted], classes[one.label] if one.label >= 0 else None
    verdict = None if label is None else "right" if one.predicted == one.label else f"wrong: {label.partition(',')[0]}"
    blocks = f"{int(one.depth.sum())} of {len(one.depth)} blocks"
    return tag(
        "li",
        _fading(one, model, config),
        tag("strong", said.partition(",")[0]),
        tag("small", verdict, class_="warning" if verdict and verdict != "right" else None) if verdict else None,
        tag("small", f"{one.macs_fraction:.3f} of the MACs"),
        tag("small", blocks),
    )


def _fading(one: Extreme, model: MIAFormer, config: Mapping[str, Any]) -> Markup:
    """The image, and beside it the same faded."""
    image = Image.fromarray(np.rint(255 * as_picture(one.image, config)).astype(np.uint8))
    width, height = image.size
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    kept = kept_share(one, model)
    covers = [
        tag("rect", x=place % columns, y=place // columns, width=1, height=1, fill_opacity=f"{0.9 * (1 - share):.2f}")
        for place, share in enumerate(kept.tolist())
        if share < 1
    ]
    pixels = "image-rendering:pixelated" if is_small(image) else None
    shown = tag("image", href=data_uri(image), width=width, height=height, style=pixels)
    scale = f"scale({width / columns:g} {height / rows:g})"
    return tag(
        "div",
        tag("svg", shown, viewBox=f"0 0 {width} {height}", role="img", aria_label="the image"),
        tag(
            "svg",
            shown,
            tag("g", *covers, class_="covers", transform=scale, shape_rendering="crispEdges"),
            viewBox=f"0 0 {width} {height}",
            role="img",
            aria_label=f"the same, faded: {kept.mean():.0%} of its patches kept",
        ),
        class_="pair",
    )
