"""Two looks: an image whose first answer is not confident is looked at again, at a larger budget.

What is decided inside one look is decided before there is an answer, and nothing tells how hard an image is as well as
the confidence of an answer does. So compute follows difficulty best where a cheap look comes first, and an expensive
one follows for those images alone whose answer it leaves open (CF-ViT, Chen et al. 2023). Looks differ in the size of
the image (`resolution`), or in what controllers keep at their prices. Which two, and which confidence is enough, is
chosen for every mean budget on the calibration images (`choose_looks`): where a single look does as well, it stays one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

STEP = 0.005  # of mean budgets, between the rows of a table
LEAST_GAP = 0.03  # between the fractions of the looks that are tried


@dataclass(frozen=True)
class Looks:
    """How a mean budget is spent in two looks.

    first, second: the mean MACs fractions of one look each. confidence: images whose first answer is less
    confident get a second look.
    """

    budget: float
    first: float
    second: float
    confidence: float


@dataclass(frozen=True)
class View:
    """What single looks at one price, or in one size, gave on the calibration images."""

    fraction: float  # mean MACs, of the backbone's
    macs: Array  # (n,), fractions
    answer: Array  # (n,) int64, the likeliest class
    confidence: Array  # (n,), its probability

    @staticmethod
    def of(logits: Tensor, macs_fraction: Tensor) -> View:
        """logits: (n, classes); macs_fraction: (n,)."""
        confidence, answer = logits.float().softmax(dim=1).max(dim=1)
        macs = macs_fraction.double().cpu().numpy()
        return View(float(macs.mean()), macs, answer.cpu().numpy(), confidence.cpu().numpy())


def row_of(table: Sequence[Looks], budget: float) -> Looks | None:
    """The row of a table, by rising budget, for a budget; None where one look is best."""
    place = bisect_left([row.budget for row in table], budget)
    near = [row for row in table[max(place - 1, 0) : place + 1] if abs(row.budget - budget) <= STEP / 2 + 1e-9]
    return min(near, key=lambda row: abs(row.budget - budget), default=None)


def choose_looks(views: Sequence[View], between: bool = True) -> tuple[Looks, ...]:
    """The best two looks for each mean budget at which they are better than one.

    Better is what answers more often as the most expensive single look does, less the standard error of what is spent:
    a pair that spends very unevenly meets its budget less exactly on other images. views: of different prices, or
    sizes. between: whether single looks can spend anything between two of them, as prices can and sizes cannot.
    """
    ordered = _apart(sorted(views, key=lambda view: view.fraction))
    reference = ordered[-1].answer
    agreement = np.array([(view.answer == reference).mean() for view in ordered])
    fractions = np.array([view.fraction for view in ordered])
    curves = [
        _Curve(first, second, reference) for place, first in enumerate(ordered) for second in ordered[place + 1 :]
    ]
    found = []
    for budget in np.arange(fractions[0] + STEP, fractions[-1], STEP):
        within = int(np.searchsorted(fractions, budget + STEP / 2)) - 1
        best, score = None, float(np.interp(budget, fractions, agreement) if between else agreement[within])
        for curve in curves:
            looks, own = curve.at(float(budget))
            if looks is not None and own > score:
                best, score = looks, own
        if best is not None:
            found.append(best)
    return tuple(found)


def _apart(views: Sequence[View]) -> list[View]:
    """Some of them, no closer than `LEAST_GAP`, the most expensive among them. views: by rising fraction."""
    kept = [views[-1]]
    for view in reversed(views[:-1]):
        if kept[-1].fraction - view.fraction >= LEAST_GAP:
            kept.append(view)
    return kept[::-1]


class _Curve:
    """Two looks, with any number of images looked at again, the least confident first."""

    def __init__(self, first: View, second: View, reference: Array) -> None:
        self.first, self.second = first, second
        order = np.argsort(first.confidence, kind="stable")
        confidence, self._count = first.confidence[order], len(order)
        again = 1 + np.flatnonzero(np.diff(confidence) > 0)  # how many: images of one confidence are not told apart
        gained = (second.answer == reference).astype(np.float64) - (first.answer == reference)
        start = float((first.answer == reference).mean())
        self._share = again / self._count
        self._between = (confidence[again - 1] + confidence[again]) / 2
        self._agreement = start + np.cumsum(gained[order])[again - 1] / self._count
        self._spent = first.fraction + np.cumsum(second.macs[order])[again - 1] / self._count

    def at(self, budget: float) -> tuple[Looks | None, float]:
        """What spends this budget most nearly, and how good it is; None where nothing comes near it."""
        if not len(self._spent):
            return None, 0.0
        place = int(np.abs(self._spent - budget).argmin())
        if abs(self._spent[place] - budget) > max(STEP / 2, self.second.fraction / self._count):
            return None, 0.0
        share = float(self._share[place])
        error = self.second.fraction * (share * (1 - share) / self._count) ** 0.5
        looks = Looks(budget, self.first.fraction, self.second.fraction, float(self._between[place]))
        return looks, float(self._agreement[place]) - error
