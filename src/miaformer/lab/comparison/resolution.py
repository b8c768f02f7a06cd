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

from miaformer.evaluation.calibration import calibrate
from miaformer.lab.comparison.engines import of_module
from miaformer.lab.comparison.method import Classify, Entry, Method, Question, as_backbone, by_policy, one_stage
from miaformer.model.adapt import adapt
from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy, Full, Look, TwoLooks
from miaformer.model.resolution import Size, resized
from miaformer.training.recipes import Recipe

ADAPT: dict[str, Any] = {"grains": ("resolution",)}


def _trained(base: Recipe) -> Recipe:
    return replace(one_stage("resolution")(base), adapt=ADAPT)


def _at_every_size(model: MIAFormer, question: Question, name: str) -> list[Entry]:
    """An entry a size, which knows no budget but its own MACs."""
    return [
        replace(
            as_backbone(name, model, question),
            read=partial(resized, size=size),
            engines=of_module(model.to_timm(size), (model.backbone.in_chans, *size)),
        )
        for size in model.image_sizes()
    ]


class Looked:
    """What looks of all policies and budgets give, each size run once for a batch: images do not depend on what their
    batch mates are given, so that they are the same.
    """

    def __init__(self, model: MIAFormer) -> None:
        self.model = model
        self._images: Tensor | None = None
        self._logits: dict[Size, Tensor] = {}

    def by(self, policy: AnyPolicy) -> Classify:
        """Logits and MACs fractions, as `by_policy`. policy: of one size, or of two, for all images."""
        whole, macs = self.model.cost().backbone, self.model.macs_of_sizes()

        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            first = policy.first if isinstance(policy, TwoLooks) else policy
            assert isinstance(first, Look)
            (size,) = first.sizes
            logits, spent = self._at(size, images), torch.full((len(images),), macs[size] / whole)
            if isinstance(policy, TwoLooks):
                (size,), again = policy.second.sizes, policy.open_images(logits).cpu()
                logits = logits.index_copy(0, again.to(logits.device), self._at(size, images)[again])
                spent[again] += macs[size] / whole
            return logits, spent

        return classify

    def _at(self, size: Size, images: Tensor) -> Tensor:
        if images is not self._images:
            self._images, self._logits = images, {}
        if size not in self._logits:
            self._logits[size] = self.model.run(images, policy=Look(Full(), (size,))).logits
        return self._logits[size]


def _without_training(model: MIAFormer, question: Question) -> list[Entry]:
    return _at_every_size(any_size(model), question, "resolution-free")


def any_size(model: MIAFormer) -> MIAFormer:
    """The same backbone, looked at in any of its sizes."""
    return adapt(model.to_timm(), **ADAPT).to(next(model.parameters()).device).train(model.training)


@torch.no_grad()
def _two_looks(model: MIAFormer, question: Question) -> list[Entry]:
    if model.calibration is None:
        calibrate(model, question.calibration())
    looked, found = Looked(model), []
    for budget in question.budgets:
        if model.calibration is not None and budget >= model.calibration.range[0]:
            policy = model.at_budget(budget)
            found.append(Entry("resolution-looks", budget, by_policy(model, policy), sharing=looked.by(policy)))
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
