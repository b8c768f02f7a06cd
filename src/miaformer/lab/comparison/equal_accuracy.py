"""What equal accuracy costs: the MACs at which each method is so much less accurate than the dense control."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from miaformer.lab.comparison.ablations import ABLATIONS

if TYPE_CHECKING:
    from miaformer.lab.comparison.results import Point

Array = NDArray[Any]
Curve = list[tuple[float, float]]  # MACs fraction, accuracy

OURS, DENSE, BACKBONE = "learned", "dense", "backbone"
NO_BASELINES = {OURS, DENSE, BACKBONE, "static", *ABLATIONS}  # ours in some form; everything else could have won


def macs_at_equal_accuracy(points: Sequence[Point], below: float) -> dict[str, float]:
    """The MACs fraction at which each method is `below` less accurate than the dense control, or than
    the backbone as it was where that is better, between its points.

    Of methods that do not fall so low it is that of their cheapest point; those that save nothing have none.
    """
    curves = {name: _curve(points, name) for name in dict.fromkeys(point.name for point in points)}
    return _at(curves, below)


def at_equal_accuracy(points: Sequence[Point], weights: Array, below: float) -> dict[str, Any]:
    """The same with intervals over resampled images, and ours against the best baseline, on the same resamples.

    weights: (resamples, n), of `resampled`. `methods`: by name `macs_fraction`, `interval` and the share of resamples
    in which it was `reached`. `best_baseline`: the one with the fewest MACs, with our `difference` and `ratio` to it.
    Nothing without a dense control.
    """
    found = macs_at_equal_accuracy(points, below)
    if not found:
        return {}
    samples = _resampled(points, weights, below)
    methods = {
        name: {"macs_fraction": macs, "interval": _interval(samples[name]), "reached": _share(samples[name])}
        for name, macs in found.items()
    }
    report: dict[str, Any] = {"below": below, "methods": methods, "best_baseline": None}
    baselines = [name for name in found if name not in NO_BASELINES]
    if OURS in found and baselines:
        best = min(baselines, key=lambda name: found[name])
        difference, ratio = samples[OURS] - samples[best], samples[OURS] / samples[best]
        report["best_baseline"] = {
            "name": best,
            "difference": found[OURS] - found[best],
            "difference_interval": _interval(difference),
            "ratio": found[OURS] / found[best],
            "ratio_interval": _interval(ratio),
        }
    return report


def _curve(points: Sequence[Point], name: str) -> Curve:
    return [(float(p.macs_fraction.mean()), float(p.correct.mean())) for p in points if p.name == name]


def _resampled(points: Sequence[Point], weights: Array, below: float) -> dict[str, Array]:
    """By method (resamples,), NaN where a resample has no such MACs."""
    images = weights.sum(axis=1)
    means = [
        (p.name, weights @ p.macs_fraction.astype(np.float32) / images, weights @ p.correct.astype(np.float32) / images)
        for p in points
    ]
    names = dict.fromkeys(point.name for point in points)
    samples = {name: np.full(len(weights), np.nan) for name in names}
    for place in range(len(weights)):
        curves: dict[str, Curve] = {name: [] for name in names}
        for name, macs, accuracy in means:
            curves[name].append((float(macs[place]), float(accuracy[place])))
        for name, value in _at(curves, below).items():
            samples[name][place] = value
    return samples


def _at(curves: dict[str, Curve], below: float) -> dict[str, float]:
    if not curves.get(DENSE):
        return {}
    end = max([curves[DENSE][0], *curves.get(BACKBONE, [])], key=lambda point: point[1])
    wanted = end[1] - below
    found = {name: _crossing(own, end, wanted) for name, own in curves.items() if name not in (DENSE, BACKBONE)}
    return {name: macs for name, macs in found.items() if macs is not None}


def _crossing(own: Curve, end: tuple[float, float], wanted: float) -> float | None:
    """Where a method's curve, which ends at the dense control, first rises to the wanted accuracy."""
    own = sorted(own)
    if own[0][1] >= wanted:
        return own[0][0]
    for (x0, y0), (x1, y1) in pairwise([*(point for point in own if point[0] < end[0]), end]):
        if y0 < wanted <= y1:
            return x0 + (x1 - x0) * (wanted - y0) / (y1 - y0)
    return None


def _interval(values: Array) -> list[float]:
    return [float(end) for end in np.nanquantile(values, (0.025, 0.975))]


def _share(values: Array) -> float:
    return float(np.isfinite(values).mean())
