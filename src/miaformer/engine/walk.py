"""The one way through the blocks: [policy -> gates -> cap -> block] x L, for every execution and every policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.engine.cap import RemainingMacs
from miaformer.engine.cost import Cost, Counts
from miaformer.engine.decisions import Booleans, Decisions, Gates, HostGates, Rules, from_host


@dataclass(frozen=True)
class State:
    """What a policy sees before block `index`."""

    index: int
    x: Tensor  # (B, P+N, C), the block's input
    active: Tensor  # (B, N), the patch tokens that can be kept: bool on the host, or gates where gates are numbers
    affordable: Tensor | None  # (B,) bool on the host, images that have not left and pay for its least; None: all
    num_prefix_tokens: int
    num_heads: int
    num_blocks: int
    grid: tuple[int, int]  # rows and columns of the patch tokens
    block: Any = None  # the one about to be executed

    @property
    def num_patches(self) -> int:
        return self.active.shape[1]


class Policy(Protocol):
    """Makes the gates of one block after the other, and says what making them costs.

    One whose attribute `relaxed` is true makes gates that are numbers, through which training differentiates
    (`MIAFormer.walk`).
    """

    def decide(self, state: State) -> Gates | HostGates: ...

    def context_macs(self, cost: Cost, index: int) -> int:
        """MACs that deciding block `index` takes for every image."""
        ...

    def token_score_macs(self, cost: Cost, index: int) -> int:
        """MACs that it takes for each active token of an image that executes the block."""
        ...


class Execution(Protocol):
    """Executes the gates of block `index`: x (B, P+N, C) -> (B, P+N, C).

    Boolean gates come in effective form, on the host; floating-point ones only to masked execution.
    """

    def __call__(self, index: int, block: Any, x: Tensor, gates: Gates | HostGates) -> Tensor: ...


@dataclass(frozen=True)
class Steps:
    """What a walk did: the gates of every block and the MACs (B,) of everything, floating point if gates were."""

    gates: Sequence[Gates | HostGates]
    macs: Tensor

    def decisions(self) -> Decisions:
        device = self.macs.device

        def stacked(name: str) -> Tensor:
            parts = [getattr(g, name) for g in self.gates]
            if isinstance(parts[0], np.ndarray):
                return from_host(np.stack(parts, axis=1), device)
            return torch.stack([part > 0 for part in parts], dim=1)

        return Decisions(stacked("depth"), stacked("heads"), stacked("tokens"))


def walk(
    blocks: Sequence[Any],
    x: Tensor,
    policy: Policy,
    execution: Execution,
    cost: Cost,
    rules: Rules,
    cap_macs: Counts | None = None,
) -> tuple[Tensor, Steps]:
    """Take embedded tokens x (B, P+N, C) through all blocks, by boolean gates. cap_macs: (B,) int64.

    Gates are brought into effective form (`HostGates.effective`) and cut to the cap. Sparse execution may write into x.
    """
    ledger = _Ledger(cost, policy, len(x), rules, cap_macs)
    active: Booleans = np.ones((len(x), cost.num_patches), dtype=bool)
    taken: list[HostGates] = []
    for index, block in enumerate(blocks):
        affordable = ledger.affordable(index, active)
        if rules.leaves and taken:
            stayed = taken[-1].depth
            affordable = stayed if affordable is None else affordable & stayed
        pays = None if affordable is None else torch.from_numpy(affordable)
        asked = HostGates.of(policy.decide(_state(index, block, x, torch.from_numpy(active), pays, cost)))
        if affordable is not None:
            asked = replace(asked, depth=asked.depth & affordable, is_effective=False)
        ledger.pay_for_scores(index, active, asked.depth)
        gates = ledger.cut(index, asked.effective(active, cost.num_prefix_tokens, rules), rules)
        if rules.progressive:
            active = gates.tokens if gates.depth.all() else np.where(gates.depth[:, None], gates.tokens, active)
        x = execution(index, block, x, gates)
        taken.append(gates)
    return x, Steps(taken, torch.from_numpy(ledger.macs + cost.of_blocks(taken)).to(x.device))


def relaxed_walk(
    blocks: Sequence[Any], x: Tensor, policy: Policy, execution: Execution, cost: Cost, rules: Rules
) -> tuple[Tensor, Steps]:
    """The same by gates that are numbers, through which training differentiates: their MACs too.

    The semantics' rules are the policy's own responsibility, and there is no cap.
    """
    exact = torch.promote_types(x.dtype, torch.float32)  # counts are summed up
    active = x.new_ones((len(x), cost.num_patches), dtype=exact)
    macs: Tensor | int = cost.fixed + _context_macs(policy, cost)
    taken: list[Gates] = []
    for index, block in enumerate(blocks):
        gates = cast(Gates, policy.decide(_state(index, block, x, active, None, cost)))
        scored = active.sum(dim=1) if rules.progressive else cost.num_patches
        scoring = scored * policy.token_score_macs(cost, index) * gates.depth
        macs = macs + scoring + cost.block(index, gates)
        if rules.progressive:
            kept = gates.depth[:, None]
            active = kept * gates.tokens + (1 - kept) * active
        x = execution(index, block, x, gates)
        taken.append(gates)
    return x, Steps(taken, torch.as_tensor(macs))


def _state(index: int, block: Any, x: Tensor, active: Tensor, affordable: Tensor | None, cost: Cost) -> State:
    return State(index, x, active, affordable, cost.num_prefix_tokens, cost.num_heads, cost.depth, cost.grid, block)


def _context_macs(policy: Policy, cost: Cost) -> int:
    return sum(policy.context_macs(cost, index) for index in range(cost.depth))


class _Ledger:
    """What deciding has taken so far, in MACs, and under a cap what is left to each image."""

    def __init__(self, cost: Cost, policy: Policy, batch: int, rules: Rules, cap_macs: Counts | None) -> None:
        self.cost, self.rules = cost, rules
        self.scores = [policy.token_score_macs(cost, index) for index in range(cost.depth)]
        contexts = _context_macs(policy, cost)
        self.remaining = None if cap_macs is None else RemainingMacs(cost, cap_macs, contexts)
        self.last_scores: NDArray[Any] | None = None  # (B, N)
        self.macs: Counts = np.full(batch, cost.fixed + contexts, dtype=np.int64)

    def _scoring(self, index: int, active: Booleans) -> Counts:
        """MACs (B,) of scoring the tokens of an image that executes the block."""
        scored = active.sum(axis=1, dtype=np.int64) if self.rules.progressive else np.full(len(active), active.shape[1])
        return scored * self.scores[index]

    def affordable(self, index: int, active: Booleans) -> Booleans | None:
        return None if self.remaining is None else self.remaining.affordable(index, self._scoring(index, active))

    def pay_for_scores(self, index: int, active: Booleans, asked: Booleans) -> None:
        """Take what scoring the tokens took, for the images (B,) whose policy asked for the block."""
        if self.scores[index]:
            scoring = self._scoring(index, active) * asked
            self.macs = self.macs + scoring
            if self.remaining is not None:
                self.remaining.pay(scoring)

    def cut(self, index: int, gates: HostGates, rules: Rules) -> HostGates:
        """The gates, cut to what can be paid, and paid. Tokens that this block does not score are cut by the scores
        that they had last, where they are the same tokens still.
        """
        if self.remaining is None:
            return gates
        if rules.progressive:
            if gates.token_scores is not None:
                executed, before = gates.depth[:, None], self.last_scores
                self.last_scores = np.where(executed, gates.token_scores, 0.0 if before is None else before)
            gates = replace(gates, token_scores=self.last_scores)
        gates = self.remaining.limit(index, gates)
        self.remaining.pay(self.cost.of_host(index, gates))
        return gates
