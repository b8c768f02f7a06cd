"""Budgets are prices: what a model does with the one to find the other, and what controllers see of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from miaformer.budget import Calibration, check_fraction
from miaformer.controller import LEAST_LOG_PRICE, LOG_PRICE_RANGE

Budget = float | Sequence[float] | Tensor  # one for all images, or one for each


class PricedModel(nn.Module):
    """A module that is asked for budgets: the part of `MIAFormer` that knows prices."""

    calibration: Calibration | None
    price_scale: Tensor  # (2,): controllers see price_scale[0] * log(price) + price_scale[1]

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
        if self.calibration is None:
            raise ValueError(
                "This model is not calibrated, so it knows no budget: train it (miaformer.train), calibrate it "
                "(miaformer.calibrate), or pass price= or policy="
            )
        budgets = per_image("budget", budget).tolist()
        return [self._price_of(b) for b in budgets] if isinstance(budgets, list) else self._price_of(budgets)

    def _price_of(self, budget: float) -> float:
        assert self.calibration is not None
        least = self.calibration.range[0]
        if check_fraction("budget", budget) < least - 0.01:
            raise ValueError(
                f"budget={budget:.3f} is below {least:.3f}, the least that this model spends; use cap= for a hard limit"
            )
        return self.calibration.price(budget)


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
