"""Who decides: one tiny network a block reads the block's input and the price, and gives the logits of its gates.

A factorised Bernoulli policy, coarse to fine: execute the block? then how many heads, then which tokens. Pooled
active tokens and the prefix tokens give a context; the context and the price give the depth and head logits; context
and token give the token logits, by a product of rank `rank`. The log-price has a path of its own to every logit, with
a positive slope: whatever the context says, a higher price means less compute. So has difficulty, which each context
learns to tell: where nothing else is known, harder images get more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.engine.changes import Seen
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
SQRT_HALF = 0.5**0.5
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
        """For each image: the products of context, difficulty, gates, and of what tokens are compared with."""
        layers = [self.pooled, self.difficulty, self.gates]
        products = sum(layer.in_features * layer.out_features for layer in layers)
        return products + (self.query.in_features * (1 + self.embed_dim) if self.rank else 0)

    @cached_property
    def token_score_macs(self) -> int:
        """For each token scored."""
        return self.embed_dim if self.rank else 0

    def thresholds(self, grid: tuple[int, int]) -> NDArray[np.float32]:
        """What their place adds to the logits of patch tokens, (N,), in a grid of so many rows and columns."""
        return dither(*grid) if self.dithers else np.zeros(grid[0] * grid[1], np.float32)

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
        x = x.to(torch.promote_types(self.gates.weight.dtype, torch.float32))
        formula = Formula.of([self], log_price)[0]
        content, direction = formula.content(*means(x, active, num_prefix_tokens))
        logits = formula.logits(content, through_difficulty)
        num_heads = self.gates.out_features - 1
        tokens = None
        if self.rank:
            thresholds = torch.tensor(self.thresholds(grid), dtype=logits.dtype, device=logits.device)
            tokens = logits[:, -1:] + thresholds
            if not self.even:
                tokens = tokens + token_scores(x[:, num_prefix_tokens:], direction)
        return Logits(logits[:, 0], logits[:, 1 : 1 + num_heads], tokens, DIFFICULTY_BOUND * content[:, -1])


@dataclass(frozen=True)
class Formula:
    """A controller at given prices, in the fewest operations.

    J logits: of depth, of the H heads, and where tokens are decided the part of their logits that they share. Each
    operation on a block's few numbers takes as long as a small matrix product, so the linear layers that read one
    context are one, and what depends on the price alone is computed for all blocks at once. Token query and keys are
    one layer too: tokens are compared, not by a product of low rank for each, but with the direction that the query has
    among them, one for an image.
    """

    nested: bool
    decides_tokens: bool
    thresholds: Callable[[tuple[int, int]], NDArray[np.float32]]  # `Controller.thresholds`
    pooled: Tensor  # (2C, hidden)
    pooled_bias: Tensor  # (B or 1, hidden), the price's part in it
    outputs: Tensor  # (hidden, J + 1 or, where tokens are decided, J + 1 + C): see `content`
    outputs_bias: Tensor
    bounds: Tensor  # (J + 1,), of logits and difficulty
    gain: Tensor  # (J,), what difficulty adds to each
    shift: Tensor  # (B or 1, J), what does not depend on the image

    @staticmethod
    def of(controllers: Sequence[Controller], log_price: Tensor) -> list[Formula]:
        """log_price: (B,) or (1,)."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for c in controllers:
            weights += [c.gates.weight, c.difficulty.weight]
            biases += [c.gates.bias, c.difficulty.bias]
            if c.rank:  # its last row is a logit, which belongs before difficulty
                key = c.key.weight.t()[:, :, None]  # products are sums here: who counts those of images finds no others
                weights[-1:] = [c.query.weight[-1:], c.difficulty.weight, (key * c.query.weight[:-1]).sum(dim=1)]
                biases[-1:] = [c.query.bias[-1:], c.difficulty.bias, (key * c.query.bias[:-1, None]).sum(dim=(1, 2))]
        rows = [c.gates.out_features + 1 + (1 + c.embed_dim if c.rank else 0) for c in controllers]
        exact = torch.promote_types(weights[0].dtype, torch.float32)  # half precision could tip a decision
        outputs = (0.5 * torch.cat(weights).to(exact)).split(rows)  # of a context that comes doubled, see `content`
        outputs_bias = torch.cat(biases).to(exact).split(rows)
        log_price = log_price.to(exact)
        features = price_features(log_price)  # (B, features)
        price = torch.stack([c.price.weight for c in controllers])
        pooled_bias = torch.stack([c.pooled.bias for c in controllers])[:, None]
        pooled_bias = pooled_bias + (features[:, None] * price[:, None]).sum(dim=3)  # (L, B, hidden)
        slopes, gains = (
            F.softplus(torch.stack([getattr(c, name) for c in controllers]).to(exact))  # (L, 3)
            for name in ("slope", "gain")
        )
        made = []
        for index, c in enumerate(controllers):
            grains = [0] + [1] * (c.gates.out_features - 1) + [2] * bool(c.rank)
            keep = log_price.new_tensor([c.keep_logits[grain] for grain in grains])
            made.append(
                Formula(
                    c.nested,
                    bool(c.rank),
                    c.thresholds,
                    c.pooled.weight.t().to(exact),
                    pooled_bias[index],
                    outputs[index].t(),
                    outputs_bias[index],
                    log_price.new_tensor([LOGIT_BOUND] * len(grains) + [DIFFICULTY_BOUND]),
                    gains[index, grains] * DIFFICULTY_BOUND,
                    keep - log_price[:, None] * slopes[index, grains],
                )
            )
        return made

    def content(self, pooled: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """What images whose active patch tokens and whose prefix tokens have these means, (B, C), say: (B, J + 1), from
        -1 to 1, of each logit and last of difficulty; and the direction (B, C) that their tokens are compared with,
        (B, 0) where none are.
        """
        out = torch.addmm(self.outputs_bias, self.twice_context(pooled, prefix), self.outputs)
        count = len(self.bounds)
        return torch.tanh(out[:, :count] / self.bounds), out[:, count:]

    def twice_context(self, pooled: Tensor, prefix: Tensor) -> Tensor:
        """(B, hidden)."""
        read = torch.addmm(self.pooled_bias.expand(len(pooled), -1), seen(pooled, prefix), self.pooled)
        # Twice GELU, in three operations of 3 us; on CPU that of PyTorch sets up oneDNN, which takes 30.
        return torch.addcmul(read, read, torch.erf(read * SQRT_HALF))

    def logits(self, content: Tensor, through_difficulty: bool = True) -> Tensor:
        """(B, J) from `content`."""
        difficulty = content[:, -1:] if through_difficulty else content[:, -1:].detach()
        return content[:, :-1] * self.bounds[:-1] + difficulty * self.gain + self.shift

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], ...]:
        """What `native` is given of it."""
        parts = self.pooled, self.pooled_bias, self.outputs, self.outputs_bias, self.bounds, self.gain, self.shift
        return tuple(np.ascontiguousarray(part.detach().float().cpu().numpy()) for part in parts)


class Controllers(nn.ModuleList):
    """The controllers of all blocks, which remember their formulas at the last prices while their weights stay."""

    _known: tuple[list[float], Seen, list[Formula]] | None = None

    def __iter__(self) -> Iterator[Controller]:
        return cast(Iterator[Controller], super().__iter__())

    def formulas(self, log_price: Tensor) -> list[Formula]:
        prices, parameters = log_price.tolist(), self._now()
        known = self._known  # once: another thread may ask at other prices meanwhile
        if known is None or known[0] != prices or not known[1].still(parameters):
            known = (prices, Seen(parameters), _formulas(list(self), log_price))
            self._known = known
        return known[2]

    def _now(self) -> list[Tensor]:
        """The parameters, whoever has put them there; `parameters()` takes ten times as long."""
        found: list[Tensor] = []
        left: list[nn.Module] = [self]
        while left:
            module = left.pop()
            found += [p for p in module._parameters.values() if p is not None]
            left += [m for m in module._modules.values() if m is not None]
        return found

    def train(self, mode: bool = True) -> Self:
        self._known = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_known"}


@torch.no_grad()
def _formulas(controllers: Sequence[Controller], log_price: Tensor) -> list[Formula]:
    return Formula.of(controllers, log_price)


def means(x: Tensor, active: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Of the active patch tokens and of the prefix tokens, (B, C) each. x: (B, P+N, C); active: (B, N)."""
    weight = active.to(x.dtype).unsqueeze(-1)
    pooled = (x[:, num_prefix_tokens:] * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return pooled, x[:, :num_prefix_tokens].mean(dim=1) if num_prefix_tokens else pooled


def seen(pooled: Tensor, prefix: Tensor) -> Tensor:
    """What the context is made from: both means (B, C) normalised, (B, 2C)."""
    return torch.layer_norm(torch.stack([pooled, prefix], dim=1), pooled.shape[1:]).flatten(1)


def token_scores(tokens: Tensor, direction: Tensor) -> Tensor:
    """What their content adds to the logits of tokens (..., n, C): (..., n). direction: (..., C), of their images."""
    normalised = torch.layer_norm(tokens, tokens.shape[-1:])
    return bounded((normalised @ direction.unsqueeze(-1)).squeeze(-1))


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def bounded(logits: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(logits / LOGIT_BOUND)
