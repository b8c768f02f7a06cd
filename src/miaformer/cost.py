"""What decisions cost: multiply-accumulates (MACs) of matrix products, the number `torch.utils.flop_counter` halves.

One formula serves all: boolean decisions give exact integers, floating-point gates a differentiable cost, and per
block n kept rows, k kept heads of D channels, C = embed_dim, m rows that are read afterwards (n, or only the prefix
in the last block of a class-token model):

    query m C kD + key and value 2 n C kD + attention 2 m n kD + projection m kD C + MLP m (in hidden + hidden out)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from miaformer.decisions import Gates, MlpWidth


def count_macs(call: Callable[[], Any]) -> int:
    """The MACs that a call really executes, counted by `torch.utils.flop_counter`."""
    # The counter (torch 2.14) does not know the CPU's fused attention kernel: same product, same formula.
    fused_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    counter = FlopCounterMode(display=False, custom_mapping={fused_on_cpu: attention_flops})
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
    head_dim: int  # D
    mlp_hidden: int
    mlp_inputs: int  # input projections of the MLP: 1, or 2 where it is gated
    num_prefix_tokens: int  # P
    num_patches: int  # N
    mlp_width: MlpWidth
    trims_last_block: bool  # only prefix rows are read after the last block
    embed_macs: int  # patch embedding
    head_macs: int  # pooling and classifier

    def block(self, index: int, gates: Gates) -> Tensor:
        """MACs (B,) of block `index` under `gates`: int64 for boolean gates, else differentiable."""
        depth, heads, tokens = (_countable(g) for g in (gates.depth, gates.heads, gates.tokens))
        kept_rows = self.num_prefix_tokens + tokens.sum(dim=1)
        kept_channels = heads.sum(dim=1) * self.head_dim
        macs = self._rows_and_width(index, kept_rows, kept_channels, self._mlp_row(heads))
        return depth * macs

    def _mlp_row(self, heads: Tensor) -> Tensor | int:
        """MACs of the MLP for one row. heads: (B, H)."""
        dim, hidden, inputs = self.embed_dim, self.mlp_hidden, self.mlp_inputs
        if self.mlp_width == "full":
            return (inputs + 1) * dim * hidden
        kept_hidden = (heads * heads.new_tensor(group_sizes(hidden, self.num_heads))).sum(dim=1)
        kept_dim: Tensor | int = dim
        if self.mlp_width == "coupled":
            kept_dim = (heads * heads.new_tensor(group_sizes(dim, self.num_heads))).sum(dim=1)
        return (inputs + 1) * kept_dim * kept_hidden

    def _rows_and_width(self, index: int, rows: Any, channels: Any, mlp_row: Any) -> Any:
        dim = self.embed_dim
        read = self.num_prefix_tokens if self.trims(index) else rows
        qkv = dim * channels * (read + 2 * rows)
        attention = 2 * read * rows * channels
        return qkv + attention + read * (channels * dim + mlp_row)

    def trims(self, index: int) -> bool:
        return self.trims_last_block and index == self.depth - 1

    @property
    def fixed(self) -> int:
        """What every image pays whatever is decided, controllers aside."""
        return self.embed_macs + self.head_macs

    @property
    def backbone(self) -> int:
        """The static ViT's MACs: the 1.0 of every fraction. It computes all rows of its last block."""
        rows = self.num_prefix_tokens + self.num_patches
        dim = self.embed_dim
        block = 3 * rows * dim * dim + 2 * rows * rows * dim + rows * dim * dim
        block += rows * (self.mlp_inputs + 1) * dim * self.mlp_hidden
        return self.depth * block + self.fixed


def _countable(gate: Tensor) -> Tensor:
    return gate.long() if gate.dtype == torch.bool else gate
