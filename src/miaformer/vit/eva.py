"""timm's `eva` family: EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs, Sapiens2.

Its blocks take rotary position embeddings, and its models are made with settings of other names than
`VisionTransformer`'s.
"""

from __future__ import annotations

import inspect
from typing import Any

from timm.layers import AttentionRope, GluMlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn

from miaformer.vit.layers import num_kv_heads

BLOCKS = (EvaBlock, EvaBlockPostNorm)
ATTENTIONS = (EvaAttention, AttentionRope)
ROPES: dict[type[nn.Module], str] = {  # timm's `rope_type`
    RotaryEmbeddingCat: "cat",
    RotaryEmbeddingMixed: "mixed",
    RotaryEmbeddingDinoV3: "dinov3",
}
_OF_ROPE = ("grid_offset", "grid_indexing", "temperature", "shift_coords", "jitter_coords", "rescale_coords")
_NOT_SETTINGS = ("training", "feat_shape", "pos_embed", "pos_embed_cached", "t_x", "t_y")  # caches, None without
_IDENTITY = nn.Identity


def unsupported(backbone: Eva) -> str | None:
    """What of the model beside its blocks cannot be adapted."""
    if backbone.rope is not None and type(backbone.rope) not in ROPES:
        return f"rotary position embeddings {type(backbone.rope).__name__}"
    if backbone.patch_drop is not None:
        return "patch_drop_rate, which its own forward() applies; stages of training have `patch_drop` instead"
    return None


def described(backbone: Eva) -> dict[str, Any]:
    """Settings of `Eva` that `VisionTransformer` has not, or calls otherwise; read off the module."""
    block: Any = backbone.blocks[0]
    attn, mlp = block.attn, block.mlp
    pool: Any = backbone.attn_pool
    scales = [getattr(block, name, None) is not None for name in ("gamma_1", "gamma_2")]
    kv_heads = [num_kv_heads(one.attn) for one in list[Any](backbone.blocks)]
    found = {
        "mlp_ratio": (mlp.fc2.in_features + 0.5) / backbone.embed_dim,  # timm rounds down
        "qkv_bias": _has_bias(attn),
        "qkv_fused": attn.qkv is not None,
        "swiglu_mlp": isinstance(mlp, SwiGLU | GluMlp),
        "swiglu_align_to": int(isinstance(mlp, SwiGLU)),  # any number makes it this class, 1 leaves its width
        "scale_mlp": not isinstance(mlp.norm, _IDENTITY),
        "scale_attn_inner": not isinstance(attn.norm, _IDENTITY),
        "attn_type": "rope" if isinstance(attn, AttentionRope) else "eva",
        "attn_only_layer_scale": scales == [True, False],
        "init_values": 1e-5 if scales[0] else None,
        "num_reg_tokens": 0 if backbone.reg_token is None else backbone.reg_token.shape[1],
        "use_abs_pos_emb": backbone.pos_embed is not None,
        "use_post_norm": isinstance(block, EvaBlockPostNorm),
        "use_pre_transformer_norm": not isinstance(backbone.norm_pre, _IDENTITY),
        "use_post_transformer_norm": not isinstance(backbone.norm, _IDENTITY),
        "use_fc_norm": not isinstance(backbone.fc_norm, _IDENTITY),
        "use_rot_pos_emb": backbone.rope is not None,
        **_described_rope(backbone.rope, attn),
    }
    if min(kv_heads) < attn.num_heads:
        found["num_kv_heads"] = kv_heads
    if pool is not None:
        found["attn_pool_num_heads"] = pool.num_heads
        found["attn_pool_mlp_ratio"] = (pool.mlp.fc1.out_features + 0.5) / backbone.embed_dim
    return found


def _has_bias(attn: Any) -> bool:
    if isinstance(attn, EvaAttention) and attn.qkv is not None:
        return attn.q_bias is not None
    return (attn.q_proj if attn.qkv is None else attn.qkv).bias is not None


def _described_rope(rope: Any, attn: Any) -> dict[str, Any]:
    if rope is None:
        return {}
    found = {f"rope_{name}": getattr(rope, name) for name in _OF_ROPE if hasattr(rope, name)}
    shape = getattr(rope, "ref_feat_shape", None)
    return {
        **found,
        "rope_type": ROPES[type(rope)],
        "rope_rotate_half": attn.rotate_half,
        "ref_feat_shape": None if shape is None else list(shape),
    }


def same_rope(one: Any, other: Any) -> bool:
    """Whether two rotary embeddings turn alike, learned frequencies aside."""
    return type(one) is type(other) and (one is None or _settings_of(one) == _settings_of(other))


def _settings_of(rope: Any) -> dict[str, Any]:
    """What it was made with, but the grid that it keeps the angles of."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(rope).items()
        if isinstance(value, plain) and not name.startswith("_") and name not in _NOT_SETTINGS
    }


def free_rope(rope: Any) -> Any:
    """The same rotary embeddings for images of any size. timm's of this class keep the angles of the grid that they
    were made for, and give no others.
    """
    if type(rope) is not RotaryEmbeddingCat or rope.feat_shape is None:
        return rope
    names = set(inspect.signature(RotaryEmbeddingCat.__init__).parameters) & set(_settings_of(rope))
    free = RotaryEmbeddingCat(**{name: getattr(rope, name) for name in names}, device=rope.bands.device)
    return free.train(rope.training)
