"""Budgets are prices: what a model does with the one to find the other, and what it executes at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from miaformer.engine.controller import LEAST_LOG_PRICE, LOG_PRICE_RANGE
from miaformer.model.budget import Calibration, check_fraction
from miaformer.model.looks import row_of
from miaformer.model.policy import AnyPolicy, Full, Learned, Look, Policy, Sampling, TwoLooks

if TYPE_CHECKING:
    from miaformer.engine.cost import Cost
    from miaformer.model.config import AdaptConfig
    from miaformer.model.resolution import Size

Budget = float | Sequence[float] | Tensor  # one for all images, or one for each


class PricedModel(nn.Module):
    """A module that is asked for budgets: the part of `MIAFormer` that knows prices."""

    calibration: Calibration | None
    price_scale: Tensor  # (2,): controllers see price_scale[0] * log(price) + price_scale[1]
    controllers: nn.ModuleList
    adapt_config: AdaptConfig

    if TYPE_CHECKING:

        def cost(self, image_size: Size | None = None) -> Cost: ...

        def image_sizes(self) -> tuple[Size, ...]: ...

    def __init__(self) -> None:
        super().__init__()
        self.calibration = None
        self.register_buffer("price_scale", torch.tensor([1.0, 0.0]))

    def set_price_scale(self, slope: float, shift: float) -> None:
        """Give prices their unit: controllers see slope * log(price) + shift."""
        if not slope > 0:
            raise ValueError(f"slope={slope!r} must be positive: a higher price means less compute")
        self.price_scale.copy_(torch.tensor([slope, shift]))

    def log_price(self, price: Tensor) -> Tensor:
        """What controllers see of prices (B,), within the range that they know."""
        slope, shift = self.price_scale
        return (slope * price.to(slope.device).clamp(min=1e-30).log() + shift).clamp(
            LEAST_LOG_PRICE, LOG_PRICE_RANGE[1]
        )

    def price_range(self) -> tuple[float, float]:
        """The prices between which controllers differ."""
        slope, shift = self.price_scale.tolist()
        low, high = (math.exp((end - shift) / slope) for end in (LEAST_LOG_PRICE, LOG_PRICE_RANGE[1]))
        return low, high

    def price_of(self, budget: Budget) -> Budget:
        """The price that brings a budget, by the calibration table.

        Raises ValueError for an uncalibrated model, and for a budget below the least that the table reaches.
        """
        table = self.check_budget(budget)
        budgets = per_image("budget", budget).tolist()
        return [table.price(b) for b in budgets] if isinstance(budgets, list) else table.price(budgets)

    def check_budget(self, budget: Budget) -> Calibration:
        """The table that a budget is looked up in.

        Raises ValueError for an uncalibrated model, and for a budget below the least that the table reaches.
        """
        if self.calibration is None:
            raise ValueError(
                "This model is not calibrated, so it knows no budget: train it (miaformer.train), calibrate it "
                "(miaformer.calibrate), or pass price= or policy="
            )
        for one in torch.atleast_1d(per_image("budget", budget)).tolist():
            self.calibration.check(one)
        return self.calibration

    # What is executed ------------------------------------------------------------------------------------------

    def _chosen(
        self, policy: AnyPolicy | None, budget: Budget | None, price: Budget | None, cap: Budget | None, batch: int
    ) -> Look | TwoLooks:
        """What is executed: a budget may be spent in two looks."""
        if isinstance(policy, Look | TwoLooks) and budget is None and price is None:
            return policy
        may_look_twice = self.calibration is not None and (
            bool(self.calibration.looks) or self.adapt_config.chooses_resolution
        )
        if policy is None and price is None and may_look_twice:
            spent = self._allowed(cap, batch) if budget is None else budget
            looks = None if spent is None else self._two_looks(per_image("budget", spent, batch), batch)
            if looks is not None:
                return looks
        return Look(self._policy(policy, budget, price, cap, batch))

    def _two_looks(self, budgets: Tensor, batch: int) -> TwoLooks | None:
        """None where one look is best for all. budgets: (), or (B,) where images have their own."""
        asked = torch.atleast_1d(budgets).tolist()
        table = self.check_budget(asked)
        rows = [row_of(table.looks, one) for one in asked]
        if not (any(rows) or self.adapt_config.chooses_resolution):
            return None
        if self.adapt_config.chooses_resolution:
            asked = [table.within(one) for one in asked]
        first, second = (
            self._one_look(
                [getattr(row, name) if row else one for row, one in zip(rows, asked, strict=True)], table, batch
            )
            for name in ("first", "second")
        )
        return TwoLooks(first, second, torch.tensor([row.confidence if row else 0.0 for row in rows]))

    def _one_look(self, fractions: Sequence[float], table: Calibration, batch: int) -> Look:
        """One that spends such fractions of the MACs in the mean: one for all images, or one each."""
        if self.adapt_config.chooses_resolution:
            sizes = self.image_sizes()
            return Look(Full(), tuple(sizes[table.nearest(fraction)] for fraction in fractions))
        return Look(self.learned(self.price_of(fractions), batch))

    def at_budget(self, budget: float) -> Look | TwoLooks:
        """What `run` executes at a budget, as a policy. Raises ValueError as `check_budget` does."""
        return self._two_looks(per_image("budget", budget), 1) or Look(self.learned(self.price_of(budget)))

    def _policy(
        self, policy: AnyPolicy | None, budget: Budget | None, price: Budget | None, cap: Budget | None, batch: int
    ) -> Policy:
        given = [
            name for name, value in (("policy", policy), ("budget", budget), ("price", price)) if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"Give one of policy, budget and price, not {' and '.join(given)}")
        if policy is not None:
            if isinstance(policy, Look | TwoLooks) or not hasattr(policy, "decide"):
                raise TypeError(
                    f"policy={policy!r} is none: give one of miaformer.model.policy, for example Random(tokens=0.5)"
                )
            return policy
        if price is None:
            if budget is None:
                budget = self._allowed(cap, batch)
                if budget is None:
                    return Full()
            price = self.price_of(per_image("budget", budget, batch))
        return self.learned(price, batch)

    def _allowed(self, cap: Budget | None, batch: int) -> Budget | None:
        """What is spent where no budget is given: what the cap allows. None: everything."""
        if self.calibration is None or cap is None:
            return None
        caps = per_image("cap", cap, batch)
        for one in torch.atleast_1d(caps).tolist():
            check_fraction("cap", one)
        return caps.clamp(*self.calibration.range)

    def learned(self, price: Budget, batch: int = 1) -> Learned:
        """The controllers' policy at a price >= 0 in units of loss, one for all images or one for each.

        Raises ValueError for a price below 0, and for a model without controllers.
        """
        if self.adapt_config.chooses_resolution:
            raise ValueError("this model chooses resolutions and has no controllers to give a price: give a budget")
        prices = torch.atleast_1d(per_image("price", price, batch)).float()
        if not bool((prices >= 0).all()):
            raise ValueError(f"price={price!r} must be at least 0: a number, or one for each of {batch} images")
        multiple = self.adapt_config.rows_multiple(self.cost().num_patches)
        return Learned(self.controllers, self.log_price(prices), multiple)


def per_image(name: str, value: Budget, batch: int | None = None) -> Tensor:
    """A number for all images (), or one for each (B,), float64."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={value!r} must be a number, or one for each image") from error
    if numbers.ndim > 1 or (batch is not None and numbers.numel() not in (1, batch)):
        images = "image" if batch is None else f"of {batch} images"
        raise ValueError(f"{name}={value!r} must be a number, or one for each {images}")
    return numbers


def drawing(policy: Look | TwoLooks, sampling: Sampling) -> Look | TwoLooks:
    """The learned policy, drawing its decisions."""
    if isinstance(policy, TwoLooks):
        first, second = (_drawing(look, sampling) for look in (policy.first, policy.second))
        return replace(policy, first=first, second=second)
    return _drawing(policy, sampling)


def _drawing(look: Look, sampling: Sampling) -> Look:
    if not isinstance(look.policy, Learned):
        raise ValueError(
            "sample= draws the decisions of controllers, and here none decide: calibrate the model and give a budget, "
            "or give a price"
        )
    return replace(look, policy=replace(look.policy, sampling=sampling))
