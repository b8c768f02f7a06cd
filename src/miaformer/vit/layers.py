"""The layers of a transformer block by what they do, whatever its family calls them.

All of timm's blocks have norm1, attn, norm2 and mlp; their attention num_heads, head_dim, norm and proj; their MLP act,
norm and fc2. (`Attention` has attn_dim too, which `EvaAttention` has not.) What differs is asked here: how queries,
keys and values are made, what is done to them before they are compared, gates of MLPs, and layer scale. Another family,
such as `EvaBlock`, is another case of these functions (rotary embeddings: of `normed_queries` and `normed_keys`, given
each row's position).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

Index = slice | Tensor  # nested heads are slices (views), subsets are indices (gathers)
EVERY = slice(None)


class LinearView(NamedTuple):
    """Rows of a linear layer, seen as a layer of its own."""

    weight: Tensor
    bias: Tensor | None


def linear_layers(block: Any) -> dict[str, Any]:
    """The modules that hold a block's matrices, by name."""
    attn, mlp = block.attn, block.mlp
    inputs = {f"fc1[{i}]": layer for i, layer in enumerate(input_layers(mlp))}
    return {"qkv": attn.qkv, "proj": attn.proj, "fc2": mlp.fc2, **inputs}


def attention_scale(block: Any) -> Tensor | None:
    """What attention's result is multiplied by, (C,); None: nothing."""
    return None if isinstance(block.ls1, nn.Identity) else block.ls1.gamma


def mlp_scale(block: Any) -> Tensor | None:
    """The same of the MLP's result."""
    return None if isinstance(block.ls2, nn.Identity) else block.ls2.gamma


def scaled(result: Tensor, scale: Tensor | None) -> Tensor:
    return result if scale is None else result * scale


# Attention ------------------------------------------------------------------------------------------------------------


def query_key_value(attn: Any, call: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all heads, each (..., H, D), before their norms. call: what a layer gives, (..., its outputs)."""
    packed = call(attn.qkv)
    q, k, v = packed.reshape(*packed.shape[:-1], 3, attn.num_heads, attn.head_dim).unbind(-3)
    return q, k, v


def query_key_value_inputs(attn: Any) -> list[Any]:
    """The modules that `query_key_value` calls."""
    return [attn.qkv]


def query_key_value_layers(attn: Any, channels: Index = EVERY) -> list[LinearView]:
    """The three as layers of their own, of some of the H * D channels that each gives."""
    weights = attn.qkv.weight.unflatten(0, (3, attn.attn_dim))[:, channels].unbind(0)
    bias = attn.qkv.bias
    biases = [None] * 3 if bias is None else bias.view(3, attn.attn_dim)[:, channels].unbind(0)
    return [LinearView(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def normed_queries(attn: Any, q: Tensor) -> Tensor:
    """As they are compared with keys. q: (..., D)."""
    normed: Tensor = attn.q_norm(q)
    return normed


def normed_keys(attn: Any, k: Tensor) -> Tensor:
    """As they are compared with queries. k: (..., D)."""
    normed: Tensor = attn.k_norm(k)
    return normed


# MLP ------------------------------------------------------------------------------------------------------------------


def is_gated(mlp: Any) -> bool:
    return hasattr(mlp, "fc1_g") or hasattr(mlp, "gate_last")


def input_layers(mlp: Any) -> list[Any]:
    """The modules of an MLP that read its input."""
    return [mlp.fc1_x, mlp.fc1_g] if hasattr(mlp, "fc1_g") else [mlp.fc1]


def mlp_inputs(mlp: Any) -> tuple[Any, Any, bool]:
    """The input layers of timm's `Mlp`, `SwiGLU` and `GluMlp`: value, gate or None, and whether the value is activated.

    Each has a weight and a bias.
    """
    if hasattr(mlp, "fc1_g"):
        return mlp.fc1_x, mlp.fc1_g, False
    if not hasattr(mlp, "gate_last"):
        return mlp.fc1, None, True
    weights = mlp.fc1.weight.chunk(2)
    biases = (None, None) if mlp.fc1.bias is None else mlp.fc1.bias.chunk(2)
    first, second = (LinearView(w, b) for w, b in zip(weights, biases, strict=True))
    return first, second, not mlp.gate_last


def hidden_units(mlp: Any, call: Callable[[Any], Tensor]) -> Tensor:
    """Activated hidden units of a plain or gated MLP. call: what a layer gives."""
    if hasattr(mlp, "fc1_g"):
        return gated(mlp.act, call(mlp.fc1_x), call(mlp.fc1_g), False)
    if not hasattr(mlp, "gate_last"):
        activated: Tensor = mlp.act(call(mlp.fc1))
        return activated
    first, second = call(mlp.fc1).chunk(2, dim=-1)
    return gated(mlp.act, first, second, not mlp.gate_last)


def gated(act: Any, values: Tensor, gates: Tensor, activate_value: bool) -> Tensor:
    product: Tensor = act(values) * gates if activate_value else values * act(gates)
    return product
