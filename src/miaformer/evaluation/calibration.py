"""Calibration: from a mean budget to the price, or the two looks, that spend it; measured as deployed.

A model's table is a `Calibration` (`miaformer.model.budget`). How it is measured is here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.engine.controller import LOG_PRICE_RANGE
from miaformer.model.budget import Calibration
from miaformer.model.looks import STEP, Looks
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Full, Look

MOST_PASSES = 48  # over the calibration images
LEAST_GAP = 0.03  # between the fractions of the looks that are tried
Array = NDArray[Any]
OnProgress = Callable[[str, int], None]  # stage ("calibrate", "controls", "evaluate"), passes or images done

# Images (B, 3, H, W) in one look to logits (B, classes) and macs_fraction (B,).
LookAt = Callable[[Tensor, Look], tuple[Tensor, Tensor]]


def calibrate(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    data: str = "",
    tolerance: float = 0.01,
    on_progress: OnProgress | None = None,
    look_at: LookAt | None = None,
) -> Calibration:
    """Measure the model's table from budget to price, and store it as `model.calibration`.

    The decisions measured are those of inference: greedy, executed sparsely. Of a model with `looks=2` the same passes
    say which budgets are better spent in two looks. The images are kept in memory, for they are run 13 to 48 times, or
    of a model that chooses resolutions once in each size.

    batches: of the calibration set, e.g. `Batches(...).epoch(0)`; labels are not read. data: what to call that set in
    the table. tolerance: the largest step between neighbouring fractions, where the controllers allow it. look_at: what
    takes one look in the model's place, as a file of it that was exported.

    Raises ValueError where there are no images.
    """
    parameter = next(model.parameters())
    images = [batch.images.to(parameter) for batch in batches]
    num_images = sum(map(len, images))
    if not num_images:
        raise ValueError("calibrate() was given no images")
    config = model.adapt_config
    passes = 0

    def measured(look: Look) -> View:
        nonlocal passes
        outputs = [look_at(batch, look) if look_at else _looked(model, batch, look) for batch in images]
        passes += 1
        if on_progress is not None:
            on_progress("calibrate", passes)
        logits, macs_fraction = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return View.of(logits, macs_fraction)

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if config.chooses_resolution:
                model.calibration = _of_sizes(model, measured, num_images, data)
            else:
                model.calibration = _of_prices(model, measured, num_images, data, tolerance)
    finally:
        model.train(training)
    return model.calibration


def _looked(model: MIAFormer, images: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    output = model.run(images, policy=look)
    return output.logits, output.trace.macs_fraction


def _of_sizes(model: MIAFormer, measured: Callable[[Look], View], num_images: int, data: str) -> Calibration:
    views = [measured(Look(Full(), (size,))) for size in model.image_sizes()]
    looks = choose_looks(views, between=False) if model.num_classes > 1 else ()
    return Calibration((), tuple(view.fraction for view in views), num_images, data, looks)


def _of_prices(
    model: MIAFormer, measured: Callable[[Look], View], num_images: int, data: str, tolerance: float
) -> Calibration:
    views: dict[float, View] = {}

    def mean_fraction(price: float) -> float:
        views[price] = measured(Look(model.learned(price)))
        return views[price].fraction

    table = price_table(mean_fraction, num_images, data, tolerance, model.price_range())
    if not model.adapt_config.looks_twice or model.num_classes <= 1:
        return table
    return replace(table, looks=choose_looks([views[price] for price in table.prices]))


# From budgets to prices -----------------------------------------------------------------------------------------------


def price_table(
    mean_fraction: Callable[[float], float],
    num_images: int,
    data: str = "",
    tolerance: float = 0.01,
    prices: tuple[float, float] = (math.exp(LOG_PRICE_RANGE[0]), math.exp(LOG_PRICE_RANGE[1])),
    coarse: int = 13,
    most: int = MOST_PASSES,
) -> Calibration:
    """Measure the table between two prices: evenly spaced log-prices, then more between distant neighbours.

    mean_fraction(price) runs the calibration images and gives their mean MACs fraction; tolerance: how far apart
    neighbouring fractions may be.
    """
    low, high = map(math.log, prices)
    points = {x: mean_fraction(math.exp(x)) for x in _spaced(low, high, coarse)}
    while len(points) < most:
        grid = sorted(points)
        neighbours = [(a, b) for a, b in pairwise(grid) if b - a > 1e-4]
        gap, left, right = max((abs(points[a] - points[b]), a, b) for a, b in neighbours)
        if gap <= tolerance:
            break
        middle = (left + right) / 2
        points[middle] = mean_fraction(math.exp(middle))
    return _monotone(points, num_images, data)


def _spaced(low: float, high: float, count: int) -> Sequence[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def _monotone(points: dict[float, float], num_images: int, data: str) -> Calibration:
    """Strictly monotone points only: of those that spend no less than a cheaper price did, the cheapest."""
    prices: list[float] = []
    fractions: list[float] = []
    for log_price in sorted(points):
        fraction = points[log_price]
        if not fractions or fraction < fractions[-1] - 1e-9:
            prices.append(math.exp(log_price))
            fractions.append(fraction)
    return Calibration(tuple(prices), tuple(fractions), num_images, data)


# Which two looks for which budget -------------------------------------------------------------------------------------


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
