"""Masked execution: dense tensors, gates multiply. The reference, and what training differentiates through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miaformer.engine.block import masked_block
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, HostGates


@dataclass(frozen=True)
class Masked:
    cost: Cost

    def __call__(self, index: int, block: Any, x: Tensor, gates: Gates | HostGates) -> Tensor:
        if isinstance(gates, HostGates):
            gates = gates.to(x.device)
        return masked_block(block, x, gates, self.cost.num_prefix_tokens, self.cost.mlp_width)
