"""Images on their way in: the tokens that enter the first block, and the blocks that they go through."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers import PatchDropoutWithIndices, apply_keep_indices_nlc
from timm.models.eva import Eva
from torch import Tensor

from miaformer.vit.backbone import Backbone, transformer_blocks
from miaformer.vit.layers import Rotary, positioned


class Embedded(NamedTuple):
    """tokens: (B, P+N, C). blocks: as they are executed on these tokens, which have positions there too."""

    tokens: Tensor
    blocks: list[Any]


def embedded(backbone: Backbone, images: Tensor, drop: PatchDropoutWithIndices | None = None) -> Embedded:
    """images: (B, 3, H, W). drop: leaves out some of the patch tokens."""
    patches = backbone.patch_embed(images)
    x, rope = backbone._pos_embed(patches) if isinstance(backbone, Eva) else (backbone._pos_embed(patches), None)
    mixed = isinstance(backbone, Eva) and backbone.rope_mixed
    if drop is not None:
        x, kept = drop(x)
        if rope is not None and kept is not None:  # as timm's `_pos_embed` has it
            rope = apply_keep_indices_nlc(x, rope, kept)
            rope = rope.transpose(0, 1) if mixed else rope.unsqueeze(1)
    rotary = None if rope is None else Rotary(rope, backbone.num_prefix_tokens, mixed)
    return Embedded(backbone.norm_pre(x), positioned(transformer_blocks(backbone), rotary))
