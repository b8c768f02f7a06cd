"""ViTs, DeiTs and DINOv2s of `transformers`, as the timm model of the same function: what `adapt` does with them.

transformers is never imported: who has a model of its has imported it. Tried with version 5.24; the names of weights of
version 4, which are also those in files, are known too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GELU, GELUTanh, LayerNorm, Mlp, QuickGELU, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from miaformer.vit.token_avg import VisionTransformerTokenAvg

# What each model becomes. Those without a classifier become ones with num_classes=0, whose output is the class token.
MODELS: dict[str, type[VisionTransformer]] = {
    "ViTModel": VisionTransformer,
    "ViTForImageClassification": VisionTransformer,
    "DeiTModel": VisionTransformer,
    "DeiTForImageClassification": VisionTransformer,  # the distillation token is there, and nothing reads it
    "DeiTForImageClassificationWithTeacher": VisionTransformerDistilled,
    "Dinov2Model": VisionTransformer,
    "Dinov2ForImageClassification": VisionTransformerTokenAvg,
    "Dinov2WithRegistersModel": VisionTransformer,
    "Dinov2WithRegistersForImageClassification": VisionTransformerTokenAvg,
}

# Parameters' names, in version 5 or 4, and timm's: all that are found are replaced, in this order.
NAMES = (
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
LEFT_OUT = r"^(mask_token$|pooler\.)"  # masks are for pretraining; a bare model's pooler is none of the ViT

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_new": GELUTanh,
    "gelu_fast": GELUTanh,
    "gelu_accurate": GELUTanh,
    "gelu_pytorch_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}

# How pictures are prepared where no image processor says it: as for the published checkpoints of each kind.
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic"}
PICTURES: dict[str, dict[str, Any]] = {
    "vit": {"mean": _HALF, "std": _HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "deit": {**_IMAGENET, "crop_pct": 224 / 256, "crop_mode": "squash"},
    "dinov2": {**_IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center"},
    "dinov2_with_registers": {**_IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center"},
}


# Of an image processor's settings those that say what a picture becomes, and how far answers to them may be apart, as
# a fraction of their range: filters that round differently are 0.01 apart, a row of pixels more or less 0.06.
_PREPARATION = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size", "resample")
_SAME_PICTURE = 0.03


def is_of_transformers(model: Any) -> bool:
    return type(model).__module__.partition(".")[0] == "transformers"


def to_timm(model: Any, image_processor: Any = None) -> VisionTransformer:
    """A copy of a transformers model's weights in the timm ViT of the same function, for images of one size.

    That size is the one that `image_processor` gives pictures, else that of the model's configuration; position
    embeddings are interpolated to it by the model's own method. Class names and the preparation of pictures become
    `pretrained_cfg`. Rates of dropping become timm's nearest.

    Raises TypeError for a model that is none of `MODELS`, ValueError naming the setting that timm's ViT has not.
    """
    name = type(model).__name__
    if name not in MODELS:
        raise TypeError(f"adapt() does not know transformers' {name}; it takes {', '.join(MODELS)}")
    config = model.config
    _check(config, name)
    size, pictures = _pair(config.image_size), PICTURES[config.model_type]
    if image_processor is not None:
        size, pictures = _processing(image_processor)
    state = _state(model, MODELS[name], size)
    depth = config.num_hidden_layers
    gated = "blocks.0.mlp.fc1_g.weight" in state
    dim, in_chans, *patch_size = state["patch_embed.proj.weight"].shape
    num_classes = len(state["head.bias"]) if "head.bias" in state else 0
    vit = MODELS[name](
        img_size=size,
        patch_size=tuple(patch_size),  # type: ignore[arg-type]
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=config.num_attention_heads,
        mlp_ratio=(state["blocks.0.mlp.fc2.weight"].shape[1] + 0.5) / dim if depth else 4.0,  # timm rounds down
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        reg_tokens=state["reg_token"].shape[1] if "reg_token" in state else 0,
        no_embed_class=_positions_of_patches_alone(config),
        pos_drop_rate=config.hidden_dropout_prob,
        proj_drop_rate=config.hidden_dropout_prob,
        attn_drop_rate=config.attention_probs_dropout_prob,
        drop_path_rate=getattr(config, "drop_path_rate", 0.0),
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        act_layer=nn.SiLU if gated else ACTIVATIONS[config.hidden_act],
        mlp_layer=SwiGLU if gated else Mlp,
        weight_init="skip",
    )
    _load(vit, state, name)
    cfg = {**pictures, "input_size": (in_chans, *size), "num_classes": num_classes}
    label_names = _label_names(config, num_classes)
    if label_names is not None:
        cfg["label_names"] = label_names
    vit.pretrained_cfg = vit.default_cfg = cfg  # type: ignore[assignment]
    return vit.train(model.training)


def _check(config: Any, name: str) -> None:
    heads, dim = config.num_attention_heads, config.hidden_size
    if dim % heads or getattr(config, "head_dim", None) not in (None, dim // heads):
        raise ValueError(
            f"{name} has hidden_size={dim}, num_attention_heads={heads} and "
            f"head_dim={getattr(config, 'head_dim', None)}: timm's ViT has hidden_size / num_attention_heads channels "
            "a head"
        )
    if config.hidden_act not in ACTIVATIONS and not getattr(config, "use_swiglu_ffn", False):
        raise ValueError(f"{name} has hidden_act={config.hidden_act!r}; adapt() knows {', '.join(ACTIVATIONS)}")


# Weights -------------------------------------------------------------------------------------------------------------


def _state(model: Any, timm_class: type[VisionTransformer], size: tuple[int, int]) -> dict[str, Tensor]:
    """The parameters by timm's names."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if not re.search(LEFT_OUT, name) and tensor.numel():  # there may be zero registers
            state[name] = tensor
    for name in [name for name in state if ".mlp.weights_in." in name]:  # version 4's SwiGLU
        gate, value = state.pop(name).chunk(2)
        state |= {name.replace("weights_in", "fc1_g"): gate, name.replace("weights_in", "fc1_x"): value}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    state["pos_embed"] = _positions(model, size)
    if "dist_token" in state and timm_class is not VisionTransformerDistilled:
        state["reg_token"] = state.pop("dist_token")
    if _positions_of_patches_alone(model.config):
        first, state["pos_embed"] = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], dim=1)
        state["cls_token"] = state["cls_token"] + first
    return state


def _positions_of_patches_alone(config: Any) -> bool:
    """Whether, as in timm, position embeddings leave prefix tokens out: registers have none, the class token does."""
    return bool(config.model_type == "dinov2_with_registers")


def _positions(model: Any, size: tuple[int, int]) -> Tensor:
    """Position embeddings (1, P + patches, C) for images of this size (H, W).

    Raises ValueError where the model cannot interpolate to it.
    """
    config, embeddings = model.config, model.base_model.embeddings
    table: Tensor = embeddings.position_embeddings
    always = config.model_type.startswith("dinov2")  # ViT and DeiT do it only when asked to
    if size == _pair(config.image_size) and not always:
        return table.detach()
    patch = _pair(config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    prefix = 2 if config.model_type == "deit" else 1
    tokens = table.new_zeros(()).expand(1, prefix + patches, table.shape[2])
    try:
        with torch.no_grad():
            positions: Tensor = embeddings.interpolate_pos_encoding(tokens, *size)
    except (RuntimeError, TypeError) as error:  # transformers' own limits: square grids, patch sizes that are numbers
        raise ValueError(
            f"{type(model).__name__} cannot interpolate its position embeddings, for images of "
            f"{' x '.join(map(str, _pair(config.image_size)))}, to images of {size[0]} x {size[1]}: {error}"
        ) from error
    return positions.detach()


def _load(vit: VisionTransformer, state: dict[str, Tensor], name: str) -> None:
    found, wanted = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (state, vit.state_dict()))
    if found != wanted:
        odd = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise ValueError(f"{name} has parameters that a timm ViT of its settings has not: {', '.join(odd[:5])}")
    like = state["patch_embed.proj.weight"]
    vit.to(like.device, like.dtype).load_state_dict(state)


# Pictures and names --------------------------------------------------------------------------------------------------


def _pair(size: Any) -> tuple[int, int]:
    """(H, W) of a number or of two."""
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _processing(image_processor: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """The size (H, W) of the pictures that an image processor gives, and timm's configuration for preparing them.

    Raises TypeError for what is none, ValueError for one that does not say the size of its pictures, or whose pictures
    timm's transforms do not give.
    """
    if not hasattr(image_processor, "to_dict"):
        raise TypeError(
            f"image_processor is a {type(image_processor).__name__}; give what transformers' "
            "AutoImageProcessor.from_pretrained gives"
        )
    settings = image_processor.to_dict()
    resized = settings.get("size") if settings.get("do_resize", True) else None
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    no_size = f"image_processor gives pictures no size that is known before: size={resized}, crop_size={cropped}"
    try:
        size = _pair(cropped or resized)
        edge = _pair(resized or cropped)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(no_size) from error
    if not cropped and isinstance(resized, Mapping) and "height" not in resized:
        raise ValueError(no_size)
    squashes = isinstance(resized, Mapping) and "height" in resized
    # Channels v from 0 to 255 become (v * factor - mean) / std; timm says the same of v / 255.
    factor = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0)
    normalises = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normalises else ((0.0,) * 3, (1.0,) * 3)
    resample = settings.get("resample", Image.Resampling.BILINEAR)
    name = resample.name if hasattr(resample, "name") else Image.Resampling(resample).name
    pictures = {
        "mean": tuple(value / factor for value in mean),
        "std": tuple(value / factor for value in std),
        "interpolation": name.lower(),
        "crop_pct": _crop_pct(size[0], edge[0]),
        "crop_mode": "squash" if squashes else "center",
    }
    _check_pictures(image_processor, size, pictures, settings)
    return size, pictures


def _check_pictures(
    image_processor: Any, size: tuple[int, int], pictures: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise ValueError where timm's transforms prepare pictures otherwise than the processor does."""
    from miaformer.data.transforms import build_transform

    transform = build_transform({**pictures, "input_size": (3, *size)})
    height, width = size
    for shape in ((2 * height, 3 * width), (3 * height, 2 * width), size):
        # Smooth: filters of resizing differ, in what they round and in where they end.
        small = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(small, shape, mode="bicubic", align_corners=False).clamp(0, 1)
        picture = Image.fromarray((255 * smooth[0].permute(1, 2, 0)).round().to(torch.uint8).numpy())
        wanted = image_processor(picture, return_tensors="pt")["pixel_values"][0]
        found = transform(picture)
        apart = (found - wanted).abs().max() if found.shape == wanted.shape else torch.tensor(float("inf"))
        if apart > _SAME_PICTURE * (wanted.max() - wanted.min()):
            told = {name: settings[name] for name in _PREPARATION if name in settings}
            raise ValueError(
                f"image_processor prepares pictures as timm's transforms do not: of {shape[1]} x {shape[0]} pixels "
                f"its answer has shape {tuple(wanted.shape)}, ours {tuple(found.shape)}, and values are "
                f"{float(apart):.2g} apart. Its settings: {told}. Prepare pictures by yourself, and adapt the model "
                "without image_processor"
            )


def _crop_pct(size: int, resized: int) -> float:
    """A fraction that timm, which rounds size / crop_pct down, gets `resized` back from."""
    fraction = size / resized
    return fraction if math.floor(size / fraction) == resized else math.nextafter(fraction, 0)


def _label_names(config: Any, num_classes: int) -> list[str] | None:
    """`id2label` in the order of labels; None where nobody gave names."""
    names: dict[int, str] = config.id2label
    placeholders = {label: f"LABEL_{label}" for label in range(num_classes)}
    if names.keys() != placeholders.keys() or names == placeholders:
        return None
    return [names[label] for label in range(num_classes)]
