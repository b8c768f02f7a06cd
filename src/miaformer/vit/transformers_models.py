"""Which models of `transformers` can be adapted: the timm class that each becomes, and timm's names of its parameters.

To add a class, add a line to `MODELS`; to add a kind of model, a `Family`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from miaformer.vit.backbone import Backbone
from miaformer.vit.token_avg import VisionTransformerTokenAvg

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """What all classes of a kind of model have in common.

    names: patterns of parameters' names, and timm's names. All that match are replaced, in this order. Queries, keys
    and values stay apart (`attn.q`, `attn.k`, `attn.v`; joint in attention pooling: `attn_pool.qkv`).
    pictures: how published checkpoints prepare images, in timm's terms; used where no image processor is given.
    always_interpolates: position embeddings are interpolated even to the size that they are for; other models do so
    only on request.
    """

    names: Names
    pictures: Mapping[str, Any]
    always_interpolates: bool = False


@dataclass(frozen=True)
class Model:
    """A class of transformers.

    settings: of the timm class, where neither weights nor configuration tell them.
    unused: a pattern of parameters, by timm's names, that the output does not depend on.
    """

    family: Family
    timm_class: type[Backbone] = VisionTransformer
    settings: Mapping[str, Any] = field(default_factory=dict)
    unused: str = r"^(mask_token$|pooler\.)"  # masks are for pretraining; a bare model's pooler is not part of the ViT


# Families -------------------------------------------------------------------------------------------------------------

# Of version 5, and of version 4, which files keep.
_VIT_NAMES: Names = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.", ""),
    (r"^patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^position_embeddings$", "pos_embed"),
    (r"^distillation_token$", "dist_token"),
    (r"^register_tokens$", "reg_token"),
    (r"^(layers|encoder\.layer)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(q_proj|attention\.query)\.", ".attn.q."),
    (r"\.attention\.(k_proj|attention\.key)\.", ".attn.k."),
    (r"\.attention\.(v_proj|attention\.value)\.", ".attn.v."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_DINOV3_NAMES: Names = (
    (r"^embeddings\.", ""),
    (r"^patch_embeddings\.", "patch_embed.proj."),
    (r"^register_tokens$", "reg_token"),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),  # of plain MLPs too
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
)
_CLIP_NAMES: Names = (
    (r"^vision_model\.", ""),
    (r"^embeddings\.", ""),
    (r"^patch_embedding\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^(classifier|visual_projection)\.", "head."),
)

_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0, "crop_mode": "squash"}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_DINOV2_PICTURES = {**_IMAGENET, "interpolation": "bicubic", "crop_pct": 224 / 256, "crop_mode": "center"}

VIT = Family(_VIT_NAMES, {**_HALF, "interpolation": "bilinear"})
DEIT = Family(_VIT_NAMES, {**_DINOV2_PICTURES, "crop_mode": "squash"})
DINOV2 = Family(_VIT_NAMES, _DINOV2_PICTURES, always_interpolates=True)
DINOV3 = Family(_DINOV3_NAMES, {**_IMAGENET, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"})
CLIP = Family(
    _CLIP_NAMES,
    {
        "mean": OPENAI_CLIP_MEAN,
        "std": OPENAI_CLIP_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
)
SIGLIP = Family(_CLIP_NAMES, {**_HALF, "interpolation": "bicubic"})


# Models ---------------------------------------------------------------------------------------------------------------

_OF_REGISTERS = {
    "no_embed_class": True
}  # as in timm, prefix tokens get no positions: the class token has its own added
_ROTARY = {
    "global_pool": "token",
    "use_fc_norm": False,
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
}

# Those without a classifier get num_classes=0, and give the pooled output.
MODELS: dict[str, Model] = {
    "ViTModel": Model(VIT),
    "ViTForImageClassification": Model(VIT),
    "DeiTModel": Model(DEIT),
    "DeiTForImageClassification": Model(DEIT),  # the distillation token is there, and nothing reads it
    "DeiTForImageClassificationWithTeacher": Model(DEIT, VisionTransformerDistilled),
    "Dinov2Model": Model(DINOV2),
    "Dinov2ForImageClassification": Model(DINOV2, VisionTransformerTokenAvg),
    "Dinov2WithRegistersModel": Model(DINOV2, settings=_OF_REGISTERS),
    "Dinov2WithRegistersForImageClassification": Model(DINOV2, VisionTransformerTokenAvg, _OF_REGISTERS),
    "DINOv3ViTModel": Model(DINOV3, Eva, _ROTARY),
    "CLIPVisionModel": Model(CLIP),
    "CLIPVisionModelWithProjection": Model(CLIP),  # the projection is the head
    "CLIPForImageClassification": Model(  # averages patches that were not normed
        CLIP, settings={"global_pool": "avg", "final_norm": False}, unused=r"^norm\."
    ),
    "SiglipVisionModel": Model(SIGLIP),
    "SiglipForImageClassification": Model(SIGLIP, unused=r"^attn_pool\."),
}

_TWO_TOWERS = "has a tower for text beside that for images: give the latter, model.vision_model"
_NAFLEX = (
    "takes flattened patches of grids of any shape (NaFlex). Checkpoints of SigLIP 2 with a fixed resolution, such as "
    "google/siglip2-base-patch16-224, can be adapted: transformers loads them as SiglipModel; give its vision_model"
)
# Models that are not taken, and the nearest that are.
INSTEAD: dict[str, str] = {
    "CLIPModel": f"{_TWO_TOWERS}, or load CLIPVisionModelWithProjection to keep the projection",
    "SiglipModel": _TWO_TOWERS,
    "Siglip2Model": _NAFLEX,
    "Siglip2VisionModel": _NAFLEX,
    "Siglip2ForImageClassification": _NAFLEX,
}
