"""Lower input resolution as a method: one fine-tuning that draws the size of its images each step, or none at all.

An entry a size, which knows no budget but its own MACs. One fine-tuning serves all sizes, as one of ours serves all
budgets; one for each size would be four trainings against one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from miaformer.comparison.method import Entry, Method, Question, as_backbone, one_stage
from miaformer.model import MIAFormer
from miaformer.rivals.resolution import at_size, for_any_size, image_sizes, resized


def _at_every_size(name: str) -> Callable[[MIAFormer, Question], list[Entry]]:
    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        return [
            replace(as_backbone(name, at_size(model, size), question), read=partial(resized, size=size))
            for size in image_sizes(model.backbone)
        ]

    return entries


RESOLUTION = Method(
    "resolution",
    "smaller images, fine-tuned on all sizes at once",
    one_stage("resolution"),
    _at_every_size("resolution"),
    reshape=for_any_size,
)
RESOLUTION_FREE = Method("resolution-free", "smaller images, without training", None, _at_every_size("resolution-free"))
