"""Lower input resolution as a method: one fine-tuning that draws the size of its images each step, or none at all;
and a small image first, a larger one where the answer is not confident.

An entry a size, which knows no budget but its own MACs. One fine-tuning serves all sizes, as one of ours serves all
budgets; one for each size would be four trainings against one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from miaformer.comparison.method import Classify, Entry, Method, Question, as_backbone, image_shape, one_stage
from miaformer.looks import View, choose_looks, row_of
from miaformer.model import MIAFormer
from miaformer.policy import Full
from miaformer.rivals.resolution import at_size, for_any_size, image_sizes, resized


def _at_every_size(name: str) -> Callable[[MIAFormer, Question], list[Entry]]:
    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        return [
            replace(as_backbone(name, at_size(model, size), question), read=partial(resized, size=size))
            for size in image_sizes(model.backbone)
        ]

    return entries


@torch.no_grad()  # not inference mode: models are made in it
def _two_looks(model: MIAFormer, question: Question) -> list[Entry]:
    """A small image first, a larger one where the answer is not confident (CF-ViT, Chen et al. 2023, without its reuse
    of features), chosen on the calibration images as ours are; one size where that is better.
    """
    models = [at_size(model, size) for size in image_sizes(model.backbone)]
    answers: list[list[Tensor]] = [[] for _ in models]
    for batch in question.calibration():
        for given, one in zip(answers, models, strict=True):
            given.append(_run(one, batch.images.to(next(model.parameters()))))
    counts = [len(torch.cat(given)) for given in answers]
    macs = [_macs(one) / question.backbone_macs for one in models]
    views = [
        View.of(torch.cat(given), torch.full((count,), fraction))
        for given, count, fraction in zip(answers, counts, macs, strict=True)
    ]
    table = choose_looks(views)

    def entry(budget: float) -> Entry | None:
        row = row_of(table, budget)
        if row is not None:
            first, second = (views.index(_nearest(views, one)) for one in (row.first, row.second))
            return Entry("resolution-looks", budget, _in_turn(models, macs, first, second, row.confidence))
        within = [place for place, fraction in enumerate(macs) if fraction <= budget]
        return Entry("resolution-looks", budget, _in_turn(models, macs, within[0], within[0], 0.0)) if within else None

    return [found for found in map(entry, question.budgets) if found is not None]


def _nearest(views: Sequence[View], fraction: float) -> View:
    return min(views, key=lambda view: abs(view.fraction - fraction))


def _run(model: MIAFormer, images: Tensor) -> Tensor:
    return model.run(resized(images, model.image_size()), policy=Full()).logits.float()


def _macs(model: MIAFormer) -> float:
    images = torch.zeros(1, *image_shape(model), device=next(model.parameters()).device)
    return float(model.run(images, policy=Full()).trace.macs)


def _in_turn(
    models: Sequence[MIAFormer], macs: Sequence[float], first: int, second: int, confidence: float
) -> Classify:
    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = _run(models[first], images)
        spent = torch.full((len(images),), macs[first])
        again = (logits.softmax(dim=1).amax(dim=1) < confidence).nonzero().flatten()
        if len(again):
            logits = logits.index_copy(0, again, _run(models[second], images[again]))
            spent[again.cpu()] += macs[second]
        return logits, spent

    return classify


RESOLUTION = Method(
    "resolution",
    "smaller images, fine-tuned on all sizes at once",
    one_stage("resolution"),
    _at_every_size("resolution"),
    reshape=for_any_size,
)
RESOLUTION_FREE = Method("resolution-free", "smaller images, without training", None, _at_every_size("resolution-free"))
RESOLUTION_LOOKS = Method(
    "resolution-looks",
    "a small image first, a larger one where the answer is not confident",
    one_stage("resolution"),
    _two_looks,
    reshape=for_any_size,
    trained_as="resolution",
)
