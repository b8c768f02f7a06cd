"""Who decides: one tiny network a block reads the block's input and the price, and gives the logits of its gates.

A factorised Bernoulli policy, coarse to fine: execute the block? then how many heads, then which tokens. Pooled
active tokens and the prefix tokens give a context; the context and the price give the depth and head logits; context
and token give the token logits, by a product of rank `rank`. The log-price has a path of its own to every logit, with
a positive slope: whatever the context says, a higher price means less compute. So has difficulty, which each context
learns to tell: where nothing else is known, harder images get more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.engine.dither import dither

ALWAYS = 1000.0  # the logit of what is not decided: no price, and no gradient, reaches so far
KEEP_LOGIT = 3.0  # untrained controllers keep with probability 0.95 at a log-price of 0
STAY_LOGIT = 1.0  # the same of nested depth: images leave from the start, or tokens alone learn to save
LOGIT_BOUND = 6.0  # what content can say; bounded, so that no gate saturates beyond return
DIFFICULTY_BOUND = 3.0  # standard deviations
DIFFICULTY_GAIN = 0.5  # what a standard deviation of difficulty adds to every logit, to begin with
STAY_GAIN = 1.5  # the same of nested depth
HEAD_SLOPE = 0.4  # of nested depth: how much less than tokens and depth heads mind the price, to begin with
PRICE_FEATURES = 8
LOG_PRICE_RANGE = (-6.0, 12.0)  # where training sets prices, and features tell them apart
LEAST_LOG_PRICE = -16.0  # below that range the straight path to each logit goes on, until everything is kept


def price_features(log_price: Tensor) -> Tensor:
    """Radial features (B, PRICE_FEATURES) of a log-price (B,)."""
    low, high = LOG_PRICE_RANGE
    centres = torch.linspace(low, high, PRICE_FEATURES, device=log_price.device, dtype=log_price.dtype)
    width = (high - low) / (PRICE_FEATURES - 1)
    return torch.exp(-0.5 * ((log_price.clamp(low, high)[:, None] - centres) / width) ** 2)


@dataclass(frozen=True)
class Logits:
    """What a controller says of one block."""

    depth: Tensor  # (B,)
    heads: Tensor  # (B, H)
    tokens: Tensor | None  # (B, N), or None where they are not decided
    difficulty: Tensor  # (B,)


class Layer(nn.Linear):
    """Stays as it is where a model is quantised layer by layer, by type: controllers are small, and read exactly."""


class Controller(nn.Module):
    """Logits of one block's gates.

    embed_dim: C; num_heads: H; hidden: width of the context; rank: of the token product, 0 where tokens are not
    decided. With `nested`, head j is kept only if head j-1 is: head logits are those of going on. depth, heads: whether
    these are decided; else they are always kept. dithers: whether tokens have thresholds of their own. leaves: whether
    an image that skips the block skips all that follow. even: whether these thresholds alone tell tokens of an image
    apart, not what is in them.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden: int, rank: int, nested: bool, depth: bool = True,
        heads: bool = True, dithers: bool = True, leaves: bool = False, even: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        stay, gain = (STAY_LOGIT, STAY_GAIN) if leaves else (KEEP_LOGIT, DIFFICULTY_GAIN)
        self.keep_logits = (stay if depth else ALWAYS, KEEP_LOGIT if heads else ALWAYS, KEEP_LOGIT)
        self.embed_dim = embed_dim
        self.rank = rank
        self.nested = nested
        self.dithers = dithers
        self.even = even
        self.pooled = Layer(2 * embed_dim, hidden)
        self.price = Layer(PRICE_FEATURES, hidden, bias=False)
        self.gates = Layer(hidden, 1 + num_heads)
        slopes = (1.0, HEAD_SLOPE if leaves else 1.0, 1.0)
        self.slope = nn.Parameter(torch.tensor([_inverse_softplus(value) for value in slopes]))  # depth, heads, tokens
        self.difficulty = Layer(hidden, 1)
        gains = [_inverse_softplus(value) for value in (gain, DIFFICULTY_GAIN, DIFFICULTY_GAIN)]
        self.gain = nn.Parameter(torch.tensor(gains))  # depth, heads, tokens
        if rank:
            self.query = Layer(hidden, rank + 1)  # + 1: a bias that all tokens share
            self.key = Layer(embed_dim, rank, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        nn.init.zeros_(self.price.weight)
        nn.init.zeros_(self.difficulty.weight)
        nn.init.zeros_(self.difficulty.bias)
        if self.rank:
            nn.init.zeros_(self.query.weight)
            nn.init.normal_(self.query.bias, std=0.02)
            nn.init.zeros_(self.query.bias[-1:])
            nn.init.normal_(self.key.weight, std=self.key.in_features**-0.5)
            if self.even:  # and no gradient reaches it
                nn.init.zeros_(self.key.weight)

    @cached_property
    def context_macs(self) -> int:
        """For each image: the products of context, difficulty, gates, and, as inference has them, of what tokens are
        compared with (see `folded`).
        """
        layers = [self.pooled, self.difficulty, self.gates]
        products = sum(layer.in_features * layer.out_features for layer in layers)
        return products + (self.query.in_features * (1 + self.embed_dim) if self.rank else 0)

    @cached_property
    def token_score_macs(self) -> int:
        """For each token scored."""
        return self.embed_dim if self.rank else 0

    def context(self, x: Tensor, active: Tensor, num_prefix_tokens: int, log_price: Tensor) -> Tensor:
        """What the logits are read from. x: (B, P+N, C); active: (B, N); log_price: (B,) -> (B, hidden)."""
        patches = x[:, num_prefix_tokens:]
        weight = active.to(x.dtype).unsqueeze(-1)
        pooled = (patches * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        prefix = x[:, :num_prefix_tokens].mean(dim=1) if num_prefix_tokens else pooled
        seen = torch.cat([_normalise(pooled), _normalise(prefix)], dim=1)
        return F.gelu(self.pooled(seen) + self.price_part(log_price))

    def price_part(self, log_price: Tensor) -> Tensor:
        """The price's part (B, hidden) of contexts, before their activation; no product: no image is in it."""
        features = price_features(log_price).to(self.price.weight.dtype)
        return (features[:, None] * self.price.weight).sum(dim=2)

    def predicted_difficulty(self, context: Tensor) -> Tensor:
        """How hard the images are for the dense model, standardised: (B,), within -3 and 3."""
        return DIFFICULTY_BOUND * torch.tanh(self.difficulty(context).squeeze(1) / DIFFICULTY_BOUND)

    def shift(self, difficulty: Tensor, log_price: Tensor) -> Tensor:
        """What difficulty (B,) and price (B,) add to the logits of depth, heads and tokens: (B, 3)."""
        return F.softplus(self.gain) * difficulty[:, None] - F.softplus(self.slope) * log_price[:, None]

    def depth_and_heads(self, context: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B,) of executing the block and (B, H) of its heads; the first nested head is always kept."""
        logits = _bounded(self.gates(context))
        depth, heads, _ = self.keep_logits
        return logits[:, 0] + depth + shift[:, 0], logits[:, 1:] + heads + shift[:, 1:2]

    def most_likely_heads(self, logits: Tensor) -> Tensor:
        """The heads (B, H) bool that are kept rather than not, at least one. logits: (B, H)."""
        kept = logits > 0
        best = torch.zeros_like(kept)
        if self.nested:
            best[:, 0] = True
            return (kept | best).cumprod(dim=1).bool()
        return kept | best.scatter_(1, logits.argmax(dim=1, keepdim=True), True)

    def token_query(self, context: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens are compared with, (B, rank), and the part of their logits that they share, (B,)."""
        query = self.query(context)
        return query[:, :-1], KEEP_LOGIT + _bounded(query[:, -1]) + shift[:, 2]

    def thresholds(self, grid: tuple[int, int]) -> NDArray[np.float32]:
        """What their place adds to the logits of patch tokens, (N,), in a grid of so many rows and columns."""
        return dither(*grid) if self.dithers else np.zeros(grid[0] * grid[1], np.float32)

    def token_logits(self, tokens: Tensor, query: Tensor, shared: Tensor) -> Tensor:
        """Logits (...) of keeping tokens (..., C), given query (..., rank) and shared part (...) of their images.

        Without `thresholds`: these belong to the shared part.
        """
        if self.even:
            return shared.expand(tokens.shape[:-1])
        return _bounded((self.key(_normalise(tokens)) * query).sum(dim=-1)) + shared

    def logits(
        self,
        x: Tensor,
        active: Tensor,
        num_prefix_tokens: int,
        log_price: Tensor,
        grid: tuple[int, int],
        through_difficulty: bool,
    ) -> Logits:
        """All of them, dense, with gradients. x: (B, P+N, C); active: (B, N) bool; log_price: (B,); grid: of patches.

        through_difficulty: whether gradients of gates lead to the prediction of difficulty. Not in training: it learns
        from what is hard, not from what pays; what pays sets its gain.
        """
        context = self.context(x, active, num_prefix_tokens, log_price)
        difficulty = self.predicted_difficulty(context)
        shift = self.shift(difficulty if through_difficulty else difficulty.detach(), log_price)
        depth, heads = self.depth_and_heads(context, shift)
        tokens = None
        if self.rank:
            query, shared = self.token_query(context, shift)
            shared = shared[:, None] + torch.tensor(self.thresholds(grid), dtype=shared.dtype, device=shared.device)
            tokens = self.token_logits(x[:, num_prefix_tokens:], query[:, None], shared)
        return Logits(depth, heads, tokens, difficulty)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _bounded(logits: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)
