"""`adapt`: a ViT goes in, an adaptive one comes out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from miaformer.engine.block import check_plain
from miaformer.model.config import AdaptConfig
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import take_any_size
from miaformer.vit import backbone as static
from miaformer.vit.from_transformers import is_of_transformers, to_timm
from miaformer.vit.importance import identity_orders, importance_orders
from miaformer.vit.layers import norms_results, num_kv_heads, shares_keys


@torch.inference_mode(False)  # a model that learns, wherever it was made
def adapt(
    backbone: nn.Module, calibration_images: Tensor | None = None, image_processor: Any = None, **config: Any
) -> MIAFormer:
    """Make a ViT adaptive. Its weights are kept; executing everything gives the backbone's output.

    backbone: any timm VisionTransformer or Eva of plain blocks (`miaformer.vit.backbone`). It is taken over, no copy:
    with nested heads its heads, MLP units and channels are reordered by importance, which changes no output. Or a model
    of transformers (`miaformer.vit.transformers_models`), which stays as it is: its weights are copied.
    calibration_images: (B, 3, H, W), to measure that importance on; without them it is read off the weights.
    image_processor: of a transformers model; says how pictures are prepared, and their size. Without it that is the
    size in the model's configuration, and the preparation that published models of its kind use.
    config: fields of `AdaptConfig`.

    Raises TypeError or ValueError naming the part of the backbone, or the setting, that is not supported.
    """
    known = [field.name for field in fields(AdaptConfig)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise TypeError(f"adapt() does not know {', '.join(unknown)}; settings are {', '.join(known)}")
    settings = AdaptConfig(**config)
    if is_of_transformers(backbone):
        backbone = to_timm(backbone, image_processor)
    elif image_processor is not None:
        raise TypeError("image_processor goes with a transformers model; timm's have their pretrained_cfg")
    vit = static.learning(static.check_supported(backbone))
    if settings.chooses_resolution:
        take_any_size(vit)
    static.check_describes(static.describe(vit), vit)
    if calibration_images is not None:
        static.check_images(calibration_images, vit, "calibration_images")
    if "heads" in settings.grains:
        _check_own_keys(static.transformer_blocks(vit))
        check_plain(static.transformer_blocks(vit), "executed in part", "Leave 'heads' out of the grains")
    if settings.mlp_width == "coupled" and any(norms_results(block) for block in static.transformer_blocks(vit)):
        raise ValueError(
            "mlp_width='coupled' is not for blocks that norm what attention and MLP give (post-norm): a part of its "
            "channels has another norm"
        )
    orders = importance_orders(vit, calibration_images) if settings.cuts_heads else identity_orders(vit)
    if settings.mlp_width != "coupled":  # nothing chooses among channels
        orders["channels"] = identity_orders(vit)["channels"]
    static.apply_orders(vit, orders)
    parameter = next(vit.parameters())
    model = MIAFormer(vit, settings, orders).to(parameter.device)
    model.controllers.to(parameter.dtype)
    return model


def _check_own_keys(blocks: Iterable[Any]) -> None:
    """Raises ValueError for heads that share keys and values: they have no order by importance, and are no grain."""
    for index, attn in enumerate(block.attn for block in blocks):
        if shares_keys(attn):
            raise ValueError(
                f"block {index} of the backbone has grouped-query attention: {attn.num_heads} heads share "
                f"{num_kv_heads(attn)} heads of keys and values, so they cannot be decided one by one. Leave 'heads' "
                "out of the grains: adapt(backbone, grains=('depth', 'tokens'))"
            )
