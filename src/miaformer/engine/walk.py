"""The one way through the blocks: [policy -> gates -> cap -> block] x L, for every execution and every policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from miaformer.cost import Cost
from miaformer.decisions import Decisions, Gates, HeadChoice, TokenScope, effective
from miaformer.engine.cap import Purse


@dataclass(frozen=True)
class State:
    """What a policy sees before block `index`."""

    index: int
    x: Tensor  # (B, P+N, C), the block's input
    active: Tensor  # (B, N), the patch tokens that can be kept: bool, or gates where gates are
    affordable: Tensor | None  # (B,) bool, the images whose cap still pays for the least of this block; None: all
    num_prefix_tokens: int
    num_heads: int
    num_blocks: int

    @property
    def num_patches(self) -> int:
        return self.active.shape[1]


class Policy(Protocol):
    """Makes the gates of one block after the other, and says what making them costs."""

    def decide(self, state: State) -> Gates: ...

    def context_macs(self, cost: Cost, index: int) -> int:
        """MACs that deciding block `index` takes for every image."""
        ...

    def token_score_macs(self, cost: Cost, index: int) -> int:
        """MACs that it takes for each active token of an image that executes the block."""
        ...


class Execution(Protocol):
    """Carries out the gates of block `index`: x (B, P+N, C) -> (B, P+N, C)."""

    def __call__(self, index: int, block: nn.Module, x: Tensor, gates: Gates) -> Tensor: ...


@dataclass(frozen=True)
class Steps:
    """What a walk did: the gates of every block and the MACs (B,) of everything, floating point if gates were."""

    gates: list[Gates]
    macs: Tensor

    def decisions(self) -> Decisions:
        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(g, name) > 0 for g in self.gates], dim=1)

        return Decisions(stacked("depth"), stacked("heads"), stacked("tokens"))


def walk(
    blocks: nn.Sequential,
    x: Tensor,
    policy: Policy,
    execution: Execution,
    cost: Cost,
    token_scope: TokenScope,
    head_choice: HeadChoice,
    cap_macs: Tensor | None = None,
) -> tuple[Tensor, Steps]:
    """Take embedded tokens x (B, P+N, C) through all blocks.

    Boolean gates are brought into effective form (`decisions.effective`) and cut to the cap; floating-point gates
    (training) are the policy's own responsibility.
    """
    batch = len(x)
    active = torch.ones(batch, cost.num_patches, dtype=torch.bool, device=x.device)
    macs: Tensor = torch.full((batch,), cost.fixed, dtype=torch.int64, device=x.device)
    contexts = [policy.context_macs(cost, index) for index in range(cost.depth)]
    scores = [policy.token_score_macs(cost, index) for index in range(cost.depth)]
    purse = None if cap_macs is None else Purse(cost, cap_macs, sum(contexts))
    taken: list[Gates] = []
    for index, block in enumerate(blocks):
        scored = active.sum(dim=1) if token_scope == "progressive" else active.new_ones(()) * cost.num_patches
        scoring = scored * scores[index]
        affordable = None if purse is None else purse.affordable(index, scoring)
        gates = policy.decide(State(index, x, active, affordable, cost.num_prefix_tokens, cost.num_heads, cost.depth))
        boolean = gates.depth.dtype == torch.bool
        if boolean:
            depth = gates.depth if affordable is None else gates.depth & affordable
            gates = Gates(depth, gates.heads, gates.tokens, gates.token_scores)
            gates = effective(gates, active, cost.num_prefix_tokens, head_choice)
            scoring = scoring * depth
        else:
            scoring = scoring * gates.depth
        if purse is not None:
            purse.pay(scoring)
            gates = purse.limit(index, gates)
        spent = cost.block(index, gates)
        if purse is not None:
            purse.pay(spent)
        macs = macs + contexts[index] + scoring + spent
        x = execution(index, block, x, gates)
        taken.append(gates)
        if token_scope == "progressive":
            if boolean:
                active = torch.where(gates.depth[:, None], gates.tokens, active)
            else:
                kept = gates.depth[:, None]
                active = kept * gates.tokens + (1 - kept) * active.to(kept.dtype)
    return x, Steps(taken, macs)
