"""A ViT whose classifier reads the class token and the mean of the patch tokens, side by side, as DINOv2's does.

timm's ViT pools by one of them ("token", "avg"). This one is described, built, ordered and exported like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer, global_pool_nlc
from torch import Tensor, nn


class VisionTransformerTokenAvg(VisionTransformer):
    """timm's `VisionTransformer` with pooled features of 2 C channels: the class token's C, then the patches' mean.

    Takes the same arguments, but for `global_pool` and `fc_norm`, which it sets: all tokens are read, after the norm.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        weight_init = settings.get("weight_init", "")
        super().__init__(*args, **{**settings, "global_pool": "avg", "fc_norm": False, "weight_init": "skip"})
        if self.cls_token is None:
            raise ValueError("VisionTransformerTokenAvg pools the class token, so it needs class_token=True")
        self.head_hidden_size = 2 * self.embed_dim
        self.reset_classifier(self.num_classes)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; the pooling stays what it is."""
        like = self.patch_embed.proj.weight
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.num_classes = num_classes
        head = nn.Linear(self.head_hidden_size, num_classes, **where) if num_classes else nn.Identity()
        self.head = head.train(self.training)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Normed tokens (B, P+N, C) -> (B, 2 C)."""
        means = global_pool_nlc(x, "avg", num_prefix_tokens=self.num_prefix_tokens)
        return torch.cat([x[:, 0], means], dim=1)
