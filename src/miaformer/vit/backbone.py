"""The static ViT: which timm models are supported, how to write one down, and how to build it again."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import timm
import timm.layers
import torch
from timm.layers import Attention, AttentionPoolLatent, GluMlp, LayerScale, Mlp, PatchEmbed, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from miaformer.vit import eva
from miaformer.vit.layers import (
    attention_scale,
    input_layers,
    mlp_inputs,
    mlp_scale,
    query_key_value_inputs,
    query_key_value_layers,
    shares_keys,
)
from miaformer.vit.stem import ConvPatchEmbed, ConvStem
from miaformer.vit.token_avg import VisionTransformerTokenAvg

Backbone = VisionTransformer | Eva
CLASSES: dict[str, type[Backbone]] = {
    kind.__name__: kind for kind in (VisionTransformer, VisionTransformerDistilled, VisionTransformerTokenAvg, Eva)
}
MLPS = {layer.__name__: layer for layer in (Mlp, SwiGLU, GluMlp)}
SUPPORTED = (
    "Block + Attention, or EvaBlock + EvaAttention or AttentionRope, and Mlp (or SwiGLU, GluMlp), with LayerNorm or "
    "RmsNorm, as in timm's VisionTransformer and Eva"
)


def transformer_blocks(backbone: nn.Module) -> list[Any]:
    """The blocks, as what they are: timm's `Block`, whose parts torch types as "tensor or module"."""
    return list(backbone.blocks)  # type: ignore[arg-type]


def check_supported(backbone: nn.Module) -> Backbone:
    """The backbone, if it is a ViT that can be adapted.

    Raises TypeError for what is no timm ViT, ValueError naming the part of it that is not supported.
    """
    if type(backbone) not in CLASSES.values():
        raise TypeError(
            "adapt() takes a timm VisionTransformer, VisionTransformerDistilled or Eva, or a ViT, DeiT, DINOv2, "
            f"DINOv3, CLIP or SigLIP of transformers, got {type(backbone).__name__}. " + _instead_of(backbone)
        )
    if not transformer_blocks(backbone):
        raise ValueError("adapt() needs a backbone with at least one block, this one has none")
    if problem := eva.unsupported(backbone) if isinstance(backbone, Eva) else None:
        raise ValueError(f"The backbone has {problem}, which is not supported")
    for index, block in enumerate(transformer_blocks(backbone)):
        problem = _unsupported(block)
        if problem:
            raise ValueError(
                f"Block {index} of the backbone has {problem}, which is not supported. Supported: {SUPPORTED}"
            )
    for name, value in backbone.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The backbone's {name} is no tensor but a {type(value).__name__}, as in quantised layers: adapt it "
                "first, quantise then"
            )
    if shared := _shared(backbone):
        raise ValueError(
            f"The backbone has one weight in two places, {' and '.join(shared)}: give each a copy of its own"
        )
    if len({(block.attn.num_heads, block.attn.head_dim) for block in transformer_blocks(backbone)}) > 1:
        raise ValueError("All blocks must have the same number of heads and channels a head")
    if type(backbone.patch_embed) not in (PatchEmbed, ConvPatchEmbed):
        raise ValueError(
            f"The backbone's patch embedding is {type(backbone.patch_embed).__name__}, supported: PatchEmbed, or our "
            "ConvPatchEmbed"
        )
    return cast(Backbone, backbone)


def _instead_of(model: nn.Module) -> str:
    """The nearest thing to the model that can be adapted."""
    if type(model).__module__.startswith("open_clip"):
        parts = {name for name, _ in model.named_modules()}
        for tower in parts & {"trunk", "visual.trunk"}:
            return f"It is open_clip's: give its timm model, {tower}"
        return "It is open_clip's own: load it from transformers instead, as CLIPVisionModelWithProjection"
    return "Create one with timm.create_model, e.g. 'deit_small_patch16_224'"


def _shared(backbone: nn.Module) -> list[str]:
    """The names of a parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return next((found for found in names.values() if len(found) > 1), [])


def learning(backbone: Backbone) -> Backbone:
    """The same, with tensors that were made in inference mode, and can never learn, replaced by copies."""
    for module in backbone.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    copy = tensor.clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy  # type: ignore[assignment]
    return backbone


def _unsupported(block: Any) -> str | None:
    if type(block) not in (Block, *eva.BLOCKS):
        return f"type {type(block).__name__}"
    if type(block.attn) not in ((Attention,) if type(block) is Block else eva.ATTENTIONS):
        return f"attention {type(block.attn).__name__}"
    if block.attn.gate is not None:
        return "gated attention"
    if type(block.mlp).__name__ not in MLPS or isinstance(getattr(block.mlp, "fc1", None), nn.Conv2d):
        return f"MLP {type(block.mlp).__name__}"
    for part in (block, block.attn, block.mlp):
        if "forward" in part.__dict__:
            return f"a {type(part).__name__} with a forward() of its own"
    for layer in (*query_key_value_inputs(block.attn), block.attn.proj, block.mlp.fc2):
        if not all(hasattr(layer, name) for name in ("in_features", "out_features", "bias")):
            return f"a layer {type(layer).__name__} that does not tell its size"
    for norm in (block.attn.norm, block.mlp.norm):
        if not isinstance(norm, nn.Identity | nn.LayerNorm | RmsNorm):
            return f"norm {type(norm).__name__} over a width that shrinks"
    for scale in (getattr(block, "ls1", None), getattr(block, "ls2", None)):
        if not isinstance(scale, nn.Identity | LayerScale | None):
            return f"layer scale {type(scale).__name__}"
    return None


def image_size(backbone: Backbone) -> tuple[int, int]:
    """(H, W) of the images that the backbone was made for."""
    size = backbone.patch_embed.img_size
    if size is None:
        size = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return int(size[0]), int(size[1])


def check_images(images: Any, backbone: Backbone, name: str = "images") -> Tensor:
    """The images, if the backbone can take them: (B, channels, H, W), floating point, finite.

    Raises TypeError or ValueError naming what is wrong, and what would be right.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor (B, {backbone.in_chans}, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != backbone.in_chans:
        raise ValueError(f"{name} must have shape (B, {backbone.in_chans}, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point, normalised as the backbone expects, got {images.dtype}")
    wanted_dtype = backbone.patch_embed.proj.weight.dtype
    if images.dtype != wanted_dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"{name} are {images.dtype}, the model's weights {wanted_dtype}: convert one of them")
    height, width = images.shape[-2:]
    patch = backbone.patch_embed.patch_size
    if not backbone.dynamic_img_size:
        if (height, width) != image_size(backbone):
            wanted = " x ".join(map(str, image_size(backbone)))
            raise ValueError(f"{name} are {height} x {width}, this backbone takes {wanted} (or dynamic_img_size=True)")
    elif not backbone.patch_embed.dynamic_img_pad and (height % patch[0] or width % patch[1]):
        raise ValueError(f"{name} are {height} x {width}, not a multiple of the patch size {patch[0]} x {patch[1]}")
    if images.device.type != "meta" and not _finite(images):
        bad = (~images.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"{name} {bad[:8]} of the batch hold NaN or infinite values")
    return images


def _finite(images: Tensor) -> bool:
    # A sum takes a tenth of the time of a test of every pixel, and shows any NaN or infinity. It may overflow, too.
    if images.device.type == "cpu" and images.dtype == torch.float32:  # numpy's, after which no threads spin
        pixels = images.detach().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(pixels.sum())) or bool(np.isfinite(pixels).all())
    return bool(images.sum().isfinite()) or bool(images.isfinite().all())


def describe(backbone: Backbone) -> dict[str, Any]:
    """Constructor arguments, as JSON knows them, that `build` makes an equally shaped backbone from.

    Read off the module itself, not off how it was made, so that fine-tuned, resized and hand-built ones work.
    """
    block, first = transformer_blocks(backbone)[-1], transformer_blocks(backbone)[0]
    attn, embed = first.attn, backbone.patch_embed
    of_family = eva.described(backbone) if isinstance(backbone, Eva) else _described_vit(backbone)
    return {
        "class": type(backbone).__name__,
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": backbone.in_chans,
        "num_classes": backbone.num_classes,
        "global_pool": backbone.global_pool,
        "embed_dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "num_heads": attn.num_heads,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "class_token": backbone.cls_token is not None,
        "no_embed_class": backbone.no_embed_class,
        "dynamic_img_size": backbone.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": backbone.head_drop.p,
        "pos_drop_rate": backbone.pos_drop.p,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(block.drop_path1, "drop_prob", 0.0) or 0.0,
        "norm_layer": _described_norm(first.norm1),
        **of_family,
    }


def _described_vit(backbone: Any) -> dict[str, Any]:
    """Settings of `VisionTransformer` that `Eva` has not, or calls otherwise."""
    first, embed, identity = transformer_blocks(backbone)[0], backbone.patch_embed, nn.Identity
    attn, mlp = first.attn, first.mlp
    description = {
        "mlp_ratio": (input_layers(mlp)[0].out_features + 0.5) / backbone.embed_dim,  # timm rounds down
        "qkv_bias": attn.qkv.bias is not None,
        "scale_attn_norm": not isinstance(attn.norm, identity),
        "scale_mlp_norm": not isinstance(mlp.norm, identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": None if isinstance(first.ls1, identity) else 1e-5,
        "pos_embed": "none" if backbone.pos_embed is None else "learn",
        "reg_tokens": backbone.num_reg_tokens,
        "pre_norm": not isinstance(backbone.norm_pre, identity),
        "final_norm": not (isinstance(backbone.norm, identity) and isinstance(backbone.fc_norm, identity)),
        "fc_norm": not isinstance(backbone.fc_norm, identity),
        "pool_include_prefix": backbone.pool_include_prefix,
        "patch_drop_rate": getattr(backbone.patch_drop, "prob", 0.0),
        "act_layer": "GELUTanh" if getattr(mlp.act, "approximate", "none") == "tanh" else type(mlp.act).__name__,
        "mlp_layer": type(mlp).__name__,
        "gate_last": getattr(mlp, "gate_last", None),
    }
    if not isinstance(embed.norm, identity):
        description["embed_norm_layer"] = _described_norm(embed.norm)
    if isinstance(embed.proj, ConvStem):
        description["stem_channels"] = list(embed.proj.channels)
    return description


def _described_norm(norm: Any) -> list[Any]:
    return [type(norm).__name__, norm.eps]


def _norm_layer(description: list[Any]) -> Any:
    name, eps = description
    return partial(_named_layer(name), eps=eps)


def build(description: dict[str, Any]) -> Backbone:
    """A backbone of the shape described, its weights not initialised to anything in particular."""
    args = dict(description)
    model_class: Any = CLASSES[args.pop("class")]
    norms = {name: _norm_layer(args.pop(name)) for name in ("norm_layer", "embed_norm_layer") if name in description}
    if model_class is Eva:
        return Eva(**args, **norms)
    mlp_layer: Any = MLPS[args.pop("mlp_layer")]
    if "stem_channels" in args:
        args["embed_layer"] = partial(ConvPatchEmbed, stem_channels=args.pop("stem_channels"))
    gate_last = args.pop("gate_last")
    if gate_last is not None:
        mlp_layer = partial(mlp_layer, gate_last=gate_last)
    act_layer = _named_layer(args.pop("act_layer"))
    # Drawing weights takes longer than all else, most of all on the meta device.
    model: VisionTransformer = model_class(
        **args, **norms, act_layer=act_layer, mlp_layer=mlp_layer, weight_init="skip"
    )
    return model


def rebuild(description: Any) -> Backbone:
    """The same of a description that was read from a file, and may lack something.

    Raises KeyError, TypeError or ValueError naming what is missing, unknown or out of range.
    """
    if not isinstance(description, dict):
        raise TypeError(f"the backbone's settings must be an object, not {description!r}")
    try:
        backbone = build(description)
    except AssertionError as error:  # how timm says that settings do not fit each other
        raise ValueError(f"no ViT has these settings: {error}") from error
    for name in describe(backbone):  # timm would have put its default
        description[name]
    return backbone


def build_on_meta(description: dict[str, Any]) -> Backbone:
    """The same without any memory for weights: for shapes, and for counting."""
    with torch.device("meta"):
        return build(description)


def check_known(name: str) -> None:
    """Raise ValueError unless timm has a model of this name."""
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}; timm.list_models('vit*') lists its ViTs")


def check_describes(description: dict[str, Any], backbone: nn.Module) -> Backbone:
    """Raise ValueError unless `build` gives the backbone's parameters, name by name, and layers without any that
    compute the same; else the meta model.
    """
    copy = build_on_meta(description)
    found, built = (
        {k: tuple(v.shape) if isinstance(v, Tensor) else (type(v).__name__,) for k, v in m.state_dict().items()}
        for m in (backbone, copy)
    )
    if found != built:
        odd = sorted(k for k in found.keys() | built.keys() if found.get(k) != built.get(k))
        raise ValueError(
            f"The backbone has parameters that a timm ViT of its settings has not, or in another shape: "
            f"{', '.join(odd[:5])}. Another number of classes is set by reset_classifier or num_classes"
        )
    twins = dict(copy.named_modules())
    for name, module in backbone.named_modules():
        twin = twins.get(name)
        if getattr(module, "eps", None) != getattr(twin, "eps", None) or not _acts_alike(module, twin):
            raise ValueError(f"{name} is {module}, which a timm ViT of the backbone's settings has otherwise: {twin}")
    if not eva.same_rope(getattr(backbone, "rope", None), getattr(copy, "rope", None)):
        raise ValueError("The backbone's rotary position embeddings are not those of a timm ViT of its settings")
    return copy


def _acts_alike(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether two activations without parameters give the same; True for all other layers."""
    if (
        type(one).__module__.rpartition(".")[2] not in ("activation", "activations")
        or next(one.parameters(), None) is not None
    ):
        return True
    probe = torch.linspace(-6, 6, 97, device="cpu")
    with torch.no_grad():
        return other is not None and torch.allclose(one(probe.clone()), other(probe.clone()), atol=1e-6)


def _named_layer(name: str) -> Any:
    for module in (timm.layers, nn):
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"Neither timm.layers nor torch.nn has a layer named {name!r}")


# Orders -------------------------------------------------------------------------------------------------------------
# Heads, MLP units and channels may stand in any order without changing the full model's output. `apply_orders` brings
# them into a given one, so that nested choices ("the first k") keep the most important.


def apply_orders(backbone: Backbone, orders: dict[str, Tensor]) -> None:
    """Permute in place. orders: `heads` (L, H), `hidden` (L, units), `channels` (C,), each a permutation."""
    with torch.no_grad():
        for index, block in enumerate(transformer_blocks(backbone)):
            if not shares_keys(block.attn):  # else its heads stay where they are
                _order_heads(block.attn, orders["heads"][index])
            _order_hidden(block.mlp, orders["hidden"][index])
        if isinstance(backbone, Eva) and backbone.rope_mixed:  # each head has angles of its own
            freqs: Any = backbone.rope.freqs
            for index, order in enumerate(orders["heads"]):
                _permute(freqs[:, index], order, 1)
        _order_channels(backbone, orders["channels"])


def inverse_orders(orders: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: order.argsort(dim=-1) for name, order in orders.items()}


def _permute(tensor: Tensor | None, order: Tensor, dim: int) -> None:
    if tensor is not None:
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _permute_affine(layer: nn.Module | None, order: Tensor) -> None:
    """Weight and bias of a norm."""
    for name in ("weight", "bias"):
        _permute(getattr(layer, name, None), order, 0)


def _permute_outputs(layer: Any, order: Tensor) -> None:
    _permute(layer.weight, order, 0)
    _permute(layer.bias, order, 0)


def _order_heads(attn: Any, order: Tensor) -> None:
    channels = (order[:, None] * attn.head_dim + torch.arange(attn.head_dim, device=order.device)).flatten()
    for layer in query_key_value_layers(attn):
        _permute_outputs(layer, channels)
    _permute_affine(attn.norm, channels)
    _permute(attn.proj.weight, channels, 1)


def _order_hidden(mlp: Any, order: Tensor) -> None:
    value, gate, _ = mlp_inputs(mlp)
    for layer in (value, gate):
        if layer is not None:
            _permute_outputs(layer, order)
    _permute_affine(mlp.norm, order)
    _permute(mlp.fc2.weight, order, 1)


def _order_channels(backbone: Any, order: Tensor) -> None:
    _permute_outputs(backbone.patch_embed.proj, order)
    _permute_affine(backbone.patch_embed.norm, order)
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        _permute(getattr(backbone, name, None), order, 2)
    for block in transformer_blocks(backbone):
        for norm in (block.norm1, block.norm2):
            _permute_affine(norm, order)
        for scale in (attention_scale(block), mlp_scale(block)):
            _permute(scale, order, 0)
        for layer in (*query_key_value_inputs(block.attn), *input_layers(block.mlp)):
            _permute(layer.weight, order, 1)
        _permute_outputs(block.attn.proj, order)
        _permute_outputs(block.mlp.fc2, order)
    _permute_affine(backbone.norm_pre, order)
    _permute_affine(backbone.norm, order)
    pool = backbone.attn_pool
    if isinstance(pool, AttentionPoolLatent):  # its output has an order of its own
        _permute(pool.kv.weight, order, 1)
        _permute(pool.pos_embed, order, 1)
        return
    _permute_affine(backbone.fc_norm, order)
    for name in ("head", "head_dist"):
        weight = getattr(getattr(backbone, name, None), "weight", None)
        if weight is not None:  # it reads the channels once, or of two poolings
            _permute(weight.unflatten(1, (-1, len(order))), order, 2)


def channels_are_free(backbone: Backbone) -> bool:
    """Whether channels may change places: not where pooling reads them in groups (`global_pool="prr"`)."""
    return backbone.attn_pool is None or isinstance(backbone.attn_pool, AttentionPoolLatent)
