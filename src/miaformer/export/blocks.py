"""A transformer block on its kept rows, as ONNX nodes: `block.packed_block` for one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from miaformer.engine.block import Width
from miaformer.engine.cost import Cost
from miaformer.engine.products import gelu_kind
from miaformer.export.graph import MICROSOFT, Graph, array
from miaformer.export.weights import Weight
from miaformer.vit.layers import (
    EVERY,
    Rotary,
    attention_dim,
    attention_scale,
    mlp_inputs,
    mlp_scale,
    norms_results,
    num_kv_heads,
    query_key_value_layers,
    shares_keys,
)


@dataclass(frozen=True)
class Angles:
    """By how much queries and keys are turned, of images of one size. Values of the graph.

    sin, cos: of all rows, prefix rows first, (P+N, D), or (P+N, H, D) where each head has its own; of one block then.
    where: (n,) int64, which of them the rows at hand are; None: all, in their order.
    """

    sin: str
    cos: str
    each_head: bool
    half: bool  # the layout: D / 2 real parts, then as many imaginary ones; else in turn
    where: str | None = None

    @staticmethod
    def of(graph: Graph, rotary: Rotary, block: Any, index: int) -> Angles:
        """As constants, of block `index`."""
        sin, cos = (array(part) for part in rotary.rows(index).float().chunk(2, dim=-1))
        if not rotary.mixed:
            sin, cos = sin[:, 0], cos[:, 0]
        half = bool(getattr(block.attn, "rotate_half", False))
        return Angles(graph.constant(sin), graph.constant(cos), rotary.mixed, half)

    def at(self, where: str) -> Angles:
        """Those of some rows."""
        return replace(self, where=where)


@dataclass(frozen=True)
class BlockWriter:
    """Writes block `index` of a backbone, for any choice of heads."""

    cost: Cost
    block: Any
    index: int
    weights: dict[str, Weight]  # of whole layers, by what they are: stored once

    @staticmethod
    def of(graph: Graph, cost: Cost, block: Any, index: int, weight: type[Weight] = Weight) -> BlockWriter:
        named = dict(zip(("query", "key", "value"), query_key_value_layers(block.attn), strict=True))
        hidden, gate, _ = mlp_inputs(block.mlp)
        layers = {**named, "proj": block.attn.proj, "hidden": hidden, "gate": gate, "fc2": block.mlp.fc2}
        weights = {name: weight(graph, layer) for name, layer in layers.items() if layer is not None}
        return BlockWriter(cost, block, index, weights)

    def write(self, graph: Graph, rows: str, kept: list[int], angles: Angles | None = None) -> str:
        """The rows that the block changes, after it. rows: (n, C), prefix rows first; kept: the heads; angles: of the
        rows, where the block has rotary position embeddings.
        """
        block, attn, cost = self.block, self.block.attn, self.cost
        width = Width.of(kept, block, cost.mlp_width, torch.device("cpu"))
        channels = None if width.heads is EVERY else array(torch.arange(attention_dim(attn))[width.heads])
        y = rows if norms_results(block) else self.norm(graph, block.norm1, rows)
        read = rows
        if cost.trims(self.index):
            read = graph.op("Slice", rows, graph.ints(0), graph.ints(cost.num_prefix_tokens))
        out = self._attend(graph, y, kept, channels, angles)
        out = self.norm(graph, attn.norm, out, channels)
        out = self._linear(graph, out, "proj", attn.proj.bias, channels, None)
        return self._mlp(graph, read, out, width)

    def _attend(self, graph: Graph, y: str, kept: list[int], channels: Any, angles: Angles | None) -> str:
        """Attention's result (n, kept channels), or that of the prefix rows alone where nothing else is read."""
        attn, first, num_heads = self.block.attn, graph.ints(0), len(kept)
        queries = y
        if self.cost.trims(self.index):
            queries = graph.op("Slice", y, first, graph.ints(self.cost.num_prefix_tokens))
        shared = shares_keys(attn)
        key_heads, key_channels = (list(range(num_kv_heads(attn))), None) if shared else (kept, channels)
        query, key, value = query_key_value_layers(attn)
        q = self._linear(graph, queries, "query", query.bias, None, channels)
        k = self._linear(graph, y, "key", key.bias, None, key_channels)
        v = self._linear(graph, y, "value", value.bias, None, key_channels)
        q = self._head_norm(graph, attn.q_norm, q, num_heads)
        k = self._head_norm(graph, attn.k_norm, k, len(key_heads))
        if angles is not None:
            k = self._turned(graph, k, key_heads, angles)
            if not self.cost.trims(self.index):  # prefix rows are not turned
                q = self._turned(graph, q, kept, angles)
        if shared:
            k, v = (self._for_each_head(graph, part, kept) for part in (k, v))
        scale = float(attn.head_dim**-0.5)
        if graph.standard_ops:
            return _standard_attention(graph, q, k, v, (num_heads, attn.head_dim), scale)
        q, k, v = (graph.op("Unsqueeze", part, first) for part in (q, k, v))
        out = graph.op("MultiHeadAttention", q, k, v, domain=MICROSOFT, num_heads=num_heads, scale=scale)
        return str(graph.op("Squeeze", out, first))

    def _mlp(self, graph: Graph, read: str, out: str, width: Width) -> str:
        """The rows after attention's residual, `read` + `out`, through the MLP."""
        block, after = self.block, norms_results(self.block)
        if after:
            out = self.norm(graph, block.norm1, out)
        x = self._residual(graph, read, out, attention_scale(block), None)
        y = x if after else self.norm(graph, block.norm2, x)
        mlp = block.mlp
        hidden, dim = (
            None if part == slice(None) else array(torch.arange(size)[part])
            for part, size in ((width.hidden, mlp.fc2.in_features), (width.dim, mlp.fc2.out_features))
        )
        if dim is not None:
            y = graph.op("Gather", y, graph.constant(dim), axis=1)
        value, gate, activate_value = mlp_inputs(mlp)
        y, read = self._linear(graph, y, "hidden", value.bias, dim, hidden), y
        if gate is None:
            y = self._activated(graph, y)
        else:
            gates = self._linear(graph, read, "gate", gate.bias, dim, hidden)
            y, gates = (self._activated(graph, y), gates) if activate_value else (y, self._activated(graph, gates))
            y = graph.op("Mul", y, gates)
        y = self.norm(graph, mlp.norm, y, hidden)
        y = self._linear(graph, y, "fc2", mlp.fc2.bias, hidden, dim)
        if after:
            y = self.norm(graph, block.norm2, y)
        return self._residual(graph, x, y, mlp_scale(block), dim)

    def _linear(self, graph: Graph, x: str, name: str, bias: Any, inputs: Any, outputs: Any) -> str:
        """A layer on a part of its inputs and outputs; None: all."""
        if bias is not None:
            bias = array(bias) if outputs is None else array(bias)[outputs]
        return self.weights[name].product(graph, x, bias, inputs, outputs)

    def _residual(self, graph: Graph, x: str, y: str, scale: Any, dim: Any) -> str:
        if scale is not None:
            gamma = array(scale)
            y = graph.op("Mul", y, graph.constant(gamma if dim is None else gamma[dim]))
        if dim is not None:  # channels that are not kept stay as they are
            total = self.cost.embed_dim
            place = np.full(total, len(dim), dtype=np.int64)
            place[dim] = np.arange(len(dim))
            zero = graph.op(
                "Mul",
                graph.op("Slice", y, graph.ints(0), graph.ints(1), graph.ints(1)),
                graph.constant(0.0, np.float32),
            )
            y = graph.op("Gather", graph.op("Concat", y, zero, axis=1), graph.constant(place), axis=1)
        return str(graph.op("Add", x, y))

    def norm(self, graph: Graph, norm: Any, x: str, part: Any = None) -> str:
        """A norm over the last axis, or over a part of its features."""
        if isinstance(norm, nn.Identity):
            return x
        weight = array(norm.weight) if norm.weight is not None else None
        if weight is None:
            size = norm.normalized_shape[-1]
            weight = np.ones(size, np.float32)
        bias = getattr(norm, "bias", None)
        pick = (lambda a: a) if part is None else (lambda a: a[part])
        if isinstance(norm, nn.LayerNorm):
            shift = [graph.constant(pick(array(bias)))] if bias is not None else []
            scale = graph.constant(pick(weight))
            return str(graph.op("LayerNormalization", x, scale, *shift, axis=-1, epsilon=norm.eps))
        square = graph.op("ReduceMean", graph.op("Mul", x, x), graph.ints(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", square, graph.constant(norm.eps, np.float32)))
        return str(graph.op("Mul", graph.op("Div", x, root), graph.constant(pick(weight))))

    def _head_norm(self, graph: Graph, norm: Any, x: str, num_heads: int) -> str:
        if isinstance(norm, nn.Identity):
            return x
        heads = graph.op("Reshape", x, graph.ints(-1, num_heads, self.cost.head_dim))
        return str(graph.op("Reshape", self.norm(graph, norm, heads), graph.ints(-1, num_heads * self.cost.head_dim)))

    def _for_each_head(self, graph: Graph, x: str, kept: list[int]) -> str:
        """Keys or values (n, KV * D) as the kept heads read them, (n, kept heads * D)."""
        count, size = num_kv_heads(self.block.attn), self.cost.head_dim
        reads = graph.constant(np.array(kept) // (self.cost.num_heads // count))
        parts = graph.op("Gather", graph.op("Reshape", x, graph.ints(-1, count, size)), reads, axis=1)
        return str(graph.op("Reshape", parts, graph.ints(-1, len(kept) * size)))

    def _turned(self, graph: Graph, x: str, kept: list[int], angles: Angles) -> str:
        """Queries or keys (n, kept heads * D) by their angles."""
        size, num_heads = self.cost.head_dim, len(kept)
        if not graph.standard_ops and not angles.each_head:
            first, step = graph.ints(0), 1 if angles.half else 2  # each angle comes twice
            pick = (first, graph.ints(size // 2 if angles.half else size), graph.ints(1), graph.ints(step))
            cos, sin = (graph.op("Slice", part, *pick) for part in (angles.cos, angles.sin))
            where = first if angles.where is None else graph.op("Unsqueeze", angles.where, first)
            rows = graph.op("Unsqueeze", x, first)
            turned = graph.op(
                "RotaryEmbedding", rows, where, cos, sin, domain=MICROSOFT, interleaved=int(not angles.half)
            )
            return str(graph.op("Squeeze", turned, first))
        place = np.arange(size)
        other, sign = ((place + size // 2) % size, place < size // 2) if angles.half else (place ^ 1, place % 2 == 0)
        parts = []
        for part in (angles.cos, angles.sin):
            if angles.where is not None:
                part = graph.op("Gather", part, angles.where, axis=0)
            if not angles.each_head:
                part = graph.op("Unsqueeze", part, graph.ints(1))
            elif num_heads < self.cost.num_heads:
                part = graph.op("Gather", part, graph.constant(np.array(kept)), axis=1)
            parts.append(part)
        cos, sin = parts
        heads = graph.op("Reshape", x, graph.ints(-1, num_heads, size))
        signed = graph.op("Mul", sin, graph.constant(np.where(sign, -1.0, 1.0), np.float32))
        imaginary = graph.op("Mul", graph.op("Gather", heads, graph.constant(other), axis=2), signed)
        turned = graph.op("Add", graph.op("Mul", heads, cos), imaginary)
        return str(graph.op("Reshape", turned, graph.ints(-1, num_heads * size)))

    def _activated(self, graph: Graph, x: str) -> str:
        act = self.block.mlp.act
        gelu = gelu_kind(act)
        if gelu is not None:
            return str(graph.op("Gelu", x, approximate=gelu))
        kind = type(act).__name__.removesuffix("Module")
        if kind in ("SiLU", "Swish"):
            return str(graph.op("Mul", x, graph.op("Sigmoid", x)))
        if kind in ("Sigmoid", "ReLU", "Tanh"):
            return str(graph.op({"Sigmoid": "Sigmoid", "ReLU": "Relu", "Tanh": "Tanh"}[kind], x))
        if kind == "QuickGELU":
            gate = graph.op("Sigmoid", graph.op("Mul", x, graph.constant(1.702, np.float32)))
            return str(graph.op("Mul", x, gate))
        raise ValueError(f"export to ONNX does not know the activation {type(act).__name__} of the backbone's MLP")


def _standard_attention(graph: Graph, q: str, k: str, v: str, heads: tuple[int, int], scale: float) -> str:
    """q: (m, H*D); k, v: (n, H*D); heads: (H, D) -> (m, H*D)."""
    q, k, v = (
        graph.op("Transpose", graph.op("Reshape", part, graph.ints(-1, *heads)), perm=perm)
        for part, perm in ((q, [1, 0, 2]), (k, [1, 2, 0]), (v, [1, 0, 2]))
    )
    scores = graph.op("MatMul", graph.op("Mul", q, graph.constant(scale, np.float32)), k)  # (H, m, n)
    out = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
    return str(graph.op("Reshape", graph.op("Transpose", out, perm=[1, 0, 2]), graph.ints(-1, heads[0] * heads[1])))
