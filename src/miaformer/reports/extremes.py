"""The images of a data set that take least and most, and what was done with each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.evaluation.contenders import inference_batches
from miaformer.model.model import MIAFormer

Array = NDArray[Any]


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


def middle_budget(model: MIAFormer) -> float | None:
    """Of those it can meet, the nearest to a half; None for a model that knows none."""
    if model.calibration is None:
        return None
    least, most = model.calibration.range
    return round(min(max(0.5, least), most), 2) if most - least > 0.02 else most
