"""Rivals in training: how what they decide at inference is learned (see `miaformer.lab.baselines`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, straight_through
from miaformer.engine.walk import State
from miaformer.lab.baselines.policies import score_macs
from miaformer.model.policy import three_of
from miaformer.training.gates import Draws

LEAST_KEEP = 0.05  # of the active tokens, at each of three blocks: a quarter of the MACs


def drawn_keep(draws: Draws) -> Tensor:
    """The share of tokens (B,) that each image keeps at each block that chooses; all of `draws.full`."""
    return torch.where(draws.full, 1.0, LEAST_KEEP + (1 - LEAST_KEEP) * draws.rates[:, 2])


@dataclass
class RelaxedTopTokens:
    """`TopTokens` in training: scores get Gumbel noise, the best are kept, and gradients flow through a sigmoid.

    keep: (B,), share of the active tokens that stays at each block that chooses.
    """

    scorers: nn.ModuleList
    keep: Tensor
    draws: Draws
    temperature: float

    def decide(self, state: State) -> Gates:
        x = state.x.detach()
        active = state.active.to(x.device, x.dtype)
        ones = x.new_ones(len(x))
        heads = x.new_ones(len(x), state.num_heads)
        if state.index not in three_of(state.num_blocks):
            return Gates(ones, heads, active)
        here = active.detach() > 0
        scores = self.scorers[state.index](x[:, state.num_prefix_tokens :], here)
        gumbel = -(-self.draws.tokens[:, state.index].log()).log()
        noisy = (scores + self.temperature * gumbel).masked_fill(~here, float("-inf"))
        count = (here.sum(dim=1) * self.keep).round().long()
        ordered = noisy.sort(dim=1, descending=True).values
        last = ordered.gather(1, (count - 1).clamp(min=0)[:, None]).detach()
        hard = ((noisy >= last) & here & (count > 0)[:, None]).to(x.dtype)
        soft = torch.sigmoid(torch.where(here, noisy - last, 0.0))
        kept = straight_through(hard, soft) * active
        return Gates(ones, heads, torch.where(self.draws.full[:, None], active, kept))

    def context_macs(self, cost: Cost, index: int) -> int:
        return 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return score_macs(self.scorers, index)
