"""Static controls: the backbone trained on, its first blocks trained on, and fewer channels trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from miaformer.backbone import transformer_blocks
from miaformer.comparison.method import FRACTIONS, Entry, Method, Question, as_backbone, one_stage
from miaformer.model import MIAFormer
from miaformer.training.recipes import Recipe


def _narrow(fraction: float) -> Callable[[Recipe], Recipe]:
    """A backbone of about this fraction of the MACs by fewer channels, heads of even size, trained from scratch.

    Without what makes a backbone do with less, which a model that never does can do without.
    """

    def recipe(base: Recipe) -> Recipe:
        args = base.model_args
        heads = args["num_heads"]
        dim = 2 * heads * round(math.sqrt(fraction) * args["embed_dim"] / (2 * heads))
        plain = (replace(s, patch_drop=(0.0, 0.0), early_weight=0.0) for s in base.only("backbone").stages)
        stages = *plain, *one_stage("backbone")(base).stages
        return replace(base, model_args={**args, "embed_dim": dim}, stages=stages)

    return recipe


def first_blocks(fraction: float) -> Callable[[VisionTransformer], VisionTransformer]:
    """Leaves a backbone only so many of its blocks, from the first on: 4, 6 and 8 of 12 for `FRACTIONS`."""

    def reshape(backbone: VisionTransformer) -> VisionTransformer:
        kept = max(round(fraction * len(transformer_blocks(backbone))), 1)
        backbone.blocks = nn.Sequential(*transformer_blocks(backbone)[:kept])
        return backbone

    return reshape


def _static(name: str) -> Callable[[MIAFormer, Question], list[Entry]]:
    return lambda model, question: [as_backbone(name, model, question)]


DENSE = Method("dense", "the backbone, trained on for as long", one_stage("backbone"), _static("dense"))
SHALLOW = [
    Method(
        f"shallow-{fraction:g}",
        f"the first blocks, about {fraction:g} of them, trained on",
        one_stage("backbone"),
        _static("shallow"),
        reshape=first_blocks(fraction),
    )
    for fraction in FRACTIONS
]
NARROW = [
    Method(
        f"narrow-{fraction:g}",
        f"a ViT of about {fraction:g} of the MACs, from scratch",
        _narrow(fraction),
        _static("narrow"),
        from_scratch=True,
    )
    for fraction in FRACTIONS
]
