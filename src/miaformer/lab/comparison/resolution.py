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
from miaformer.lab.comparison.method import (
    Classify,
    Entry,
    Method,
    Question,
    as_backbone,
    by_policy,
    main_stage,
    one_stage,
)
from miaformer.model.adapt import adapt
from miaformer.model.early_exit import ASKING, EarlyExit, left_at, macs_of_leaving
from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy, Look, TwoLooks
from miaformer.model.resolution import Size, resized
from miaformer.training.recipes import Recipe

ADAPT: dict[str, Any] = {"grains": ("resolution",)}


def _trained(base: Recipe) -> Recipe:
    """With early answers, where the recipe's own model learns them."""
    alone = one_stage("resolution")(base)
    (stage,), early = alone.stages, main_stage(base).early_weight if base.chooses_resolution else 0.0
    return replace(alone, stages=(replace(stage, early_weight=early),), adapt=ADAPT)


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
        self._answers: dict[Size, Tensor] = {}

    def by(self, policy: AnyPolicy) -> Classify:
        """Logits and MACs fractions, as `by_policy`. policy: what `MIAFormer.at_budget` gives, or a control of it."""

        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            first = policy.first if isinstance(policy, TwoLooks) else policy
            assert isinstance(first, Look)
            logits, spent = self._look(first, images)
            if isinstance(policy, TwoLooks):
                again = policy.open_images(logits).cpu()
                second, more = self._look(policy.second, images)
                logits = logits.index_copy(0, again.to(logits.device), second[again])
                spent[again] += more[again]
            return logits, spent

        return classify

    def _look(self, look: Look, images: Tensor) -> tuple[Tensor, Tensor]:
        chosen, whole = look.sizes_of(len(images)), self.model.cost().backbone
        each = []
        for size in dict.fromkeys(chosen):
            answers, cost = self._at(size, images), self.model.cost(size)
            left, macs = torch.full((len(images),), -1), torch.tensor([cost.everything])
            if isinstance(look.policy, EarlyExit):
                left = left_at(answers.softmax(dim=2).amax(dim=2), look.policy.threshold).cpu()
                macs = torch.tensor(macs_of_leaving(cost, look.policy.blocks))
            logits = answers[torch.arange(len(images)), left]
            own = torch.tensor([one == size for one in chosen])
            each.append((own, logits, (macs[left].double() / whole).float()))
        _, logits, spent = each[0]
        for own, other, macs in each[1:]:
            logits = torch.where(own[:, None].to(logits.device), other, logits)
            spent = torch.where(own, macs, spent)
        return logits, spent

    def _at(self, size: Size, images: Tensor) -> Tensor:
        """Answers (B, K, classes) before each block that may be left before, and at the end."""
        if images is not self._images:
            self._images, self._answers = images, {}
        if size not in self._answers:
            asking = EarlyExit(self.model.backbone, ASKING)
            logits = self.model.run(images, policy=Look(asking, (size,))).logits
            self._answers[size] = torch.stack([*asking.answers, logits], dim=1)
        return self._answers[size]


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
