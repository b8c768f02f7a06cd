"""Static controls: the backbone trained on, and its first blocks trained on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from miaformer.lab.comparison.method import FRACTIONS, Entry, Method, Question, as_backbone, one_stage
from miaformer.model.model import MIAFormer
from miaformer.vit.backbone import Backbone, transformer_blocks


def first_blocks(fraction: float) -> Callable[[Backbone], Backbone]:
    """Leaves a backbone only so many of its blocks, from the first on: 4, 6 and 8 of 12 for `FRACTIONS`."""

    def reshape(backbone: Backbone) -> Backbone:
        kept = max(round(fraction * len(transformer_blocks(backbone))), 1)
        backbone.blocks = nn.Sequential(*transformer_blocks(backbone)[:kept])
        return backbone

    return reshape


def _static(name: str) -> Callable[[MIAFormer, Question], list[Entry]]:
    return lambda model, question: [as_backbone(name, model, question)]


DENSE = Method("dense", "the backbone, trained further for the same epochs", one_stage("backbone"), _static("dense"))
SHALLOW = [
    Method(
        f"shallow-{fraction:g}",
        f"the first blocks, about {fraction:g} of them, trained further",
        one_stage("backbone"),
        _static("shallow"),
        reshape=first_blocks(fraction),
    )
    for fraction in FRACTIONS
]
