"""Lower input resolution as a method: one fine-tuning that draws the size of its images each step, or none at all;
and a small image first, a larger one where the answer is not confident.

One fine-tuning serves all sizes, as one of ours serves all budgets; one for each size would be four trainings against
one. A recipe whose grain is resolution has the first as `learned`'s `static`, and the last as `learned` itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miaformer.comparison.engines import of_module
from miaformer.comparison.method import Classify, Entry, Method, Question, by_policy, one_stage
from miaformer.evaluation.calibration import calibrate
from miaformer.model import MIAFormer, adapt
from miaformer.policy import Full
from miaformer.resolution import resized
from miaformer.training.recipes import Recipe

ADAPT: dict[str, Any] = {"grains": ("resolution",)}


def _trained(base: Recipe) -> Recipe:
    return replace(one_stage("resolution")(base), adapt=ADAPT)


def _at_every_size(model: MIAFormer, question: Question, name: str) -> list[Entry]:
    """An entry a size, which knows no budget but its own MACs."""
    return [
        Entry(
            name,
            None,
            _at(model, question),
            read=partial(resized, size=size),
            engines=of_module(model.to_timm(size), (model.backbone.in_chans, *size)),
        )
        for size in model.image_sizes()
    ]


def _at(model: MIAFormer, question: Question) -> Classify:
    """On our engine, so that its last block computes what is read alone, as everybody's does."""

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model.run(images, policy=Full())
        return output.logits, output.trace.macs / question.backbone_macs

    return classify


def _without_training(model: MIAFormer, question: Question) -> list[Entry]:
    return _at_every_size(any_size(model), question, "resolution-free")


def any_size(model: MIAFormer) -> MIAFormer:
    """The same backbone, looked at in any of its sizes."""
    return adapt(model.to_timm(), **ADAPT).to(next(model.parameters()).device).train(model.training)


@torch.no_grad()
def _two_looks(model: MIAFormer, question: Question) -> list[Entry]:
    calibrate(model, question.calibration())
    found = []
    for budget in question.budgets:
        if model.calibration is not None and budget >= model.calibration.range[0]:
            found.append(Entry("resolution-looks", budget, by_policy(model, model.at_budget(budget))))
    return found


RESOLUTION = Method(
    "resolution",
    "smaller images, fine-tuned on all sizes at once",
    _trained,
    partial(_at_every_size, name="resolution"),
)
RESOLUTION_FREE = Method("resolution-free", "smaller images, without training", None, _without_training)
RESOLUTION_LOOKS = Method(
    "resolution-looks",
    "a small image first, a larger one where the answer is not confident",
    _trained,
    _two_looks,
    trained_as="resolution",
)
