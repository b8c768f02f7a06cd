"""A lower input resolution: the static backbone on smaller images, what every user tries first.

Images are resized from the backbone's own pixels, antialiased, as a user's pictures would be; position embeddings are
resampled as timm does it. One fine-tuning serves all sizes: each step draws one (as FlexiViT, Beyer et al. 2023, draws
patch sizes).
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from miaformer.backbone import build, describe, image_size
from miaformer.model import MIAFormer, adapt

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)  # of the grid's sides: 1, about 0.77, 0.56, 0.39 and 0.25 of the patch tokens

Size = tuple[int, int]  # height and width in pixels


def image_sizes(backbone: VisionTransformer) -> list[Size]:
    """The backbone's own size and smaller ones that are whole patches, the largest first: 112, 98, 84, 70 and 56 pixels
    of a backbone of 112 with patches of 14.
    """
    full, patch = image_size(backbone), backbone.patch_embed.patch_size
    sizes = [cast(Size, tuple(max(round(s * n / p), 1) * p for n, p in zip(full, patch, strict=True))) for s in SHARES]
    return list(dict.fromkeys(sizes))


def drawn_size(backbone: VisionTransformer, rate: float) -> Size:
    """The size that a training step draws. rate: uniform in 0 to 1, 1 excluded; all sizes are equally likely."""
    sizes = image_sizes(backbone)
    return sizes[int(rate * len(sizes))]


def resized(images: Tensor, size: Size) -> Tensor:
    """Normalised images (B, 3, H, W) at another size. Bicubic and antialiased, as timm reads pictures for ViTs: without
    antialiasing, detail above the new resolution would turn into noise, and the baseline be weaker than need be.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def for_any_size(backbone: VisionTransformer) -> VisionTransformer:
    """A copy that takes images of any size and resamples its position embeddings for each: for training."""
    return _copy(backbone, dynamic_img_size=True)


def at_size(model: MIAFormer, size: Size) -> MIAFormer:
    """A copy of the model for images of this size, its position embeddings resampled once, not at every call."""
    backbone = _copy(model.to_timm(), dynamic_img_size=False)
    backbone.set_input_size(img_size=size)
    settings = {field.name: getattr(model.adapt_config, field.name) for field in dataclasses.fields(model.adapt_config)}
    return adapt(backbone, **settings).train(model.training)


def _copy(backbone: VisionTransformer, dynamic_img_size: bool) -> VisionTransformer:
    parameter = next(backbone.parameters())
    twin = build({**describe(backbone), "dynamic_img_size": dynamic_img_size})
    twin.load_state_dict(backbone.state_dict())
    known = dict(getattr(backbone, "pretrained_cfg", None) or {})  # how pictures are prepared; timm writes sizes to it
    twin.pretrained_cfg = known  # type: ignore[assignment]
    return twin.to(device=parameter.device, dtype=parameter.dtype).train(backbone.training)
