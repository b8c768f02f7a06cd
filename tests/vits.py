"""Small ViTs for tests, with weights drawn so that nothing in them is trivially zero, one or alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import miaformer
from miaformer import MIAFormer
from miaformer.engine.controller import KEEP_LOGIT
from miaformer.vit.stem import ConvPatchEmbed
from miaformer.vit.token_avg import VisionTransformerTokenAvg

SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
GLU_LAST = partial(GluMlp, gate_last=True)
GLU_FIRST = partial(GluMlp, gate_last=False, act_layer=nn.SiLU)

# What timm's ViTs differ in, each seen in at least one small backbone.
STRUCTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"distilled": True},
    "token_avg": {"kind": VisionTransformerTokenAvg, "reg_tokens": 2},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "layer_scale_qk_norm": {"init_values": 1e-5, "qk_norm": True},
    "no_class_token_avg": {"class_token": False, "global_pool": "avg"},
    "registers_only_max": {"class_token": False, "reg_tokens": 2, "global_pool": "max"},
    "avgmax_include_prefix": {"global_pool": "avgmax", "pool_include_prefix": True, "reg_tokens": 1},
    "map_pool": {"class_token": False, "global_pool": "map"},
    "prr_pool": {"global_pool": "prr"},
    "clip_features": {"pre_norm": True, "num_classes": 0},
    "scale_norms_rms": {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": RmsNorm},
    "scale_norms_layer": {"scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": nn.SiLU},
    "aim": {
        "mlp_layer": SwiGLU,
        "act_layer": nn.SiLU,
        "norm_layer": partial(RmsNorm, eps=0.01),
        "embed_norm_layer": partial(RmsNorm, eps=0.1),
        "qkv_bias": False,
        "proj_bias": False,
        "class_token": False,
        "global_pool": "avg",
    },
    "glu": {"mlp_layer": GLU_LAST, "fc_norm": True, "global_pool": "token"},
    "swiglu_packed": {"mlp_layer": GLU_FIRST, "scale_mlp_norm": True, "act_layer": nn.SiLU},
    "dynamic_size": {"dynamic_img_size": True},
    "not_square_no_biases": {"img_size": (8, 24), "patch_size": (4, 6), "qkv_bias": False, "proj_bias": False},
    "uneven_groups": {"embed_dim": 20, "num_heads": 5, "mlp_ratio": 1.15},
    "grey_one_head_no_pos": {"in_chans": 1, "num_heads": 1, "pos_embed": "none", "final_norm": False},
    "conv_stem": {"embed_layer": partial(ConvPatchEmbed, stem_channels=(6, 8))},
    "tokens_out": {"global_pool": "", "num_classes": 4},
    "eva": {"kind": Eva, "init_values": 0.1},
    "eva02": {
        "kind": Eva,
        "swiglu_mlp": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (6, 6),
        "global_pool": "avg",
    },
    "eva02_separate": {
        "kind": Eva,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "global_pool": "token",
    },
    "dinov3": {
        "kind": Eva,
        "qkv_bias": False,
        "num_reg_tokens": 2,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100.0,
        "rope_rotate_half": True,
        "no_embed_class": True,
        "init_values": 1e-5,
        "dynamic_img_size": True,
        "global_pool": "token",
    },
    "rope_mixed": {
        "kind": Eva,
        "attn_type": "rope",
        "use_rot_pos_emb": True,
        "rope_type": "mixed",
        "rope_temperature": 10.0,
        "rope_grid_indexing": "xy",
        "no_embed_class": True,
        "global_pool": "token",
    },
    "perception": {
        "kind": Eva,
        "attn_type": "rope",
        "use_rot_pos_emb": True,
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
        "global_pool": "map",
        "attn_pool_mlp_ratio": 2.0,
        "img_size": (8, 24),
        "patch_size": (4, 6),
    },
    "sapiens": {
        "kind": Eva,
        "attn_type": "rope",
        "qkv_fused": False,
        "qk_norm": True,
        "norm_layer": RmsNorm,
        "swiglu_mlp": True,
        "init_values": 1e-5,
        "attn_only_layer_scale": True,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 1,
        "class_token": False,
    },
}
POST_NORM: dict[str, Any] = {"kind": Eva, "use_post_norm": True, "use_rot_pos_emb": True, "global_pool": "token"}
GROUPED_QUERIES: dict[str, Any] = {  # heads share keys and values, in each block others
    "kind": Eva,
    "attn_type": "rope",
    "embed_dim": 32,
    "num_heads": 4,
    "depth": 3,
    "num_kv_heads": (2, 4, 1),
    "qkv_fused": False,
    "qk_norm": True,
    "norm_layer": RmsNorm,
    "swiglu_mlp": True,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "global_pool": "token",
}
ALL_STRUCTURES = {**STRUCTURES, "post_norm": POST_NORM, "grouped_queries": GROUPED_QUERIES}
WITHOUT_HEADS: dict[str, Any] = {"grains": ("depth", "tokens")}
GRAINS = {"grouped_queries": WITHOUT_HEADS}  # of structures that do not take the default ones


def vit(seed: int = 0, **settings: Any) -> Any:
    """A small backbone in eval mode with random weights. settings: of the timm class, over those of SMALL."""
    settings = {**SMALL, **settings}
    kind = VisionTransformerDistilled if settings.pop("distilled", False) else settings.pop("kind", VisionTransformer)
    return randomise(kind(**settings), seed).eval()


def randomise(backbone: Any, seed: int) -> Any:
    """Draw every parameter: gammas and norms away from 0 and 1, biases and tokens away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.uniform_(-1.7, 1.7, generator=generator)  # a variance of 1
            if parameter.ndim == 1 and name.endswith(("weight", "gamma", "gamma_1", "gamma_2")):
                parameter.mul_(0.3).add_(1)
            elif parameter.ndim == 1 or "token" in name or "pos_embed" in name or "latent" in name:
                parameter.mul_(0.5)
            else:
                parameter.mul_(parameter[0].numel() ** -0.5)
    return backbone


def pictures(backbone: nn.Module, batch: int, seed: int = 0, size: tuple[int, int] | None = None) -> Tensor:
    """Images (B, channels, H, W) that differ in more than noise: each has a colour and a contrast of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, (height, width) = backbone.in_chans, size or backbone.patch_embed.img_size
    contrast = normal(batch, 1, 1, 1).exp()
    images = normal(batch, channels, height, width) * contrast + 2 * normal(batch, channels, 1, 1)
    return images.to(next(backbone.parameters()).dtype)


def enliven(model: MIAFormer, seed: int = 0) -> MIAFormer:
    """Controllers drawn so that at a price of 1 all three grains are decided differently from image to image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for controller in model.controllers:
            bound = controller.pooled.in_features**-0.5  # as torch draws it, but by a generator of ours
            for parameter in (controller.pooled.weight, controller.pooled.bias):
                parameter.uniform_(-bound, bound, generator=generator)
            controller.pooled.weight.mul_(3)
            layers = [controller.gates, controller.price]
            if controller.rank:
                layers += [controller.query, controller.key]
            for layer in layers:
                layer.weight.normal_(std=2 * layer.in_features**-0.5, generator=generator)
            controller.gates.weight.mul_(3)
            controller.gates.bias.normal_(std=1.0, generator=generator).sub_(KEEP_LOGIT)
            controller.gates.bias[:2].add_(2.0)  # more often than not a block runs, and more than one head of it
            if controller.rank:
                controller.query.bias.normal_(std=1.0, generator=generator)
                controller.query.bias[-1].sub_(KEEP_LOGIT)
                if controller.even:
                    controller.key.weight.zero_()
    return model


def lively(seed: int = 0, settings: dict[str, Any] | None = None, **config: Any) -> MIAFormer:
    """A small adapted ViT in double precision whose decisions vary. settings: of the backbone; config: of adapt."""
    backbone = vit(seed, **{"depth": 4, "img_size": 20, **(settings or {})})
    return enliven(miaformer.adapt(backbone, **{"controller_hidden": 32, **config}), seed).double().eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a fraction of the wanted values' scale."""
    assert found.shape == wanted.shape
    if not wanted.numel():
        return 0.0
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-30))


__all__ = [
    "ALL_STRUCTURES",
    "GLU_FIRST",
    "GLU_LAST",
    "GRAINS",
    "GROUPED_QUERIES",
    "POST_NORM",
    "SMALL",
    "STRUCTURES",
    "WITHOUT_HEADS",
    "Mlp",
    "enliven",
    "lively",
    "pictures",
    "randomise",
    "relative",
    "vit",
]
