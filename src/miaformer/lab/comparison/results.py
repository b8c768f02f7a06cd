"""What a comparison found: accuracy over MACs with intervals, differences to ours, compute at equal accuracy.

Intervals are over test images: each resample draws as many images with repetition, the same ones for every
method, so that differences are paired. Several seeds of a method count by their mean on each image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from miaformer.evaluation import spearman
from miaformer.evaluation.intervals import interval, resampled
from miaformer.lab.comparison.equal_accuracy import BACKBONE, DENSE, at_equal_accuracy, macs_at_equal_accuracy
from miaformer.lab.comparison.timing import Times, mean_times, read_times

Array = NDArray[Any]

HARDEST = 0.1  # share of the images with the greatest loss under the backbone
EQUAL_ACCURACY = 0.005  # below the dense control's
ONE_POINT = 0.01  # likewise
EQUAL_MACS = 0.005  # fractions so near count as equal


@dataclass(frozen=True)
class Point:
    """A method at a budget, over its seeds. time_fraction: at the largest batch size that was timed."""

    name: str
    budget: float | None
    correct: Array  # (n,), mean over seeds
    macs_by_seed: Array  # (seeds, n), fractions
    by_seed: list[float]  # accuracy
    time_fraction: float | None
    times: Times = field(default_factory=dict)

    @property
    def macs_fraction(self) -> Array:
        """(n,), mean over seeds."""
        mean: Array = self.macs_by_seed.mean(axis=0)
        return mean


@dataclass(frozen=True)
class Table:
    """All that was measured, ready for JSON.

    rows: of every method at every budget; differences: ours less the others; at_equal_accuracy: MACs fractions half a
    point below dense; adaptivity: at each budget the rank correlation of what our method spends on an image with how
    hard it is; one_point_below: MACs at one point below dense, with intervals, and ours against the best baseline.
    """

    rows: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    at_equal_accuracy: dict[str, float]
    adaptivity: list[dict[str, float]]
    num_images: int
    one_point_below: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difficulty:
    """How hard each image is for the backbone: its loss (n,), and by how much the right logit leads (n,)."""

    loss: Array
    margin: Array


def read_points(directories: Sequence[Path]) -> tuple[list[Point], Difficulty]:
    """The points of measured runs, and how hard their images are.

    Raises ValueError where they were measured on different images.
    """
    gathered: dict[tuple[str, float | None, str, int], list[tuple[Array, Array, Times]]] = {}
    found: Difficulty | None = None
    for directory in directories:
        report: Mapping[str, Any] = json.loads((directory / "measured.json").read_text())
        times = read_times(directory, len(report["points"]))
        with np.load(directory / "measured.npz") as arrays:
            if found is not None and not np.allclose(found.loss, arrays["dense_loss"], atol=1e-3):
                raise ValueError(f"{directory} was measured on other images, or beside another backbone: remove it")
            found = Difficulty(arrays["dense_loss"], arrays["dense_margin"])
            for point, time in zip(report["points"], times, strict=True):
                size = point["key"] if point["budget"] is None else 0  # one method may have several that know no budget
                key = (point["name"], point["budget"], report["method"], size)
                values = arrays[f"correct{point['key']}"], arrays[f"macs_fraction{point['key']}"], time
                gathered.setdefault(key, []).append(values)
    if found is None:
        raise ValueError("nothing has been measured yet")
    points = []
    for (name, budget, *_), seeds in gathered.items():
        correct = np.mean([seed[0] for seed in seeds], axis=0)
        fractions = np.stack([seed[1] for seed in seeds])
        mean = mean_times([seed[2] for seed in seeds])
        fraction = mean[max(mean, key=int)]["fraction"] if mean else None
        accuracies = [float(seed[0].mean()) for seed in seeds]
        points.append(Point(name, budget, correct, fractions, accuracies, fraction, mean))
    return points, found


def summarise(points: Sequence[Point], difficulty: Difficulty, seed: int = 0) -> Table:
    """points: of one comparison; difficulty: of its images."""
    num_images = len(difficulty.loss)
    hardest = np.zeros(num_images, dtype=bool)
    hardest[np.argsort(-difficulty.loss, kind="stable")[: max(round(HARDEST * num_images), 1)]] = True
    weights = resampled(num_images, seed)
    points = [*points, _backbone(points, difficulty)]
    rows = [_row(point, weights, hardest) for point in points]
    gaps = _differences(points, weights, hardest)
    return Table(
        rows,
        gaps,
        macs_at_equal_accuracy(points, EQUAL_ACCURACY),
        _adaptivity(points, difficulty),
        num_images,
        at_equal_accuracy(points, weights, ONE_POINT),
    )


def _backbone(points: Sequence[Point], difficulty: Difficulty) -> Point:
    """The shared backbone as it is: training it on may make it worse."""
    right = (difficulty.margin > 0).astype(np.float64)
    macs = next((p.macs_by_seed[:1] for p in points if p.name == DENSE), np.ones((1, len(right))))
    return Point(BACKBONE, None, right, macs, [float(right.mean())], None)


def _row(point: Point, weights: Array, hardest: Array) -> dict[str, Any]:
    return {
        "name": point.name,
        "budget": point.budget,
        "accuracy": float(point.correct.mean()),
        "accuracy_interval": interval(point.correct, weights),
        "accuracy_by_seed": point.by_seed,
        "accuracy_hardest": float(point.correct[hardest].mean()),
        "macs_fraction": float(point.macs_fraction.mean()),
        "macs_fraction_std": float(point.macs_by_seed.std(axis=1).mean()),
        "time_fraction": point.time_fraction,
        "times": point.times,
    }


def _differences(points: Sequence[Point], weights: Array, hardest: Array) -> list[dict[str, Any]]:
    """Ours less each other method at the same budget, over all images and the hardest of them.

    A method that knows no budget stands against ours at the largest one where ours takes no more MACs, give or take
    `EQUAL_MACS`.
    """
    ours = sorted((p for p in points if p.name == "learned"), key=lambda p: float(p.macs_fraction.mean()))
    found = []
    for other in points:
        if other.budget is None:
            most = float(other.macs_fraction.mean()) + EQUAL_MACS
            mine = next((p for p in reversed(ours) if p.macs_fraction.mean() <= most), None)
        else:
            mine = next((p for p in ours if p.budget == other.budget), None)
        if mine is None or other.name == "learned":
            continue
        gap = mine.correct - other.correct
        found.append(
            {
                "over": other.name,
                "budget": other.budget,
                "our_budget": mine.budget,
                "difference": float(gap.mean()),
                "interval": interval(gap, weights),
                "hardest": float(gap[hardest].mean()),
                "hardest_interval": interval(gap, weights, hardest),
                "macs_fraction": [float(mine.macs_fraction.mean()), float(other.macs_fraction.mean())],
            }
        )
    return found


def _adaptivity(points: Sequence[Point], difficulty: Difficulty) -> list[dict[str, float]]:
    """Spearman's rank correlations, means over seeds: 1 where the harder image always gets more."""
    harder = {"loss": difficulty.loss, "margin": -difficulty.margin}
    return [
        {
            "budget": float(point.budget or 1.0),
            **{
                name: float(
                    np.mean([spearman(torch.from_numpy(values), torch.from_numpy(one)) for one in point.macs_by_seed])
                )
                for name, values in harder.items()
            },
        }
        for point in points
        if point.name == "learned"
    ]
