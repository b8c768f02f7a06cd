"""Resolution as a grain: an image is looked at in the size that it needs, and patch tokens become fewer with it.

A ViT at half the sides has a quarter of the patch tokens, each of which sees four times the area: of a few ways to
spend a quarter of the compute the one that keeps most (docs/log.md), and the one that every kernel runs at full speed.
Images are resized from the backbone's own pixels, antialiased; position embeddings are resampled, both as timm does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch.nn.functional as F
from timm.layers.format import Format
from timm.models.eva import Eva
from torch import Tensor

from miaformer.engine.cost import Counts
from miaformer.vit.backbone import Backbone
from miaformer.vit.eva import free_rope

Size = tuple[int, int]  # height and width in pixels
COUNT = 5  # sizes, the backbone's own among them: four steps of the sides


def image_sizes(full: Size, patch: Size, least: float) -> tuple[Size, ...]:
    """The sizes that images are looked at in, the largest first: `full` down to about `least` of its sides, in whole
    patches. 112, 98, 84, 70 and 56 pixels of 112 with patches of 14 and `least` of a half.
    """
    shares = np.linspace(1, least, COUNT)
    sizes = [cast(Size, tuple(max(round(s * n / p), 1) * p for n, p in zip(full, patch, strict=True))) for s in shares]
    return tuple(dict.fromkeys([full, *sizes[1:]]))


def drawn_size(macs: dict[Size, int], rate: float) -> Size:
    """The size that a training step draws, so that all get the same compute: small ones, which have most to learn, come
    most often. macs: of each size; rate: uniform in 0 to 1, 1 excluded.
    """
    often = np.cumsum([1 / one for one in macs.values()])
    place = int(np.searchsorted(often, rate * often[-1], side="right"))
    return list(macs)[min(place, len(macs) - 1)]


def resized(images: Tensor, size: Size) -> Tensor:
    """Normalised images (B, 3, H, W) at another size. Bicubic and antialiased, as timm reads pictures for ViTs: without
    antialiasing, detail above the new resolution would turn into noise.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    has_kernel = images.device.type != "cpu" or images.element_size() >= 4  # PyTorch has none for 16 bits on a CPU
    exact = images if has_kernel else images.float()
    smaller = F.interpolate(exact, size, mode="bicubic", antialias=True, align_corners=False)
    return smaller.to(images.dtype)


def take_any_size(backbone: Backbone) -> Backbone:
    """The backbone itself, changed to take images of any whole number of patches: timm's `dynamic_img_size=True`."""
    embed = backbone.patch_embed
    backbone.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript alone
    if isinstance(backbone, Eva):
        backbone.rope = free_rope(backbone.rope)
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC
    return backbone


def within_cap(wanted: Sequence[Size], left: Counts, costs: dict[Size, int]) -> list[Size | None]:
    """For each image the largest size up to the one wanted that its cap pays for; None where it pays for none.

    left: (B,), the MACs that images may still take. costs: MACs of all sizes, the largest first.
    """
    ordered = list(costs)
    return [
        next((s for s in ordered[ordered.index(size) :] if costs[s] <= macs), None)
        for size, macs in zip(wanted, left.tolist(), strict=True)
    ]
