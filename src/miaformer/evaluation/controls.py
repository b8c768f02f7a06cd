"""Controls: policies of a given cost that do not look at the image. What the learned policy has to beat.

All of them are found by bisection over what they would cost, by walking through the blocks without executing
any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions, Gates, HostGates, Rules
from miaformer.engine.walk import Policy, Steps, walk
from miaformer.model.budget import check_fraction
from miaformer.model.model import MIAFormer
from miaformer.model.policy import BestTokens, ClsAttention, Fixed, Random, Static

_SIMULATED_IMAGES = 4096  # the mean of their random MACs is within about 0.002 of its expectation
_FARTHEST = 16.0  # shift of keep rates, in logits: up to everything, down to nothing but what must be kept
_STEPS = 24  # of bisection: shifts to 2e-6
_RATE_BOUND = 1e-3  # a rate of 0 or 1 is taken for this far from it, so that every cost can be reached


@dataclass(frozen=True)
class Simulation:
    """What policies cost and execute on one model, found without running it.

    For policies that do not look at the image: they are shown tokens of no channels.
    """

    cost: Cost
    rules: Rules

    @staticmethod
    def of(model: MIAFormer) -> Simulation:
        return Simulation(model.cost(), model.adapt_config.rules)

    def run(self, policy: Policy, num_images: int) -> Steps:
        """The gates and the MACs (B,) of `num_images` images under `policy`."""
        cost = self.cost
        x = torch.empty(num_images, cost.num_prefix_tokens + cost.num_patches, 0)
        return walk([None] * cost.depth, x, policy, _execute_nothing, cost, self.rules)[1]

    def fractions(self, policy: Policy, num_images: int) -> Tensor:
        """The same MACs (B,) float64 as fractions of the backbone's."""
        return self.run(policy, num_images).macs.double() / self.cost.backbone


def _execute_nothing(index: int, block: None, x: Tensor, gates: Gates | HostGates) -> Tensor:
    return x


def macs_of(decisions: Decisions, cost: Cost, rules: Rules) -> Tensor:
    """MACs (B,) int64 of executing `decisions`, without a model. Deciding is not counted."""
    return Simulation(cost, rules).run(Fixed(decisions), len(decisions)).macs


@dataclass(frozen=True)
class KeepRates:
    """How often each block is executed, and each of its heads and patch tokens kept where it is. float64."""

    depth: Tensor  # (L,)
    heads: Tensor  # (L, H), among the images that execute the block
    tokens: Tensor  # (L, N), likewise

    @staticmethod
    def of(trace: Decisions) -> KeepRates:
        """Means over the images of a trace. A block that no image executes counts as keeping everything."""
        executed = trace.depth.double()

        def among_executed(kept: Tensor) -> Tensor:  # (B, L, M) -> (L, M)
            images = executed.sum(dim=0)[:, None]
            return torch.where(images > 0, kept.double().sum(dim=0) / images.clamp(min=1), 1.0).cpu()

        return KeepRates(executed.mean(dim=0).cpu(), among_executed(trace.heads), among_executed(trace.tokens))

    @staticmethod
    def even(cost: Cost) -> KeepRates:
        """A half everywhere: where no learned policy says otherwise."""
        shapes = ((cost.depth,), (cost.depth, cost.num_heads), (cost.depth, cost.num_patches))
        return KeepRates(*(torch.full(shape, 0.5, dtype=torch.float64) for shape in shapes))

    def shifted(self, logit: float) -> KeepRates:
        """All rates moved up or down together: `logit` is added to the log-odds of each."""
        rates = (self.depth, self.heads, self.tokens)
        return KeepRates(*(torch.sigmoid(torch.logit(one, _RATE_BOUND) + logit) for one in rates))


def random_policy(
    simulation: Simulation,
    budget: float,
    rates: KeepRates | None = None,
    cap: float | None = None,
    seed: int = 0,
) -> Random:
    """Random decisions whose expected MACs are `budget`, a fraction of the backbone's.

    rates: how often to keep what, usually the learned policy's own (`KeepRates.of` its trace), moved up or
    down together until the cost is right: then only *for which image and where* is left to chance. By default
    even. cap: that the policy will run under; what is above it counts as cut down to it.

    Raises ValueError where the budget is below what an image costs at the least.
    """
    rates = rates or KeepRates.even(simulation.cost)

    def policy(logit: float) -> Random:
        moved = rates.shifted(logit)
        depth, heads, tokens = moved.depth, moved.heads.mean(dim=1), moved.tokens.mean(dim=1)
        if simulation.rules.leaves:  # of the images that execute the block before
            depth = (depth / torch.cat([torch.ones_like(depth[:1]), depth[:-1]])).clamp(max=1)
        return Random(depth.tolist(), heads.tolist(), tokens.tolist(), seed)

    most = 1.0 if cap is None else cap

    def fraction(logit: float) -> float:
        return simulation.fractions(policy(logit), _SIMULATED_IMAGES).clamp(max=most).mean().item()

    return policy(_nearest(fraction, -_FARTHEST, _FARTHEST, budget, steps=14))


def static_policy(simulation: Simulation, budget: float, trace: Decisions) -> Static:
    """The learned policy's mean decisions, the same for every image, at `budget` of the backbone's MACs.

    trace: the learned policy's, on the calibration set. As many blocks, heads and tokens are kept as it keeps
    on average, those that it keeps most often; then all of these numbers move up or down together to the
    budget, and the tokens kept least often fill or make the last gap. The budget is met as closely as whole
    tokens allow.

    Raises ValueError where the budget is below what an image costs at the least.
    """
    rates = KeepRates.of(trace)
    progressive = simulation.rules.progressive

    def decisions(logit: float, share: float) -> Decisions:
        moved = rates.shifted(logit)
        ranking = rates.tokens.mean(dim=0, keepdim=True).expand_as(rates.tokens) if progressive else rates.tokens
        return Decisions(
            _highest(rates.depth[None], moved.depth.sum()[None]),
            _highest(rates.heads, moved.heads.sum(dim=1).clamp(min=1))[None],
            _highest(ranking, moved.tokens.sum(dim=1) * share)[None],
        )

    def fraction(logit: float, share: float) -> float:
        return simulation.fractions(Fixed(decisions(logit, share)), 1).item()

    _, enough = _bracket(lambda logit: fraction(logit, 1.0), -_FARTHEST, _FARTHEST, budget, _STEPS)
    share = _nearest(lambda share: fraction(enough, share), 0.0, 1.0, budget, _STEPS)
    return Static(decisions(enough, share))


def _highest(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (R,), rounded, highest of each row of scores (R, M), as (R, M) bool."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < counts.round()[:, None]


def cls_attention_policy(model: MIAFormer, budget: float) -> ClsAttention:
    """EViT's token selection at `budget` of the backbone's MACs; see `tokens_at_budget`."""
    return tokens_at_budget(model, lambda keep: ClsAttention(keep), budget)


Keeping = TypeVar("Keeping", bound=BestTokens)


def tokens_at_budget(model: MIAFormer, make: Callable[[float], Keeping], budget: float) -> Keeping:
    """The policy, made for a share of tokens, that meets the budget best; all images keep equally many.

    Raises ValueError where keeping no patch token at all still costs more than the budget.
    """
    parameter = next(model.backbone.parameters())
    image = parameter.new_zeros(1, model.backbone.in_chans, *model.image_size())

    def fraction(keep: float) -> float:
        with torch.inference_mode():
            return model.run(image, policy=make(keep)).trace.macs_fraction.item()

    return make(_nearest(fraction, 0.0, 1.0, budget, steps=12))


def _nearest(fraction: Callable[[float], float], low: float, high: float, budget: float, steps: int) -> float:
    """Where a rising MACs fraction comes nearest to the budget."""
    return min(_bracket(fraction, low, high, budget, steps), key=lambda argument: abs(fraction(argument) - budget))


def _bracket(
    fraction: Callable[[float], float], low: float, high: float, budget: float, steps: int
) -> tuple[float, float]:
    """Neighbouring arguments of a rising MACs fraction, around the budget; `high` where all is less."""
    least = fraction(low)
    if least > check_fraction("budget", budget) + 0.005:
        raise ValueError(
            f"budget={budget:.4g} is below {math.ceil(least * 1000) / 1000}, the least this policy can spend"
        )
    if fraction(high) <= budget:
        return high, high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) <= budget else (low, middle)
    return low, high
