"""The price of each budget during training: two curves over budgets, updated from the MACs spent and from the
gradient with respect to the price.

Controllers see a log-price, on a scale of their own, which `price_scale` ties to units of loss. The tariff keeps the
mean spending of images that were asked for a budget at that budget, by raising the log-price where too much is spent:
images that share a budget share one price, and compete. Next to it it keeps the marginal value of compute at that
budget, lambda in units of loss per dense forward: the weight of the cost in the objective, at which raising all gates
together neither gains nor loses. Without it the task would push all logits up for ever, and the price after them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miaformer.engine.controller import LOG_PRICE_RANGE


class Tariff:
    """Piecewise linear in the budget, between knots evenly spaced over `budgets`."""

    def __init__(
        self,
        budgets: tuple[float, float],
        knots: int = 8,
        price_rate: float = 0.3,
        value_rate: float = 0.05,
        dual_rate: float = 0.1,
    ) -> None:
        self.knots = torch.linspace(*budgets, knots)
        self.log_price = torch.zeros(knots)
        self.log_value = torch.full((knots,), -2.0)  # log lambda; far too low, and all logits drift up at first
        self.feeling = torch.zeros(knots)  # running scale of the price's gradient
        self.hard = torch.tensor([0.0, 1.0])  # running mean and variance of the log of the teacher's loss
        self.price_rate = price_rate
        self.value_rate = value_rate
        self.dual_rate = dual_rate

    def start(self, mean_fraction: Callable[[float], float], points: int = 25) -> None:
        """Read the log-price of every knot off what untrained controllers spend. mean_fraction(log_price) falls."""
        grid = torch.linspace(*LOG_PRICE_RANGE, points)
        spent = torch.tensor([mean_fraction(log_price) for log_price in grid.tolist()]).cummin(dim=0).values
        for k, budget in enumerate(self.knots):
            right = min(int((spent > budget).sum()), points - 1)  # the first that does not overspend
            left = max(right - 1, 0)
            gap = (spent[left] - spent[right]).clamp(min=1e-6)
            share = ((spent[left] - budget) / gap).clamp(0, 1)
            self.log_price[k] = grid[left] + share * (grid[right] - grid[left])
        self._keep_monotone()

    def _weights(self, budgets: Tensor) -> Tensor:
        """Hat functions of the knots at budgets (B,): (B, knots), rows sum to 1."""
        step = self.knots[1] - self.knots[0]
        place = ((budgets.cpu() - self.knots[0]) / step).clamp(0, len(self.knots) - 1)
        return (1 - (place[:, None] - torch.arange(len(self.knots))).abs()).clamp(min=0)

    def log_prices(self, budgets: Tensor) -> Tensor:
        """Log-prices (B,) of budgets (B,)."""
        return (self._weights(budgets) @ self.log_price).to(budgets.device)

    def values(self, budgets: Tensor) -> Tensor:
        """Lambda (B,) of budgets (B,), in units of loss per dense forward."""
        return (self._weights(budgets) @ self.log_value).exp().to(budgets.device)

    def update(self, budgets: Tensor, spent: Tensor, gradient: Tensor | None) -> None:
        """After a step. budgets, spent: (B,) fractions; gradient: (B,), of each image's objective by its log-price."""
        weights = self._weights(budgets)
        total = weights.sum(dim=0)
        seen = total > 0
        total = total.clamp(min=1e-6)
        overspent = weights.T @ (spent - budgets).float().cpu() / total
        self.log_price += self.price_rate * overspent * seen
        self.log_price.clamp_(*LOG_PRICE_RANGE)
        self._keep_monotone()
        if gradient is not None:
            felt = weights.T @ gradient.float().cpu() / total
            self.feeling = torch.where(seen, 0.98 * self.feeling + 0.02 * felt.abs(), self.feeling)
            self.log_value += self.value_rate * torch.where(seen, felt / self.feeling.clamp(min=1e-8), 0).clamp(-3, 3)
        # Where too little is spent it is worth less: else controllers would go on saving until no price can hold them.
        self.log_value += self.dual_rate * overspent * seen
        self.log_value.clamp_(-6.0, 3.0)

    def see(self, difficulty: Tensor) -> None:
        """What the images of a step were: (B,), logs of the teacher's loss."""
        mean = difficulty.mean()
        now = torch.stack([mean, (difficulty - self.hard[0]).square().mean()])
        self.hard += 0.05 * (now.cpu() - self.hard)

    def difficulty(self) -> tuple[float, float]:
        """Mean and standard deviation of what was seen."""
        return float(self.hard[0]), float(self.hard[1].clamp(min=1e-6).sqrt())

    def _keep_monotone(self) -> None:
        """A larger budget never has the higher price."""
        self.log_price = self.log_price.flip(0).cummax(dim=0).values.flip(0)

    def price_scale(self) -> tuple[float, float]:
        """(a, b) of log-price = a log(lambda) + b, fitted over the knots: gives prices their unit, loss."""
        log_value, log_price = self.log_value, self.log_price
        off = log_value - log_value.mean()
        slope = float((off * (log_price - log_price.mean())).sum() / off.square().sum().clamp(min=1e-6))
        if not 0.2 <= slope <= 20:  # values did not fall with the budget: shift only
            slope = 1.0
        return slope, float(log_price.mean() - slope * log_value.mean())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("log_price", "log_value", "feeling", "hard")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.clone())
