"""What a comparison found: accuracy over MACs with intervals, differences to ours, compute at equal accuracy.

Intervals are over test images: each of `RESAMPLES` draws as many images with repetition, the same ones for every
method, so that differences are paired. Several seeds of a method count by their mean on each image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RESAMPLES = 2000
HARDEST = 0.1  # share of the images with the greatest loss under the backbone
EQUAL_ACCURACY = 0.005  # below the dense control's


@dataclass(frozen=True)
class Point:
    """A method at a budget, over its seeds."""

    name: str
    budget: float | None
    correct: Array  # (n,), mean over seeds
    macs_fraction: Array  # (n,), mean over seeds
    by_seed: list[float]  # accuracy
    time_fraction: float | None


@dataclass(frozen=True)
class Table:
    """All that was measured, ready for JSON: `rows`, `differences`, `at_equal_accuracy`."""

    rows: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    at_equal_accuracy: dict[str, float]
    num_images: int


def read_points(directories: Sequence[Path]) -> tuple[list[Point], Array]:
    """The points of measured runs, and the backbone's loss (n,) on each image.

    Raises ValueError where they were measured on different images.
    """
    gathered: dict[tuple[str, float | None, str], list[tuple[Array, Array, float | None]]] = {}
    loss: Array | None = None
    for directory in directories:
        report: Mapping[str, Any] = json.loads((directory / "measured.json").read_text())
        with np.load(directory / "measured.npz") as arrays:
            if loss is not None and not np.allclose(loss, arrays["dense_loss"], atol=1e-3):
                raise ValueError(f"{directory} was measured on other images, or beside another backbone: remove it")
            loss = arrays["dense_loss"]
            for point in report["points"]:
                key = (point["name"], point["budget"], report["method"])
                time = None if point["time"] is None else point["time"]["fraction"]
                values = arrays[f"correct{point['key']}"], arrays[f"macs_fraction{point['key']}"], time
                gathered.setdefault(key, []).append(values)
    if loss is None:
        raise ValueError("nothing has been measured yet")
    points = []
    for (name, budget, _), seeds in gathered.items():
        correct = np.mean([seed[0] for seed in seeds], axis=0)
        fraction = np.mean([seed[1] for seed in seeds], axis=0)
        times = [seed[2] for seed in seeds if seed[2] is not None]
        accuracies = [float(seed[0].mean()) for seed in seeds]
        time = float(np.mean(times)) if times else None
        points.append(Point(name, budget, correct, fraction, accuracies, time))
    return points, loss


def summarise(points: Sequence[Point], loss: Array, seed: int = 0) -> Table:
    """points: of one comparison; loss: (n,), the backbone's on each image."""
    num_images = len(loss)
    hardest = np.zeros(num_images, dtype=bool)
    hardest[np.argsort(-loss, kind="stable")[: max(round(HARDEST * num_images), 1)]] = True
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES).astype(np.float32)
    rows = [_row(point, weights, hardest) for point in points]
    return Table(rows, _differences(points, weights, hardest), _at_equal_accuracy(points), num_images)


def _row(point: Point, weights: Array, hardest: Array) -> dict[str, Any]:
    return {
        "name": point.name,
        "budget": point.budget,
        "accuracy": float(point.correct.mean()),
        "accuracy_interval": _interval(_means(point.correct, weights)),
        "accuracy_by_seed": point.by_seed,
        "accuracy_hardest": float(point.correct[hardest].mean()),
        "macs_fraction": float(point.macs_fraction.mean()),
        "macs_fraction_std": float(point.macs_fraction.std()),
        "time_fraction": point.time_fraction,
    }


def _means(values: Array, weights: Array, among: Array | None = None) -> Array:
    """Means (RESAMPLES,) of values (n,) over the resampled images, or over those of them that are `among`."""
    if among is not None:
        weights, values = weights[:, among], values[among]
    means: Array = weights @ values.astype(np.float32) / np.maximum(weights.sum(axis=1), 1)
    return means


def _interval(means: Array) -> list[float]:
    """95 %."""
    return [float(value) for value in np.quantile(means, (0.025, 0.975))]


def _differences(points: Sequence[Point], weights: Array, hardest: Array) -> list[dict[str, Any]]:
    """Ours less each other method at the same budget, over all images and the hardest of them."""
    ours = {point.budget: point for point in points if point.name == "learned"}
    found = []
    for other in points:
        mine = ours.get(other.budget)
        if mine is None or other.name == "learned":
            continue
        gap = mine.correct - other.correct
        found.append(
            {
                "over": other.name,
                "budget": other.budget,
                "difference": float(gap.mean()),
                "interval": _interval(_means(gap, weights)),
                "hardest": float(gap[hardest].mean()),
                "hardest_interval": _interval(_means(gap, weights, hardest)),
                "macs_fraction": [float(mine.macs_fraction.mean()), float(other.macs_fraction.mean())],
            }
        )
    return found


def _at_equal_accuracy(points: Sequence[Point]) -> dict[str, float]:
    """The MACs fraction at which each method is `EQUAL_ACCURACY` below the dense control, between its points.

    Methods that do not come so near, and those that no point is below it, have none.
    """
    dense = [point for point in points if point.name == "dense"]
    if not dense:
        return {}
    wanted = float(dense[0].correct.mean()) - EQUAL_ACCURACY
    end = (float(dense[0].macs_fraction.mean()), float(dense[0].correct.mean()))
    found = {}
    for name in dict.fromkeys(point.name for point in points if point.name != "dense"):
        own = sorted((float(p.macs_fraction.mean()), float(p.correct.mean())) for p in points if p.name == name)
        curve = [*own, end]
        for (x0, y0), (x1, y1) in pairwise(curve):
            if y0 < wanted <= y1:
                found[name] = x0 + (x1 - x0) * (wanted - y0) / (y1 - y0)
                break
    return found
