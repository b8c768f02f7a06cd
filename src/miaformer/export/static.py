"""A model under one policy for all images: without decisions, PyTorch's exporter can write it, for any batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.engine.block import Width, equal_block
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions, HostGates
from miaformer.export.parts import Embedding, Head, rotary_of
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size
from miaformer.vit.backbone import transformer_blocks
from miaformer.vit.layers import positioned


class StaticModel(nn.Module):
    """The model under one image's decisions (1, ...), or in a size (H, W) with everything executed.

    Raises ValueError for decisions of more than one image, and for those of another model.
    """

    def __init__(self, model: MIAFormer, decisions: Decisions | Size) -> None:
        super().__init__()
        size = None if isinstance(decisions, Decisions) else decisions
        cost = model.cost(size)
        if not isinstance(decisions, Decisions):
            decisions = Decisions.full(1, cost.depth, cost.num_heads, cost.num_patches)
        prefix, macs = cost.num_prefix_tokens, cost.fixed
        self.embed, self.head = Embedding(model, size), Head(model)
        blocks = positioned(transformer_blocks(model.backbone), rotary_of(model, size))
        self.steps = nn.ModuleList()
        order = np.arange(prefix + cost.num_patches)  # of the rows, as they lie
        for index, gates in _executed(model, cost, decisions).items():
            macs += int(cost.of_host(index, gates)[0])
            block, kept = blocks[index], np.flatnonzero(gates.heads[0]).tolist()
            read = np.concatenate([np.ones(prefix, bool), gates.tokens[0]])[order]
            width = Width.of(kept, block, cost.mlp_width, torch.device("cpu"))
            self.steps.append(_Step(block, width, read, order[read], prefix if cost.trims(index) else None))
            order = np.concatenate([order[read], order[~read]])
        self.places: Tensor
        self.register_buffer("places", torch.from_numpy(order.argsort()[: prefix if cost.trims_last_block else None]))
        self.macs_fraction = macs / model.cost().backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to logits (B, classes) and macs_fraction (B,)."""
        x = self.embed(images)
        for step in self.steps:
            x = step(x)
        return self.head(x[:, self.places]), x.new_full((len(x),), self.macs_fraction)


class _Step(nn.Module):
    """A block, executed on some of the rows. They come first afterwards, and the others, unchanged, after them."""

    def __init__(
        self, block: Any, width: Width, read: NDArray[np.bool_], places: NDArray[np.int64], read_prefix: int | None
    ) -> None:
        """read: of the rows as they lie; places: where in an image those lie."""
        super().__init__()
        self.block, self.width, self.read_prefix = block, width, read_prefix
        self.all = bool(read.all())
        self.rows: Tensor
        self.others: Tensor
        self.register_buffer("rows", torch.from_numpy(np.flatnonzero(read)))
        self.register_buffer("others", torch.from_numpy(np.flatnonzero(~read)))
        self.places: Tensor
        self.register_buffer("places", torch.from_numpy(places))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, P+N, C) -> the same, or (B, P, C) where nothing else is read afterwards."""
        rows = x if self.all else x[:, self.rows]
        changed = equal_block(self.block, rows, self.width, self.read_prefix, self.places)
        if self.all or self.read_prefix is not None:
            return changed
        return torch.cat([changed, x[:, self.others]], dim=1)


def _executed(model: MIAFormer, cost: Cost, decisions: Decisions) -> dict[int, HostGates]:
    """What is executed of the decisions, by block."""
    if len(decisions) != 1:
        raise ValueError(
            f"a static file holds the decisions of one policy for all images, got those of {len(decisions)}"
        )
    given = decisions.depth.shape[1], decisions.heads.shape[2], decisions.tokens.shape[2]
    if given != (cost.depth, cost.num_heads, cost.num_patches):
        raise ValueError(
            f"decisions for (blocks, heads, patch tokens) = {given}, the model has "
            f"{(cost.depth, cost.num_heads, cost.num_patches)}"
        )
    rules, active, executed = model.adapt_config.rules, np.ones((1, cost.num_patches), dtype=bool), {}
    for index in range(cost.depth):
        gates = HostGates.of(decisions.block(index)).effective(active, cost.num_prefix_tokens, rules)
        if gates.depth[0]:
            executed[index] = gates
            active = gates.tokens if rules.progressive else active
        elif rules.leaves:
            break
    return executed
