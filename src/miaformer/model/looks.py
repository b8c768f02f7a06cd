"""Two looks: an image whose first answer is not confident is looked at again, at a larger budget.

What is decided inside one look is decided before there is an answer, and nothing tells how hard an image is as well as
the confidence of an answer does. So compute follows difficulty best where a cheap look comes first, and an expensive
one follows for those images alone whose answer it leaves open (CF-ViT, Chen et al. 2023). Looks differ in the size of
the image (`resolution`), or in what controllers keep at their prices. Where they differ in size, the first look may end
before its last block, where an early answer is confident (`early_exit`). Which two, and which confidence is enough, is
chosen for every mean budget on the calibration images (`miaformer.evaluation.calibration`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from miaformer.model.early_exit import NEVER

STEP = 0.005  # of mean budgets, between the rows of a table


@dataclass(frozen=True)
class Looks:
    """How a mean budget is spent in two looks, or in one that images may leave early.

    first, second: the mean MACs fractions of one look each, to its end. confidence: images whose first answer is less
    confident get a second look; 0: none does. leave: images with an early answer of at least this confidence leave the
    first look with it; never below `confidence`.
    """

    budget: float
    first: float
    second: float
    confidence: float
    leave: float = NEVER


def row_of(table: Sequence[Looks], budget: float, least: float = 0.0) -> Looks | None:
    """The row of a table, by rising budget, for a budget; None where one look to its end is best.

    least: what the cheapest such look takes; below it there are rows alone, and the nearest that spends no more counts.
    """
    place = bisect_left([row.budget for row in table], budget)
    near = [row for row in table[max(place - 1, 0) : place + 1] if abs(row.budget - budget) <= STEP / 2 + 1e-9]
    if not near and table and budget < least - STEP / 2:
        return table[max(place - 1, 0)]
    return min(near, key=lambda row: abs(row.budget - budget), default=None)
