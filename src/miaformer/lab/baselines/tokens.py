"""The best tokens, at a quarter, half and three quarters of the depth: as they are chosen, and as that is trained.

By trained scorers: DynamicViT (Rao et al., NeurIPS 2021). By class attention: EViT (Liang et al., ICLR 2022), whose
policy is `miaformer.model.policy.ClsAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, straight_through
from miaformer.engine.masked import Masked
from miaformer.engine.walk import Execution, Policy, State
from miaformer.evaluation.controls import tokens_at_budget
from miaformer.model.model import MIAFormer
from miaformer.model.policy import BestTokens, ClsAttention, three_of
from miaformer.training.objective import Step, UnderPolicy
from miaformer.training.policies import Draws

LEAST_KEEP = 0.05  # in training, of the active tokens at each of three blocks: a quarter of the MACs


class TokenScorer(nn.Module):
    """Scores a token by itself and by the mean of those that are active: DynamicViT's predictor, a quarter as wide.

    At its full width it would take a tenth of the MACs of a backbone of few channels.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.width = max(embed_dim // 4, 1)
        self.read = nn.Linear(embed_dim, 2 * self.width)
        self.score = nn.Linear(2 * self.width, 1)

    @property
    def token_macs(self) -> int:
        return self.read.in_features * self.read.out_features + self.score.in_features

    def forward(self, tokens: Tensor, active: Tensor) -> Tensor:
        """tokens: (B, N, C); active: (B, N) -> (B, N), of tokens that are not active 0."""
        image, token = (active > 0).nonzero(as_tuple=True)
        rows = tokens[image, token]
        local, own = F.gelu(self.read(F.layer_norm(rows, rows.shape[-1:]))).split(self.width, dim=-1)
        total = own.new_zeros(len(tokens), self.width).index_add(0, image, own)
        mean = total / (active > 0).sum(dim=1, keepdim=True).clamp(min=1)
        score = self.score(torch.cat([local, mean[image]], dim=-1)).squeeze(-1)
        return score.new_zeros(active.shape).index_put((image, token), score)


def add_scorers(model: MIAFormer) -> None:
    """Give the model a scorer for each of the blocks that choose, beside its controllers, which nothing asks."""
    depth = len(model.backbone.blocks)
    parts = [TokenScorer(model.embed_dim) if index in three_of(depth) else nn.Identity() for index in range(depth)]
    model.add_module("scorers", nn.ModuleList(parts))


def scorers_of(model: MIAFormer) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule("scorers"))


@dataclass(frozen=True)
class TopTokens(BestTokens):
    """Keeps the tokens that trained scorers rate highest, the same number for every image: DynamicViT at inference."""

    scorers: nn.ModuleList = field(kw_only=True)

    def scores(self, state: State, active: Tensor) -> Tensor:
        scores: Tensor = self.scorers[state.index](state.x[:, state.num_prefix_tokens :], active)
        return scores

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return score_macs(self.scorers, index) if self.chooses(index, cost.depth) else 0


def score_macs(scorers: nn.ModuleList, index: int) -> int:
    """MACs of scoring a token before block `index`."""
    scorer = scorers[index]
    return scorer.token_macs if isinstance(scorer, TokenScorer) else 0


def top_tokens_policy(model: MIAFormer, budget: float) -> TopTokens:
    """DynamicViT's token selection at `budget`, by the scorers that `add_scorers` gave the model."""
    return tokens_at_budget(model, lambda keep: TopTokens(keep, scorers=scorers_of(model)), budget)


# Training -------------------------------------------------------------------------------------------------------------


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
    relaxed: ClassVar[bool] = True

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


class TopTokensObjective(UnderPolicy):
    """Scorers and weights together."""

    @staticmethod
    def deciders(model: MIAFormer) -> Sequence[nn.Module]:
        return (scorers_of(model),)

    def policy(self, step: Step, cost: Cost) -> Policy:
        return RelaxedTopTokens(scorers_of(self.model), drawn_keep(step.draws), step.draws, step.temperature)

    def execution(self, cost: Cost, images: Tensor) -> Execution:
        return Masked(cost)


class ClsAttentionObjective(UnderPolicy):
    """Weights, under class attention."""

    def policy(self, step: Step, cost: Cost) -> Policy:
        return ClsAttention(drawn_keep(step.draws))
