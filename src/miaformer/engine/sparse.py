"""Sparse execution: nothing skipped is computed.

Batches are packed. The kept rows of all images that execute a block stand one after another in one (T, C) matrix,
so that linear layers and norms see no padding; images that keep the same heads are neighbours and share one call;
among them images of equal length are neighbours and share one attention call. A skipped block touches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from miaformer.block import Width, packed_block
from miaformer.cost import Cost
from miaformer.decisions import Gates


@dataclass(frozen=True)
class Sparse:
    cost: Cost

    def __call__(self, index: int, block: nn.Module, x: Tensor, gates: Gates) -> Tensor:
        batch, num_rows, dim = x.shape
        prefix = self.cost.num_prefix_tokens
        read_prefix = prefix if self.cost.trims(index) else None
        plans = _plan(gates, prefix)
        if not plans:
            return x
        flat = x.reshape(batch * num_rows, dim)
        everything = len(plans) == 1 and sum(plans[0].lengths) == batch * num_rows
        if everything and read_prefix is None:
            width = Width.of(plans[0].kept_heads, block, self.cost.mlp_width, x.device)
            out = packed_block(block, flat, width, plans[0].lengths, None, self.cost.mlp_width)
            return out.view_as(x)
        keys = torch.cat([gates.tokens.new_ones(batch, prefix), gates.tokens], dim=1)
        in_place = not (torch.is_grad_enabled() and x.requires_grad)
        result = flat
        for plan in plans:
            images = torch.tensor(plan.images, device=x.device)
            kept = keys[images].nonzero()  # (T, 2): position in `images`, row of the image
            rows = images[kept[:, 0]] * num_rows + kept[:, 1]
            width = Width.of(plan.kept_heads, block, self.cost.mlp_width, x.device)
            out = packed_block(block, flat[rows], width, plan.lengths, read_prefix, self.cost.mlp_width)
            written = rows if read_prefix is None else rows[kept[:, 1] < read_prefix]
            out = out.to(flat.dtype)
            result = result.index_copy_(0, written, out) if in_place else result.index_copy(0, written, out)
        return result.view_as(x)


@dataclass(frozen=True)
class _Plan:
    """Images that share one call."""

    kept_heads: tuple[int, ...]
    images: list[int]  # sorted by length
    lengths: list[int]  # rows of each of them


def _plan(gates: Gates, num_prefix_tokens: int) -> list[_Plan]:
    """Executing images, grouped by the heads they keep. One host copy of the decisions is all that it needs."""
    rows = (gates.tokens.sum(dim=1) + num_prefix_tokens) * gates.depth
    table = torch.cat([rows[:, None], gates.heads.long()], dim=1).tolist()
    executing = [
        (tuple(head for head, kept in enumerate(heads) if kept), length, image)
        for image, (length, *heads) in enumerate(table)
        if length
    ]
    executing.sort()
    plans = []
    for kept_heads, group in groupby(executing, key=lambda entry: entry[0]):
        members = list(group)
        plans.append(_Plan(kept_heads, [image for *_, image in members], [length for _, length, _ in members]))
    return plans
