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
from miaformer.model.early_exit import ASKING, NEVER, EarlyExit, answers_early, left_at, macs_of_leaving
from miaformer.model.looks import STEP, Looks
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Look

MOST_PASSES = 48  # over the calibration images
LEAST_GAP = 0.03  # between the fractions of the looks that are tried
THRESHOLDS = 16  # at which images leave, that are tried for each size
Array = NDArray[Any]
OnProgress = Callable[[str, int], None]  # stage ("calibrate", "controls", "evaluate"), passes or images done

# Images (B, 3, H, W) in one look to its answers (B, K, classes), early ones first, and macs_fraction (B,) of the last.
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

    def measured(look: Look) -> tuple[Tensor, Tensor]:
        nonlocal passes
        outputs = [look_at(batch, look) if look_at else _looked(model, batch, look) for batch in images]
        passes += 1
        if on_progress is not None:
            on_progress("calibrate", passes)
        answers, macs_fraction = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
        return answers.float(), macs_fraction.double()

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
    early = look.policy.answers if isinstance(look.policy, EarlyExit) else []
    return torch.stack([*early, output.logits], dim=1), output.trace.macs_fraction


Measured = Callable[[Look], tuple[Tensor, Tensor]]  # as `LookAt`, of all images


def _of_sizes(model: MIAFormer, measured: Measured, num_images: int, data: str) -> Calibration:
    whole, sizes = model.cost().backbone, model.image_sizes()
    if not answers_early(model.backbone):
        return Calibration((), tuple(model.cost(size).everything / whole for size in sizes), num_images, data)
    asking = EarlyExit(model.backbone, ASKING)
    views = []
    for size in sizes:
        answers, _ = measured(Look(asking, (size,)))
        cost = model.cost(size)
        views.append(View.of(answers[:, -1], torch.full((num_images,), cost.everything / whole).double()))
        macs = torch.tensor(macs_of_leaving(cost, asking.blocks)).double() / whole
        views += leaving_views(views[-1].fraction, answers, macs)
    looks = choose_looks(views, between=False)
    return Calibration((), tuple(view.fraction for view in views if view.leave == NEVER), num_images, data, looks)


def leaving_views(to_its_end: float, answers: Tensor, macs: Tensor) -> list[View]:
    """Looks in one size that images leave with a confident answer, at several thresholds.

    to_its_end: MACs of a look that nobody leaves. answers: (n, K, classes); macs: (K,), of leaving with each.
    """
    confidence = answers.softmax(dim=2).amax(dim=2)
    if confidence.shape[1] == 1:
        return []
    places = torch.linspace(0, 1, THRESHOLDS + 2)[1:-1]
    views = []
    thresholds = torch.quantile(confidence[:, :-1].flatten(), places)
    for threshold in thresholds.clamp(max=1 - 1e-6).unique().tolist():  # what rounds to 1 here need not elsewhere
        left = left_at(confidence, threshold)
        views.append(View.of(answers[torch.arange(len(left)), left], macs[left], threshold, to_its_end))
    return views


def _of_prices(model: MIAFormer, measured: Measured, num_images: int, data: str, tolerance: float) -> Calibration:
    views: dict[float, View] = {}

    def mean_fraction(price: float) -> float:
        answers, macs = measured(Look(model.learned(price)))
        views[price] = View.of(answers[:, -1], macs)
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
    leave: float = NEVER  # images with an early confidence of at least this left with that answer
    to_its_end: float = 0.0  # mean MACs where nobody leaves

    @staticmethod
    def of(logits: Tensor, macs_fraction: Tensor, leave: float = NEVER, to_its_end: float | None = None) -> View:
        """logits: (n, classes); macs_fraction: (n,)."""
        confidence, answer = logits.float().softmax(dim=1).max(dim=1)
        macs = macs_fraction.double().cpu().numpy()
        mean = float(macs.mean())
        whole = mean if to_its_end is None else to_its_end
        return View(mean, macs, answer.cpu().numpy(), confidence.cpu().numpy(), leave, whole)


def choose_looks(views: Sequence[View], between: bool = True, looks: int = 2) -> tuple[Looks, ...]:
    """For each mean budget, the best two looks, or one look with early exits, where that beats a single look.

    Better is what answers more often as the most expensive single look does, less the standard error of what is spent:
    a pair that spends very unevenly meets its budget less exactly on other images. views: of different prices, or
    sizes, and of those that images leave. between: whether single looks can spend anything between two of them, as
    prices can and sizes cannot. looks: 1 allows no second look.
    """
    ordered = _apart(sorted((view for view in views if view.leave == NEVER), key=lambda view: view.fraction))
    left = [view for view in views if view.leave < NEVER]
    reference, n = ordered[-1].answer, len(ordered[-1].answer)
    agreement = np.array([(view.answer == reference).mean() - view.macs.std() / n**0.5 for view in ordered])
    fractions = np.array([view.fraction for view in ordered])
    curves = [
        _Curve(first, second, reference)
        for first in [*ordered, *left]
        for second in ordered
        if looks == 2 and first.to_its_end < second.fraction - 1e-9
    ]
    curves += [_Curve(view, None, reference) for view in left]
    found = []
    for budget in np.arange(min(view.fraction for view in [*ordered, *left]) + STEP, fractions[-1], STEP):
        within = int(np.searchsorted(fractions, budget + STEP / 2)) - 1
        best, score = None, float(np.interp(budget, fractions, agreement) if between else agreement[within])
        if within < 0 and not between:
            score = -math.inf  # no look that goes to its end is so cheap
        for curve in curves:
            row, own = curve.at(float(budget))
            if row is not None and own > score:
                best, score = row, own
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
    """Two looks, with any number of images looked at again, the least confident first; or one that images leave."""

    def __init__(self, first: View, second: View | None, reference: Array) -> None:
        self.first, self.second = first, second
        order = np.argsort(first.confidence, kind="stable")
        confidence, count = first.confidence[order].astype(np.float64), len(order)
        right, spent = first.answer[order] == reference[order], first.macs[order]
        again = np.zeros(1, dtype=np.int64)  # how many: images of one confidence are not told apart
        gained, more = np.zeros(count), np.zeros(count)
        if second is not None:
            again = 1 + np.flatnonzero((np.diff(confidence) > 0) & (confidence[:-1] < first.leave))
            gained = (second.answer[order] == reference[order]).astype(np.float64) - right
            more = second.macs[order]

        def mean(values: Array, where_again: Array) -> Array:
            """Of all images, for each number of them that are looked at again."""
            total: Array = values.sum() + np.append(0.0, np.cumsum(where_again))[again]
            return total / count

        edges = np.append(confidence, confidence[-1:])
        self._confidence = np.minimum((edges[again - 1] + edges[again]) / 2, first.leave) * (again > 0)
        self._agreement = mean(right, gained)
        self._spent = mean(spent, more)
        variance = mean(spent**2, (spent + more) ** 2 - spent**2) - self._spent**2
        self._error = np.sqrt(np.maximum(variance, 0) / count)
        self._step = (0.0 if second is None else second.fraction) / count  # what one image more takes

    def at(self, budget: float) -> tuple[Looks | None, float]:
        """What spends this budget most nearly, and how good it is; None where nothing comes near it."""
        if not len(self._spent):
            return None, 0.0
        place = int(np.abs(self._spent - budget).argmin())
        if abs(self._spent[place] - budget) > max(STEP / 2, self._step):
            return None, 0.0
        first, second = self.first, self.second or self.first
        confidence = float(self._confidence[place])
        looks = Looks(budget, first.to_its_end, second.to_its_end, confidence, first.leave)
        return looks, float(self._agreement[place] - self._error[place])
