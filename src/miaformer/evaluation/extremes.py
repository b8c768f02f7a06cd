"""The images of a data set that get the least and the most compute, and what was done with each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.evaluation.calibration import LabelledBatch
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
def extremes(
    model: MIAFormer, batches: Iterable[LabelledBatch], budget: float | None, count: int
) -> tuple[list[Extreme], list[Extreme]]:
    """The `count` images with the fewest MACs, and those with the most, each in order."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    least: list[Extreme] = []
    most: list[Extreme] = []
    for batch in batches:
        output = model.run(batch.images.to(parameter), budget=budget)
        trace, predicted = output.trace, output.logits.argmax(dim=1)
        order = trace.macs.argsort(stable=True).tolist()
        found = {
            i: Extreme(
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
        raise ValueError("the least and the most of them: give at least two images")
    return least, most


def _spent(one: Extreme) -> float:
    return one.macs_fraction


def kept_share(one: Extreme, model: MIAFormer) -> Tensor:
    """Of the executed blocks that decide tokens, the share that kept each of them (N,); 1 where there are none."""
    decides = one.depth & torch.tensor([bool(controller.rank) for controller in model.controllers])
    return one.tokens[decides].float().mean(dim=0) if decides.any() else torch.ones(one.tokens.shape[1])


def as_picture(image: Tensor, data_config: Mapping[str, Any]) -> Array:
    """(3, H, W) normalised to (H, W, 3) in 0 to 1."""
    mean, std = (torch.tensor(data_config.get(name, (0.5,))).view(-1, 1, 1) for name in ("mean", "std"))
    picture: Array = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return picture
