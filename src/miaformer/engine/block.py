"""What a decision means: one transformer block under gates, executed masked (the reference) or on kept rows only.

Both read the parameters of timm's own blocks, in timm's layout, so the static model remains runnable beside them.
Widths: of H head groups, group j holds head j, its share of MLP units and (`mlp_width="coupled"`) its share of
channels. Norms inside attention or MLP take their statistics over what is kept.

What is exactly a `nn.Linear` is read, for products that are cut and fused. Anything else in its place (LoRA, a
quantised layer, one that is pruned or parametrised) is called, which gives all of its outputs: where a block keeps some
of its heads alone it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaformer.engine.attention import attend_masked, attend_packed
from miaformer.engine.cost import group_sizes
from miaformer.engine.decisions import Gates, MlpWidth, from_host
from miaformer.engine.products import Plain, Products
from miaformer.vit.layers import (
    EVERY,
    Index,
    attention_dim,
    attention_input,
    attention_norm,
    attention_result,
    attention_scale,
    by_heads,
    for_each_head,
    gated,
    hidden_units,
    input_layers,
    linear_layers,
    mlp_input,
    mlp_inputs,
    mlp_norm,
    mlp_result,
    mlp_scale,
    normed_keys,
    normed_queries,
    own_parts,
    query_key_value,
    query_key_value_inputs,
    query_key_value_layers,
)


@dataclass(frozen=True)
class Width:
    """The part of a block's units that one choice of heads executes."""

    num_heads: int  # kept
    kept: Index  # which
    heads: Index  # of head_dim channels each, in units of channels of the attention
    hidden: Index  # MLP units
    dim: Index  # input and output channels of the MLP

    @property
    def cuts_views(self) -> bool:
        """Whether the parts of weights that it picks are views of them, not copies made for one call."""
        return all(isinstance(index, slice) for index in (self.heads, self.hidden, self.dim))

    @staticmethod
    def of(kept: Sequence[int], block: Any, mlp_width: MlpWidth, device: torch.device) -> Width:
        """kept: indices of the kept heads, ascending; the first k of them become slices."""
        attn, fc2 = block.attn, block.mlp.fc2
        if len(kept) == attn.num_heads:
            return Width(len(kept), EVERY, EVERY, EVERY, EVERY)
        sizes = (attn.num_heads, attention_dim(attn), fc2.in_features, fc2.out_features)
        return _width(tuple(kept), *sizes, mlp_width, device)


@lru_cache(maxsize=1024)
def _width(
    kept: tuple[int, ...],
    num_heads: int,
    attn_dim: int,
    hidden: int,
    dim: int,
    mlp_width: MlpWidth,
    device: torch.device,
) -> Width:
    with torch.inference_mode(False):  # indices are kept for later, also for calls that want gradients
        return Width(
            len(kept),
            _units(kept, num_heads, num_heads, device),
            _units(kept, attn_dim, num_heads, device),
            EVERY if mlp_width == "full" else _units(kept, hidden, num_heads, device),
            _units(kept, dim, num_heads, device) if mlp_width == "coupled" else EVERY,
        )


def _units(kept: Sequence[int], width: int, num_heads: int, device: torch.device) -> Index:
    sizes = group_sizes(width, num_heads)
    if list(kept) == list(range(len(kept))):
        return slice(0, sum(sizes[: len(kept)]))
    of_group = torch.arange(num_heads).repeat_interleave(torch.tensor(sizes))
    return torch.isin(of_group, torch.tensor(list(kept))).nonzero().flatten().to(device)


def is_plain(layer: Any) -> bool:
    """Whether a layer is its weight and its bias, and may be read instead of called."""
    # PyTorch's exporter shows layers as instances of classes of its own, made of theirs.
    return (
        (type(layer) is nn.Linear or (torch.compiler.is_exporting() and isinstance(layer, nn.Linear)))
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
    )


def is_as_built(block: Any) -> bool:
    """Whether calling a block gives what its parts give: nobody put hooks on it, or another `forward`."""
    return not any(
        "forward" in one.__dict__ or one._forward_hooks or one._forward_pre_hooks for one in own_parts(block)
    )


def check_own_forward(block: Any) -> None:
    """Raises ValueError for a block whose parts have had their `forward` replaced: theirs is not what is executed."""
    for part in own_parts(block):
        if "forward" in part.__dict__:
            raise ValueError(
                f"the backbone's {type(part).__name__} has been given a forward() of its own, which would be left out: "
                "blocks are executed by their parts"
            )


def check_plain(blocks: Iterable[Any], done: str, instead: str) -> None:
    """Raises ValueError for a layer that is not plain, with what cannot be done with it and what to do instead."""
    for index, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            if not is_plain(layer):
                raise ValueError(f"{name} of block {index} cannot be {done}: it {_shown(layer)}. {instead}")


def _shown(layer: Any) -> str:
    kind = type(layer)
    if kind is nn.Linear:
        return "has hooks or a forward() of its own"
    return f"is {kind.__module__}.{kind.__qualname__}, not a plain torch.nn.Linear"


def _called(layer: Any, x: Tensor, width: Width) -> Tensor:
    """What a layer that is not plain gives, which cannot be cut."""
    if width.heads is not EVERY:
        raise ValueError(
            f"a layer of the backbone {_shown(layer)}. It can only be called as a whole, not for some of its heads: "
            "leave 'heads' out of the grains"
        )
    out: Tensor = layer(x)
    return out


def packed_block(
    block: Any,
    x: Tensor,
    width: Width,
    lengths: list[int],
    read_prefix: int | None,
    products: Products,
    places: Tensor | None = None,
) -> Tensor:
    """The rows that one block changes, after it. Nothing that is not kept is computed.

    x: (T, C), the kept rows of several images, one image after the other, prefix rows first; lengths: rows of each
    image, T in all; read_prefix: None, or P where only the P prefix rows of each image are read afterwards: then
    those alone come back; products: what computes the matrix products; places: (T,), where in its image each row lies,
    for a block that asks (`turns_rows`).
    """
    check_own_forward(block)
    attn = block.attn
    if read_prefix is None:
        q, k, v = _query_key_value(block, products, x, width)
        q, q_lengths = normed_queries(block, q, places, width.kept), lengths
    else:
        prefix = _prefix_rows(lengths, read_prefix, x.device)
        q, k, v = _prefix_query_key_value(block, products, x, prefix, width)
        q, q_lengths = attn.q_norm(q), [read_prefix] * len(lengths)  # these rows have no angles
        x = x[prefix]
    k, v = normed_keys(block, k, places, width.kept), for_each_head(attn, v, width.kept)
    out = attend_packed(q, k, v, q_lengths, lengths).flatten(1)
    return _after_attention(block, products, out, x, width)


def equal_block(block: Any, x: Tensor, width: Width, read_prefix: int | None, places: Tensor | None = None) -> Tensor:
    """`packed_block` for images of equal length, in PyTorch's own operations: it can be exported for any batch size.

    x: (B, n, C), prefix rows first -> (B, n, C), or (B, P, C) where only the P prefix rows are read afterwards. places:
    (n,), where in an image these rows lie; None: all of them, in their order.
    """
    attn, products = block.attn, Plain()
    check_own_forward(block)
    if read_prefix is None:
        q, k, v = _query_key_value(block, products, x, width)
        q = normed_queries(block, q, places, width.kept)
    else:
        q, k, v = _prefix_query_key_value(block, products, x, (slice(None), slice(read_prefix)), width)
        q, x = attn.q_norm(q), x[:, :read_prefix]
    k, v = normed_keys(block, k, places, width.kept), for_each_head(attn, v, width.kept)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return _after_attention(block, products, out, x, width)


def _after_attention(block: Any, products: Products, out: Tensor, x: Tensor, width: Width) -> Tensor:
    """out: (..., kept channels), what attention gives; x: (..., C), the residual -> (..., C)."""
    proj = block.attn.proj
    out = _norm_part(block.attn.norm, out, width.heads)
    if is_plain(proj):
        weight = proj.weight if width.heads is EVERY else proj.weight[:, width.heads]
        x = _added(products, out, weight, proj.bias, attention_scale(block), attention_norm(block), x)
    else:
        x = x + attention_result(block, _called(proj, out, width))
    return _packed_mlp(block, products, x, width)


def _added(
    products: Products,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: Any,
    residual: Tensor,
) -> Tensor:
    if norm is not None:
        return residual + norm(products.linear(rows, weight, bias))
    if scale is None:
        return products.added(rows, weight, bias, residual)
    return torch.addcmul(residual, products.linear(rows, weight, bias), scale)


def _query_key_value(block: Any, products: Products, rows: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
    """Each (..., kept heads, head_dim); shared keys and values of all heads. rows: (T, C), or (B, n, C) of images of
    equal length.
    """
    attn, y = block.attn, attention_input(block, rows)

    def whole(layer: Any) -> Tensor:
        if is_plain(layer):
            return products.linear(y, layer.weight, layer.bias)
        return _called(layer, y, width)

    if width.heads is EVERY or not _is_cut(attn):
        return query_key_value(attn, whole)
    layers = query_key_value_layers(attn, width.heads)
    q, k, v = (by_heads(attn, part) for part in products.side_by_side(y, layers))
    return q, k, v


def _is_cut(attn: Any) -> bool:
    """Whether the layers of queries, keys and values may be read in part."""
    return all(is_plain(layer) for layer in query_key_value_inputs(attn))


def _prefix_query_key_value(
    block: Any, products: Products, rows: Tensor, prefix: Any, width: Width
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with queries of the rows `prefix`, an index, alone."""
    if not _is_cut(block.attn):
        q, k, v = _query_key_value(block, products, rows, width)
        return q[prefix], k, v
    attn, y = block.attn, attention_input(block, rows)
    query, *others = query_key_value_layers(attn, width.heads)
    parts = products.linear(y[prefix], *query), *products.side_by_side(y, others)
    q, k, v = (by_heads(attn, part) for part in parts)
    return q, k, v


def _packed_mlp(block: Any, products: Products, x: Tensor, width: Width) -> Tensor:
    mlp, dim, hidden = block.mlp, width.dim, width.hidden
    y = mlp_input(block, x)
    if dim is not EVERY:
        y = y[..., dim].contiguous()

    def part(layer: Any) -> tuple[Tensor, Tensor | None]:
        if hidden is EVERY and dim is EVERY:
            return layer.weight, layer.bias
        return layer.weight[hidden][:, dim], _part(layer.bias, hidden)

    if all(is_plain(layer) for layer in input_layers(mlp)):
        value, gate, activate_value = mlp_inputs(mlp)
        if gate is None:
            y = products.activated(y, *part(value), mlp.act)
        else:
            y = gated(mlp.act, products.linear(y, *part(value)), products.linear(y, *part(gate)), activate_value)
    else:
        y = hidden_units(mlp, lambda layer: _called(layer, y, width))
    y = _norm_part(mlp.norm, y, hidden)
    if not is_plain(mlp.fc2):
        return x + mlp_result(block, _called(mlp.fc2, y, width))
    weight = mlp.fc2.weight
    if dim is EVERY:
        weight = weight if hidden is EVERY else weight[:, hidden]
        return _added(products, y, weight, mlp.fc2.bias, mlp_scale(block), mlp_norm(block), x)
    y = products.linear(y, weight[dim][:, hidden], _part(mlp.fc2.bias, dim))
    scale = mlp_scale(block)
    if scale is not None:
        y = y * scale[dim]
    x = x.clone()
    x[..., dim] += y
    return x


def _part(bias: Tensor | None, index: Index) -> Tensor | None:
    return None if bias is None else bias[index]


def _prefix_rows(lengths: list[int], num_prefix_tokens: int, device: torch.device) -> Tensor:
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return from_host((starts[:, None] + torch.arange(num_prefix_tokens)).flatten(), device)


def _norm_part(norm: Any, x: Tensor, index: Index) -> Tensor:
    """`norm` over a part of its features. x: (..., kept features)."""
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], _part(norm.weight, index), _part(norm.bias, index), norm.eps)
    return F.rms_norm(x, x.shape[-1:], _part(norm.weight, index), norm.eps)


def masked_block(block: Any, x: Tensor, gates: Gates, num_prefix_tokens: int, mlp_width: MlpWidth) -> Tensor:
    """The reference: every row and head is computed, gates multiply, attention is masked. Differentiable in gates.

    x: (B, P+N, C) -> (B, P+N, C).
    """
    attn = block.attn
    check_own_forward(block)
    heads = gates.heads.to(x.dtype)
    keys = torch.cat([gates.tokens.new_ones(len(x), num_prefix_tokens), gates.tokens], dim=1)
    rows = (keys.to(x.dtype) * gates.depth.to(x.dtype)[:, None])[:, :, None]
    num_rows = x.shape[1]

    y = attention_input(block, x)
    q, k, v = query_key_value(attn, lambda layer: layer(y))
    q, k, v = normed_queries(block, q), normed_keys(block, k), for_each_head(attn, v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attend_masked(q, k, v, keys, dropout)
    y = (y * heads[:, :, None, None]).transpose(1, 2).reshape(-1, num_rows, attention_dim(attn))
    y = _gated_norm(attn.norm, y, _spread(heads, attention_dim(attn)))
    y = attn.proj_drop(attn.proj(y))
    x = x + rows * block.drop_path1(attention_result(block, y))

    mlp = block.mlp
    y = mlp_input(block, x)
    if mlp_width == "coupled":
        y = y * _spread(heads, x.shape[2])
    y = mlp.drop1(hidden_units(mlp, lambda layer: layer(y)))
    if mlp_width == "full":
        y = mlp.norm(y)
    else:
        kept = _spread(heads, y.shape[2])
        y = _gated_norm(mlp.norm, y * kept, kept)
    y = mlp.drop2(mlp.fc2(y))
    if mlp_width == "coupled":
        y = y * _spread(heads, x.shape[2])
    return x + rows * block.drop_path2(mlp_result(block, y))


def _spread(heads: Tensor, width: int) -> Tensor:
    """Head gates (B, H) over the units of their groups, (B, 1, width)."""
    sizes = torch.tensor(group_sizes(width, heads.shape[1]), device=heads.device)
    return heads.repeat_interleave(sizes, dim=1, output_size=width).unsqueeze(1)


def _gated_norm(norm: Any, x: Tensor, kept: Tensor) -> Tensor:
    """`norm` with statistics over kept features only. x: (B, rows, F), zero where not kept; kept: (B, 1, F)."""
    if isinstance(norm, nn.Identity):
        return x
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    if isinstance(norm, nn.LayerNorm):
        x = (x - x.sum(dim=-1, keepdim=True) / count) * kept
    x = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) / count + norm.eps)
    if norm.weight is not None:
        x = x * norm.weight
    if getattr(norm, "bias", None) is not None:
        x = x + norm.bias
    return x * kept
