"""What decisions cost: multiply-accumulates (MACs) of matrix products, the number `torch.utils.flop_counter` halves.

One formula serves all: boolean decisions give exact integers, floating-point gates a differentiable cost, and per
block n kept rows, k kept heads of D channels, C = embed_dim, m rows that are read afterwards (n, or only the prefix
in the last block of a class-token model):

    query m C kD + key and value 2 n C kD + attention 2 m n kD + projection m kD C + MLP m (in hidden + hidden out)

Keys and values that heads share are made for all heads, whichever of these are kept: there k is `num_kv_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miaformer.engine.decisions import Gates, HostGates, MlpWidth
from miaformer.vit.layers import is_gated, num_kv_heads

Counts = NDArray[np.int64]


def count_macs(call: Callable[[], Any]) -> int:
    """The MACs that a call really executes, counted by `torch.utils.flop_counter`.

    What the counter does not know of the CPU's fused kernels `engine.products` has told it.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = cast(Any, _NoModules())
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


class _NoModules:
    """In place of the counter's module tracker (torch 2.14), which fails where a parameter's view enters a module.

    Without gradients such a view says that it requires them and has no gradient function. timm's attention pooling
    hands one over.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def group_sizes(width: int, num_heads: int) -> tuple[int, ...]:
    """`width` units split into H contiguous groups, one a head, as even as possible."""
    edges = [j * width // num_heads for j in range(num_heads + 1)]
    return tuple(b - a for a, b in pairwise(edges))


@dataclass(frozen=True)
class Cost:
    """The sizes of one adapted ViT at one image size, and what follows from them. All counts are per image."""

    depth: int  # L
    embed_dim: int  # C
    num_heads: int  # H
    num_kv_heads: tuple[int, ...]  # of each block, of keys and values: fewer than H where heads share them
    head_dim: int  # D
    mlp_hidden: int
    mlp_inputs: int  # input projections of the MLP: 1, or 2 where it is gated
    num_prefix_tokens: int  # P
    grid: tuple[int, int]  # rows and columns of the patch tokens
    mlp_width: MlpWidth
    trims_last_block: bool  # only prefix rows are read after the last block
    embed_macs: int  # patch embedding
    head_macs: int  # pooling and classifier

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def block(self, index: int, gates: Gates) -> Tensor:
        """MACs (B,) of block `index` under `gates`: int64 for boolean gates, else differentiable."""
        depth, heads, tokens = (_countable(g) for g in (gates.depth, gates.heads, gates.tokens))
        rows = self.num_prefix_tokens + tokens.sum(1)
        macs: Tensor = depth * self._of_rows(index, rows, heads)
        return macs

    def of_host(self, index: int, gates: HostGates) -> Counts:
        """The same (B,) int64 of gates on the host."""
        rows = self.num_prefix_tokens + gates.tokens.sum(axis=1, dtype=np.int64)
        macs: Counts = gates.depth * self._of_rows(index, rows, gates.heads.astype(np.int64))
        return macs

    def of_blocks(self, gates: Sequence[HostGates]) -> Counts:
        """MACs (B,) int64 of all blocks together, in one go where blocks are alike."""
        if min(self.num_kv_heads) < self.num_heads:
            return np.sum([self.of_host(index, one) for index, one in enumerate(gates)], axis=0)
        depth = np.concatenate([g.depth for g in gates])  # (L * B,), and so on
        heads = np.concatenate([g.heads for g in gates]).astype(np.int64)
        rows = self.num_prefix_tokens + np.concatenate([g.tokens for g in gates]).sum(axis=1, dtype=np.int64)
        read = rows.copy()
        batch = len(gates[0].depth)
        if self.trims_last_block:
            read[len(read) - batch :] = self.num_prefix_tokens
        executed = self._rows_and_heads(rows, read, heads, self.num_heads)
        macs: Counts = (depth * executed).reshape(len(gates), batch).sum(axis=0)
        return macs

    def _of_rows(self, index: int, rows: Any, heads: Any) -> Any:
        """Of block `index`, executed on so many rows under heads (B, H)."""
        read = self.num_prefix_tokens if self.trims(index) else rows
        return self._rows_and_heads(rows, read, heads, self.num_kv_heads[index])

    def _rows_and_heads(self, rows: Any, read: Any, heads: Any, num_kv_heads: int) -> Any:
        """Of executed blocks. rows: those kept; read: those of them that are read afterwards; heads: (..., H).

        Numbers of any kind, torch's or numpy's.
        """
        dim, channels = self.embed_dim, heads.sum(1) * self.head_dim
        key_channels = channels if num_kv_heads == self.num_heads else num_kv_heads * self.head_dim
        qkv = dim * (read * channels + 2 * rows * key_channels)
        attention = 2 * read * rows * channels
        return qkv + attention + read * (channels * dim + self._mlp_row(heads))

    def _mlp_row(self, heads: Any) -> Any:
        """MACs of the MLP for one row. heads: (B, H)."""
        dim, hidden, inputs = self.embed_dim, self.mlp_hidden, self.mlp_inputs
        if self.mlp_width == "full":
            return (inputs + 1) * dim * hidden
        kept_dim = _units(heads, dim) if self.mlp_width == "coupled" else dim
        return (inputs + 1) * kept_dim * _units(heads, hidden)

    def trims(self, index: int) -> bool:
        return self.trims_last_block and index == self.depth - 1

    @property
    def fixed(self) -> int:
        """What every image pays whatever is decided, controllers aside."""
        return self.embed_macs + self.head_macs

    @property
    def everything(self) -> int:
        """What executing everything takes: the backbone without the rows of its last block that nobody reads."""
        return self.first(self.depth)

    def first(self, blocks: int) -> int:
        """What executing everything of so many first blocks takes, and nothing of the others."""
        rows, heads = np.array([self.num_prefix_tokens + self.num_patches]), np.ones((1, self.num_heads), np.int64)
        return int(sum(self._of_rows(index, rows, heads) for index in range(blocks))[0]) + self.fixed

    @cached_property
    def backbone(self) -> int:
        """The static ViT's MACs: the 1.0 of every fraction. It computes all rows of its last block."""
        return replace(self, trims_last_block=False).everything

    def key_channels(self, index: int) -> int:
        """Of the keys of block `index`, and as many of its values."""
        return self.num_kv_heads[index] * self.head_dim


def _countable(gate: Tensor) -> Tensor:
    return gate.long() if gate.dtype == torch.bool else gate


def _units(heads: Any, width: int) -> Any:
    """How many of `width` units heads (B, H) keep: (B,)."""
    num_heads = heads.shape[1]
    if width % num_heads == 0:
        return heads.sum(1) * (width // num_heads)
    sizes = group_sizes(width, num_heads)
    return (heads * (heads.new_tensor(sizes) if isinstance(heads, Tensor) else np.array(sizes))).sum(1)


def cost_of(backbone: Any, image_size: tuple[int, int], mlp_width: MlpWidth) -> Cost:
    """Of a timm ViT on the meta device, for images of this size (H, W)."""
    image = torch.empty(1, backbone.in_chans, *image_size, device="meta")
    grid = backbone.patch_embed.dynamic_feat_size(image_size)
    prefix, dim = backbone.num_prefix_tokens, backbone.embed_dim
    features = torch.empty(1, prefix + grid[0] * grid[1], dim, device="meta")
    attn, mlp = backbone.blocks[0].attn, backbone.blocks[0].mlp
    distilled = isinstance(backbone, VisionTransformerDistilled)
    return Cost(
        depth=len(backbone.blocks),
        embed_dim=dim,
        num_heads=attn.num_heads,
        num_kv_heads=tuple(num_kv_heads(block.attn) for block in backbone.blocks),
        head_dim=attn.head_dim,
        mlp_hidden=mlp.fc2.in_features,
        mlp_inputs=2 if is_gated(mlp) else 1,
        num_prefix_tokens=prefix,
        grid=(int(grid[0]), int(grid[1])),
        mlp_width=mlp_width,
        trims_last_block=distilled or (backbone.global_pool == "token" and backbone.attn_pool is None),
        embed_macs=count_macs(lambda: backbone.patch_embed(image)),
        head_macs=count_macs(lambda: backbone.forward_head(features)),
    )
