"""The layers of a transformer block by what they do, whatever its family calls them.

timm's `Block` (`vision_transformer`, `deit`), `EvaBlock` and `EvaBlockPostNorm` (`eva`) all have norm1, attn, norm2 and
mlp; their attention num_heads, head_dim, norm, q_norm, k_norm and proj; their MLP act, norm and fc2. What differs is
asked here: how queries, keys and values are made, what is done to them before they are compared, where norms stand,
gates of MLPs, and layer scale. Another family is another case of these functions.

A block with rotary position embeddings comes as a `PositionedBlock`, which knows the angles of the rows it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaBlockPostNorm
from torch import Tensor, nn

Index = slice | Tensor  # nested heads are slices (views), subsets are indices (gathers)
EVERY = slice(None)


class LinearView(NamedTuple):
    """Rows of a linear layer, seen as a layer of its own."""

    weight: Tensor
    bias: Tensor | None


# Positions ------------------------------------------------------------------------------------------------------------


class Rotary:
    """The angles by which rotary position embeddings (Su et al. 2021) turn queries and keys, of images of one grid.

    embed: sines and cosines as timm's `get_embed` gives them, (N, 2 D), or (L, H, N, 2 D) where each block and head has
    its own ("mixed"); where tokens were left out, for each image: (B, 1, n, 2 D) or (L, B, H, n, 2 D).
    """

    def __init__(self, embed: Tensor, num_prefix_tokens: int, mixed: bool) -> None:
        self.embed, self.num_prefix_tokens, self.mixed = embed, num_prefix_tokens, mixed

    def of_block(self, index: int) -> Tensor:
        """As timm's blocks take them: (N, 2 D) or (H, N, 2 D)."""
        return self.embed[index] if self.mixed else self.embed

    @cached_property
    def table(self) -> Tensor:
        """Of all rows of an image, prefix rows first, which are not turned: (P+N, 1, 2 D), or (L, P+N, H, 2 D)."""
        rows = self.embed.transpose(1, 2) if self.mixed else self.embed[:, None]
        still = rows.new_zeros(*rows.shape[:-3], self.num_prefix_tokens, *rows.shape[-2:])
        still[..., still.shape[-1] // 2 :] = 1  # cosines
        return torch.cat([still, rows], dim=-3)

    def rows(self, index: int) -> Tensor:
        """The table of block `index`, (P+N, 1 or H, 2 D)."""
        return self.table[index] if self.mixed else self.table


class PositionedBlock:
    """A block and the angles of the rows that it is given. Called with these rows alone, and read, as the block is."""

    def __init__(self, block: nn.Module, index: int, rotary: Rotary) -> None:
        self.block, self.index, self.rotary = block, index, rotary

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, P+N, C) -> (B, P+N, C)"""
        out: Tensor = self.block(x, rope=self.rotary.of_block(self.index))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def positioned(blocks: Sequence[Any], rotary: Rotary | None) -> list[Any]:
    """The blocks as they are executed on images whose rows have these angles."""
    if rotary is None:
        return list(blocks)
    return [PositionedBlock(block, index, rotary) for index, block in enumerate(blocks)]


def turns_rows(block: Any) -> bool:
    """Whether it matters to the block where in an image a row lies."""
    return isinstance(block, PositionedBlock)


def own_parts(block: Any) -> tuple[Any, Any, Any]:
    """The modules that timm's `forward` calls: the block, its attention, its MLP."""
    module = block.block if isinstance(block, PositionedBlock) else block
    return module, module.attn, module.mlp


# The block ------------------------------------------------------------------------------------------------------------


def linear_layers(block: Any) -> dict[str, Any]:
    """The modules that hold a block's matrices, by name."""
    attn, mlp = block.attn, block.mlp
    inputs = {f"fc1[{i}]": layer for i, layer in enumerate(input_layers(mlp))}
    names = ("qkv",) if attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
    return {
        **dict(zip(names, query_key_value_inputs(attn), strict=True)),
        "proj": attn.proj,
        "fc2": mlp.fc2,
        **inputs,
    }


def norms_results(block: Any) -> bool:
    """Whether norms stand after attention and MLP (post-norm), not before them."""
    return isinstance(own_parts(block)[0], EvaBlockPostNorm)


def attention_input(block: Any, x: Tensor) -> Tensor:
    """What attention reads of the block's input."""
    return x if norms_results(block) else block.norm1(x)


def attention_scale(block: Any) -> Tensor | None:
    """What attention's result is multiplied by, (C,); None: nothing."""
    return _scale(block, "ls1", "gamma_1")


def attention_norm(block: Any) -> Any:
    """The norm of attention's result; None in blocks that norm its input."""
    return block.norm1 if norms_results(block) else None


def attention_result(block: Any, result: Tensor) -> Tensor:
    """What attention adds to the block's input."""
    return block.norm1(result) if norms_results(block) else scaled(result, attention_scale(block))


def mlp_input(block: Any, x: Tensor) -> Tensor:
    """What the MLP reads of what attention leaves."""
    return x if norms_results(block) else block.norm2(x)


def mlp_scale(block: Any) -> Tensor | None:
    """What the MLP's result is multiplied by, (C,); None: nothing."""
    return _scale(block, "ls2", "gamma_2")


def mlp_norm(block: Any) -> Any:
    """The norm of the MLP's result; None in blocks that norm its input."""
    return block.norm2 if norms_results(block) else None


def mlp_result(block: Any, result: Tensor) -> Tensor:
    """What the MLP adds to what attention leaves."""
    return block.norm2(result) if norms_results(block) else scaled(result, mlp_scale(block))


def _scale(block: Any, layer: str, parameter: str) -> Tensor | None:
    module = getattr(block, layer, None)
    if module is None:
        found: Tensor | None = getattr(block, parameter, None)
        return found
    return None if isinstance(module, nn.Identity) else module.gamma


def scaled(result: Tensor, scale: Tensor | None) -> Tensor:
    return result if scale is None else result * scale


# Attention ------------------------------------------------------------------------------------------------------------


def attention_dim(attn: Any) -> int:
    """H * D channels."""
    dim: int = attn.num_heads * attn.head_dim
    return dim


def num_kv_heads(attn: Any) -> int:
    """Heads of keys and values: H, or fewer in grouped-query attention (Ainslie et al. 2023), where H / KV heads of
    queries, neighbours, share one of them.
    """
    count: int = attn.num_kv_heads if isinstance(attn, AttentionRope) else attn.num_heads
    return count


def shares_keys(attn: Any) -> bool:
    """Whether several heads of queries read one head of keys and values."""
    return num_kv_heads(attn) < int(attn.num_heads)


def query_key_value(attn: Any, call: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all heads, before their norms: queries (..., H, D), keys and values (..., KV, D), H unless heads share them.

    call: what a layer gives, (..., its outputs).
    """
    if attn.qkv is None:
        q, k, v = (call(layer) for layer in query_key_value_inputs(attn))
    else:
        packed, bias = call(attn.qkv), _own_bias(attn)
        q, k, v = (packed if bias is None else packed + bias).chunk(3, dim=-1)
    return by_heads(attn, q), by_heads(attn, k), by_heads(attn, v)


def by_heads(attn: Any, part: Tensor) -> Tensor:
    """Queries, keys or values (..., channels) as (..., heads, D)."""
    return part.unflatten(-1, (part.shape[-1] // attn.head_dim, attn.head_dim))


def query_key_value_inputs(attn: Any) -> list[Any]:
    """The modules that `query_key_value` calls."""
    return [attn.q_proj, attn.k_proj, attn.v_proj] if attn.qkv is None else [attn.qkv]


def _own_bias(attn: Any) -> Tensor | None:
    """EVA's bias of queries, keys (always 0) and values (3 H D,), which its fused layer does not hold."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def query_key_value_layers(attn: Any, channels: Index = EVERY) -> list[LinearView]:
    """The three as layers of their own, of some of the H * D channels that each gives. Keys and values that heads share
    come whole, whichever of these heads are kept.
    """
    if attn.qkv is None:
        key_channels = EVERY if shares_keys(attn) else channels
        parts = zip(query_key_value_inputs(attn), (channels, key_channels, key_channels), strict=True)
        return [
            LinearView(layer.weight[part], None if layer.bias is None else layer.bias[part]) for layer, part in parts
        ]
    dim = attention_dim(attn)
    of_fused = attn.qkv.weight.unflatten(0, (3, dim))[:, channels].unbind(0)
    if getattr(attn, "q_bias", None) is not None:
        of_bias = [bias[channels] for bias in (attn.q_bias, attn.k_bias, attn.v_bias)]
    else:
        bias = attn.qkv.bias
        of_bias = [None] * 3 if bias is None else bias.view(3, dim)[:, channels].unbind(0)
    return [LinearView(weight, bias) for weight, bias in zip(of_fused, of_bias, strict=True)]


def normed_queries(block: Any, q: Tensor, rows: Tensor | None = None, heads: Index = EVERY) -> Tensor:
    """As they are compared with keys. q: (..., R, H, D), of some heads; rows: (R,), where in an image they lie; None:
    all of its rows, in their order.
    """
    return _turned(block, block.attn.q_norm(q), rows, heads)


def normed_keys(block: Any, k: Tensor, rows: Tensor | None = None, heads: Index = EVERY) -> Tensor:
    """As they are compared with the queries of some heads, (..., R, heads, D). k: (..., R, heads of keys, D); rows,
    heads: as `normed_queries` has them.
    """
    attn = block.attn
    return for_each_head(attn, _turned(block, attn.k_norm(k), rows, heads), heads)


def for_each_head(attn: Any, part: Tensor, heads: Index = EVERY) -> Tensor:
    """Keys or values as some heads of queries read them, (..., heads, D): once for each of those that share them."""
    if not shares_keys(attn):
        return part
    return part.repeat_interleave(attn.num_heads // num_kv_heads(attn), dim=-2)[..., heads, :]


def _turned(block: Any, part: Tensor, rows: Tensor | None, heads: Index) -> Tensor:
    if not isinstance(block, PositionedBlock):
        return part
    angles = block.rotary.rows(block.index)
    if rows is not None:
        angles = angles.index_select(0, rows)
    if angles.shape[-2] > 1:
        angles = angles[:, heads]
    turned: Tensor = apply_rot_embed_cat(part, angles, half=getattr(block.attn, "rotate_half", False))
    return turned


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
