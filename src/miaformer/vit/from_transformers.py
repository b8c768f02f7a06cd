"""Vision models of `transformers` as the timm model of the same function: what `adapt` does with them.

transformers is never imported: a caller who has one of its models has imported it. Tried with version 5.24; version 4's
names of weights, which are also those in files, are known too.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from timm.layers import GELU, GELUTanh, LayerNorm, Mlp, QuickGELU, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn

from miaformer.vit.backbone import Backbone
from miaformer.vit.image_processor import height_and_width, preparation
from miaformer.vit.transformers_models import INSTEAD, MODELS, Model

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


def is_of_transformers(model: Any) -> bool:
    return type(model).__module__.partition(".")[0] == "transformers"


def to_timm(model: Any, image_processor: Any = None) -> Backbone:
    """A copy of a transformers model's weights in the timm model of the same function.

    Its output is the logits of a classifier, the image embeddings of a projection, or else the pooled features. It
    takes images of one size, which `image_processor` or else the model's configuration gives; position embeddings are
    interpolated to it by the model's own method. With rotary positions it takes any whole number of patches. Class
    names and the preparation of pictures become `pretrained_cfg`. Rates of dropping become timm's nearest. Layers that
    have no bias, and always have one in timm, get one of zeros.

    Raises TypeError for a class that is not in `MODELS`, ValueError naming the setting that timm's model has not.
    """
    name = type(model).__name__
    if name in INSTEAD:
        raise TypeError(f"adapt() does not take transformers' {name}: it {INSTEAD[name]}")
    if name not in MODELS:
        raise TypeError(f"adapt() does not know transformers' {name}; it takes {', '.join(MODELS)}")
    kind, config = MODELS[name], _vision_config(model)
    _check_heads(config, name)
    size, pictures = height_and_width(config.image_size), kind.family.pictures
    if image_processor is not None:
        size, pictures = preparation(image_processor)
    state = _state(model, kind, size)
    family_settings = _eva_settings if kind.timm_class is Eva else _vit_settings
    settings = {**_settings(state, config, size), **family_settings(state, config, name), **kind.settings}
    vit = kind.timm_class(**settings)
    _load(vit, state, name)
    cfg = {**pictures, "input_size": (vit.in_chans, *size), "num_classes": vit.num_classes}
    label_names = _label_names(model.config, vit.num_classes)
    if label_names is not None:
        cfg["label_names"] = label_names
    vit.pretrained_cfg = vit.default_cfg = cfg  # type: ignore[assignment]
    return vit.train(model.training)


def _vision_config(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _check_heads(config: Any, name: str) -> None:
    heads, dim = config.num_attention_heads, config.hidden_size
    if dim % heads or getattr(config, "head_dim", None) not in (None, dim // heads):
        raise ValueError(
            f"{name} has hidden_size={dim}, num_attention_heads={heads} and "
            f"head_dim={getattr(config, 'head_dim', None)}: timm's ViT has hidden_size / num_attention_heads channels "
            "a head"
        )


def _label_names(config: Any, num_classes: int) -> list[str] | None:
    """`id2label` in the order of labels; None where nobody gave names."""
    names: dict[int, str] = config.id2label
    placeholders = {label: f"LABEL_{label}" for label in range(num_classes)}
    if names.keys() != placeholders.keys() or names == placeholders:
        return None
    return [names[label] for label in range(num_classes)]


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(state: dict[str, Tensor], config: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Those that timm's classes share. state: parameters by timm's names; size: (H, W) of images."""
    dim, in_chans, *patch_size = state["patch_embed.proj.weight"].shape
    depth = config.num_hidden_layers
    dropout = getattr(config, "hidden_dropout_prob", 0.0)
    attention_dropout = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
    whole_patches = not any(side % patch for side, patch in zip(size, patch_size, strict=True))
    return {
        "img_size": size,
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (state["blocks.0.mlp.fc2.weight"].shape[1] + 0.5) / dim if depth else 4.0,  # timm rounds down
        "init_values": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & state.keys() else None,
        "class_token": "cls_token" in state,
        "dynamic_img_size": "pos_embed" not in state and whole_patches,
        "pos_drop_rate": dropout,
        "proj_drop_rate": dropout,
        "attn_drop_rate": attention_dropout,
        "drop_path_rate": getattr(config, "drop_path_rate", 0.0),
        "norm_layer": partial(LayerNorm, eps=config.layer_norm_eps),
    }


def _vit_settings(state: dict[str, Tensor], config: Any, name: str) -> dict[str, Any]:
    """Those of `VisionTransformer`. Raises ValueError for an activation that is not known."""
    gated = "blocks.0.mlp.fc1_g.weight" in state
    if not gated and config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{name} has hidden_act={config.hidden_act!r}; adapt() knows {', '.join(ACTIVATIONS)}")
    settings = {
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "pre_norm": "norm_pre.weight" in state,
        "act_layer": nn.SiLU if gated else ACTIVATIONS[config.hidden_act],
        "mlp_layer": SwiGLU if gated else Mlp,
        "weight_init": "skip",
    }
    if "attn_pool.latent" in state:
        settings["global_pool"] = "map"
    elif "cls_token" not in state:
        settings |= {"global_pool": "avg", "fc_norm": False}
    return settings


def _eva_settings(state: dict[str, Tensor], config: Any, name: str) -> dict[str, Any]:
    """Those of `Eva`. Raises ValueError for an activation that it has not."""
    gated = "blocks.0.mlp.fc1_g.weight" in state
    if ACTIVATIONS.get(config.hidden_act) is not (nn.SiLU if gated else GELU):
        raise ValueError(
            f"{name} has hidden_act={config.hidden_act!r} and use_gated_mlp={gated}; timm's Eva has 'gelu' in plain "
            "MLPs and 'silu' in gated ones"
        )
    has_key_bias = "blocks.0.attn.qkv.bias" in state
    return {
        "qkv_bias": has_key_bias or "blocks.0.attn.q_bias" in state,
        "attn_type": "rope" if has_key_bias else "eva",
        "num_reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "swiglu_mlp": gated,
        "swiglu_align_to": int(gated),  # any number makes the gate a layer of its own, 1 leaves its width
        "rope_temperature": config.rope_theta,
        "rope_shift_coords": config.pos_embed_shift,
        "rope_jitter_coords": config.pos_embed_jitter,
        "rope_rescale_coords": config.pos_embed_rescale,
    }


# Weights --------------------------------------------------------------------------------------------------------------


def _state(model: Any, kind: Model, size: tuple[int, int]) -> dict[str, Tensor]:
    """The parameters by timm's names; position embeddings are for images of `size` (H, W)."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in kind.family.names:
            name = re.sub(pattern, replacement, name)
        if not re.search(kind.unused, name) and tensor.numel():  # there may be zero registers
            state[name] = tensor
    _name_mlp_inputs(state)
    _join_attention(state, kind.timm_class)
    _place_tokens(state, model, kind, size)
    return state


def _name_mlp_inputs(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".mlp.weights_in." in name]:  # version 4's SwiGLU
        gate, value = state.pop(name).chunk(2)
        state |= {name.replace("weights_in", "fc1_g"): gate, name.replace("weights_in", "fc1_x"): value}
    for name in [name for name in state if ".mlp.fc1_x." in name]:
        if name.replace("fc1_x", "fc1_g") not in state:  # DINOv3 calls a plain MLP's input as it calls a gated one's
            state[name.replace("fc1_x", "fc1")] = state.pop(name)


def _join_attention(state: dict[str, Tensor], timm_class: type[Backbone]) -> None:
    """Queries, keys and values as timm has them: joint in blocks; keys and values alone in attention pooling."""
    for attn in [name.removesuffix("q.weight") for name in state if name.endswith(".attn.q.weight")]:
        weights = [state.pop(f"{attn}{part}.weight") for part in "qkv"]
        state[f"{attn}qkv.weight"] = torch.cat(weights)
        biases = [state.pop(f"{attn}{part}.bias", None) for part in "qkv"]
        if all(bias is None for bias in biases):
            continue
        filled = [torch.zeros_like(weights[0][:, 0]) if bias is None else bias for bias in biases]
        if timm_class is Eva and biases[1] is None:
            state[f"{attn}q_bias"], _, state[f"{attn}v_bias"] = filled
        else:
            state[f"{attn}qkv.bias"] = torch.cat(filled)
    for name in [name for name in state if name.startswith("attn_pool.qkv.")]:
        queries, *keys_values = state.pop(name).chunk(3)
        state[name.replace("qkv", "q")], state[name.replace("qkv", "kv")] = queries, torch.cat(keys_values)


def _place_tokens(state: dict[str, Tensor], model: Any, kind: Model, size: tuple[int, int]) -> None:
    """Prefix tokens and position embeddings as timm has them, for images of `size` (H, W)."""
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in state:
        prefix = sum(name in state for name in ("cls_token", "dist_token"))
        state["pos_embed"] = _positions(model, kind, state["pos_embed"], prefix, size)
        if kind.settings.get("no_embed_class"):
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
    if "dist_token" in state and kind.timm_class is not VisionTransformerDistilled:
        state["reg_token"] = state.pop("dist_token")


def _positions(model: Any, kind: Model, table: Tensor, prefix: int, size: tuple[int, int]) -> Tensor:
    """Position embeddings (1, P + patches, C) for images of `size` (H, W).

    table: ([1,] P + patches, C), for images of the configured size; prefix: P, how many tokens beside patches have one.

    Raises ValueError where the model cannot interpolate to that size.
    """
    config = _vision_config(model)
    table = table.reshape(1, -1, table.shape[-1])
    configured = height_and_width(config.image_size)
    if size == configured and not kind.family.always_interpolates:
        return table
    patch = height_and_width(config.patch_size)
    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    tokens = table.new_zeros(()).expand(1, prefix + patches, table.shape[2])
    embeddings = getattr(model, "vision_model", model.base_model).embeddings
    try:
        with torch.no_grad():
            positions: Tensor = embeddings.interpolate_pos_encoding(tokens, *size)
    except (RuntimeError, TypeError) as error:  # transformers' own limits: square grids, patch sizes that are numbers
        raise ValueError(
            f"{type(model).__name__} cannot interpolate its position embeddings, for images of "
            f"{' x '.join(map(str, configured))}, to images of {size[0]} x {size[1]}: {error}"
        ) from error
    return positions.detach()


def _load(vit: Backbone, state: dict[str, Tensor], name: str) -> None:
    """Copy the parameters. Biases that `state` lacks become 0.

    Raises ValueError naming the others that only one of the two has, or has in another shape.
    """
    wanted = vit.state_dict()
    for key in wanted.keys() - state.keys():
        if key.endswith(".bias") and f"{key.removesuffix('bias')}weight" in state:
            state[key] = torch.zeros_like(wanted[key])
    shapes, wanted_shapes = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (state, wanted))
    if shapes != wanted_shapes:
        odd = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted_shapes.get(k))
        raise ValueError(f"{name} has parameters that a timm ViT of its settings has not: {', '.join(odd[:5])}")
    like = state["patch_embed.proj.weight"]
    vit.to(like.device, like.dtype).load_state_dict(state)
