"""Policies of other adaptive ViTs, as their papers describe them, on our blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.walk import State
from miaformer.model.policy import BestTokens, three_of


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


def token_scorers(depth: int, embed_dim: int) -> nn.ModuleList:
    """A scorer for each of the blocks that choose, nothing for the others."""
    chosen = three_of(depth)
    return nn.ModuleList(TokenScorer(embed_dim) if index in chosen else nn.Identity() for index in range(depth))


@dataclass(frozen=True)
class TopTokens(BestTokens):
    """Keeps the tokens that trained scorers rate highest, the same number for every image.

    DynamicViT (Rao et al., NeurIPS 2021) at inference.
    """

    scorers: nn.ModuleList = field(kw_only=True)

    def scores(self, state: State, active: Tensor) -> Tensor:
        scores: Tensor = self.scorers[state.index](state.x[:, state.num_prefix_tokens :], active)
        return scores

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return score_macs(self.scorers, index) if index in self.blocks else 0


def score_macs(scorers: nn.ModuleList, index: int) -> int:
    """MACs of scoring a token before block `index`."""
    scorer = scorers[index]
    return scorer.token_macs if isinstance(scorer, TokenScorer) else 0
