"""Compute as the safety valve: how long batches take, and the budget that what waits leaves for each picture.

Nothing here knows of HTTP, threads or models, or reads a clock: it is told what happened and says what to do next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FORGET = 0.98  # a batch ago counts so much less: a hundred batches and what was measured before is a seventh
HEADROOM = 0.45  # of the objective that waiting may take; the rest is for what nobody foresaw
LATEST = 0.85  # of the objective: who would be answered later, even at the least budget, is refused
LONGEST_BATCH = 1 / 4  # of the objective: who comes while one runs waits for its end


class ServiceTime:
    """Seconds that a batch takes, learned from those that ran: some a batch, some a picture, some by budget."""

    def __init__(self, measured: Iterable[tuple[int, float, float]]) -> None:
        """measured: (pictures, sum of their budgets, seconds) of a few batches of different sizes and budgets.

        They are never forgotten, whatever runs later: as long as all get the same budget, nothing else tells what
        another one would save.
        """
        self._measured = sum((_sums(*batch, scale=batch[2]) for batch in measured), np.zeros((3, 4)))
        self._recent = np.zeros((3, 4))
        self._learn()

    def add(self, pictures: int, budgets: float, seconds: float) -> None:
        """A batch that ran."""
        expected = self.of(pictures, budgets / pictures)
        self._recent = FORGET * self._recent + _sums(pictures, budgets, seconds, expected or seconds)
        self._learn()

    def of(self, pictures: float, budget: float, batches: float = 1) -> float:
        """Seconds for so many pictures at this mean budget."""
        a_batch, a_picture, a_budget = self._parts
        return batches * a_batch + pictures * (a_picture + a_budget * budget)

    def most(self, seconds: float, budget: float) -> float:
        """The pictures of one batch that takes so long, each at this budget."""
        a_batch, a_picture, a_budget = self._parts
        each = a_picture + a_budget * budget
        return (seconds - a_batch) / each if each > 0 else math.inf

    def budget_for(self, seconds: float, pictures: int, batches: int) -> float:
        """The mean budget at which so many pictures take so long; infinite where budgets change nothing."""
        left = seconds - self.of(pictures, 0.0, batches)
        a_picture = self._parts[2] * pictures
        if a_picture > 0:
            return left / a_picture
        return math.inf if left >= 0 else -math.inf

    def _learn(self) -> None:
        self._parts: tuple[float, float, float] = tuple(_least_squares(self._measured + self._recent).tolist())


@dataclass(frozen=True)
class Plan:
    """For the next batch."""

    pictures: int  # at most
    budget: float | None  # the most of each


class Governor:
    """Lowers the budget of what waits so far that it is answered within the objective; past that, refuses."""

    def __init__(
        self, time: ServiceTime, objective: float, bounds: tuple[float, float] | None, max_batch: int, max_queue: int
    ) -> None:
        """objective: seconds; bounds: the normal budget and the least, None where there are none."""
        self.time = time
        self._objective, self._bounds = objective, bounds
        self._max_batch, self._max_queue = max_batch, max_queue

    def plan(self, waiting: int, oldest: float, busy: float = 0.0) -> Plan:
        """waiting: pictures; oldest: seconds since the first of them came; busy: seconds until the model is free."""
        top, least = self._bounds or (1.0, 1.0)
        left = HEADROOM * self._objective - oldest - busy
        budget = min(top, max(least, self.time.budget_for(left, waiting, math.ceil(waiting / self._max_batch))))
        return Plan(min(waiting, self._largest_batch(budget)), budget if self._bounds else None)

    def retry_after(self, waiting: int, coming: int, oldest: float, busy: float = 0.0) -> float | None:
        """Seconds after which to ask again, where `coming` more pictures would be answered too late even at the
        least budget, or find the queue full; None where they are welcome.
        """
        least = self._bounds[1] if self._bounds else 1.0
        everyone = waiting + coming
        batch = self._largest_batch(least)
        needed = busy + math.ceil(everyone / batch) * self.time.of(batch, least)  # by then others fill the last one
        too_late = waiting > 0 and max(needed, oldest) > LATEST * self._objective  # who finds it idle is always served
        if too_late or everyone > self._max_queue:
            return max(needed - HEADROOM * self._objective, needed / 2)
        return None

    def _largest_batch(self, budget: float) -> int:
        return max(1, int(min(self._max_batch, self.time.most(LONGEST_BATCH * self._objective, budget))))


def _sums(pictures: int, budgets: float, seconds: float, scale: float) -> np.ndarray:
    """(3, 4): what least squares need to know of a batch: products of its row, and beside them those with its target.
    They add up over batches. scale: seconds that were expected, as errors count relative to that.
    """
    row = np.array([1.0, pictures, budgets]) / scale
    return np.outer(row, [*row, seconds / scale])


def _least_squares(sums: np.ndarray) -> np.ndarray:
    """(3,): a batch's part, a picture's, a budget's; 0 where it would be negative, the most negative first."""
    parts = np.zeros(3)
    kept = [part for part in range(3) if sums[part, 3] > 0]
    while kept:
        found = np.linalg.lstsq(sums[np.ix_(kept, kept)], sums[kept, 3], rcond=None)[0]
        if (found >= 0).all():
            parts[kept] = found
            break
        kept.pop(int(found.argmin()))
    return parts
