"""Budgets: the table, measured on a calibration set, from the mean compute asked for to the price that brings it."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from miaformer.model.looks import STEP, Looks


@dataclass(frozen=True)
class Calibration:
    """Prices and the mean MACs fraction that each led to on the calibration images, both strictly monotone.

    They are those of single looks. `looks` says which budgets are better spent in two (`miaformer.model.looks`). A
    model that chooses resolutions has no prices: `fractions` are those of its sizes, the largest first.
    """

    prices: tuple[float, ...]  # rising; none where sizes are chosen
    fractions: tuple[float, ...]  # falling
    num_images: int
    data: str = ""
    looks: tuple[Looks, ...] = ()  # by rising budget: where two looks, or early exits, are better than one look

    def __post_init__(self) -> None:
        if not self.fractions or len(self.prices) not in (0, len(self.fractions)):
            raise ValueError(
                f"Calibration needs as many prices as fractions, got {len(self.prices)} and {len(self.fractions)}"
            )
        if not all(0 < number < math.inf for number in (*self.prices, *self.fractions)):
            raise ValueError("Calibration prices and fractions must be positive numbers")
        if any(a >= b for a, b in pairwise(self.prices)) or any(a <= b for a, b in pairwise(self.fractions)):
            raise ValueError("Calibration prices must rise and fractions fall")

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest budget that the table reaches."""
        return min([self.fractions[-1], *(row.budget for row in self.looks[:1])]), self.fractions[0]

    def check(self, budget: float) -> float:
        """The budget, if it is one that can be met.

        Raises ValueError where it is not a number in (0, 1], or below the least that the table reaches.
        """
        least = self.range[0]
        if check_fraction("budget", budget) < least - 0.01:
            raise ValueError(
                f"budget={budget:.3f} is below {least:.3f}, the least that this model spends; use cap= for a hard limit"
            )
        return budget

    def nearest(self, fraction: float) -> int:
        """The place of the single look whose MACs fraction is nearest."""
        return min(range(len(self.fractions)), key=lambda place: abs(self.fractions[place] - fraction))

    def within(self, budget: float) -> float:
        """The largest fraction that a single look spends of a budget; the least where it is below all."""
        return next((one for one in self.fractions if one <= budget + STEP / 2), self.fractions[-1])

    def price(self, budget: float) -> float:
        """The price of a budget, interpolated in log-price; the nearest end of the table outside of its range.

        Raises ValueError where the budget is not a number in (0, 1], and where there are no prices.
        """
        check_fraction("budget", budget)
        if not self.prices:
            raise ValueError("this model chooses resolutions and has no prices: give a budget")
        if budget >= self.fractions[0]:
            return self.prices[0]
        if budget <= self.fractions[-1]:
            return self.prices[-1]
        upper = bisect_left([-f for f in self.fractions], -budget)
        (f0, f1), (p0, p1) = self.fractions[upper - 1 : upper + 1], self.prices[upper - 1 : upper + 1]
        share = (f0 - budget) / (f0 - f1)
        return math.exp(math.log(p0) + share * (math.log(p1) - math.log(p0)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> Calibration:
        try:
            return Calibration(
                tuple(map(float, content["prices"])),
                tuple(map(float, content["fractions"])),
                int(content["num_images"]),
                str(content.get("data", "")),
                tuple(Looks(**row) for row in content.get("looks", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration.json is not a calibration table: {error!r}") from error


def check_fraction(name: str, value: float) -> float:
    """A budget or a cap: a fraction of the backbone's MACs, in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be a fraction of the backbone's MACs, more than 0 and at most 1")
    return float(value)
