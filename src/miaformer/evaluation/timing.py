"""Time against dense: in turn, pair by pair, so that a machine that slows down slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median, quantiles
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy

Input = TypeVar("Input")


class Race(Generic[Input]):
    """Calls timed in turn on the same inputs, sweep by sweep, so that a machine that slows down slows all of them.

    A call is known by its place in `calls`. Inputs differ in compute, so each counts for itself: what is reported are
    medians over the sweeps of one input, and of these the mean over inputs. rehearse: run each call once untimed right
    before it is timed, so that it finds caches and threads as it left them itself, not as its predecessor did.
    """

    def __init__(
        self, calls: Sequence[Callable[[Input], Any]], inputs: Sequence[Input], rehearse: bool = False
    ) -> None:
        if not calls or not inputs:
            raise ValueError(f"a race needs calls and inputs, got {len(calls)} and {len(inputs)}")
        self.calls, self.inputs, self.rehearse = calls, inputs, rehearse
        self._ms: list[list[list[float]]] = []  # [sweep][input][call]

    @property
    def sweeps(self) -> int:
        return len(self._ms)

    @property
    def last_ms(self) -> list[float]:
        """What each call took in the last sweep, on the last input."""
        return self._ms[-1][-1]

    def sweep(self) -> None:
        """Time every call on every input once. Interrupted, it leaves what was timed before as it was."""
        self._ms.append([self._round(value) for value in self.inputs])

    def _round(self, value: Input) -> list[float]:
        times = []
        for call in self.calls:
            run = partial(call, value)
            if self.rehearse:
                run()
            times.append(_milliseconds(run))
        return times

    def ms(self, call: int) -> float:
        return fmean(median(sweep[i][call] for sweep in self._ms) for i in range(len(self.inputs)))

    def fraction(self, call: int, of: int) -> float:
        """The time of one call as a fraction of another's, each pair for itself."""
        return fmean(median(ratios) for ratios in self._ratios(call, of))

    def spread(self, call: int, of: int) -> float:
        """The interquartile range of the same fractions over all pairs, of all sweeps and inputs."""
        return _interquartile_range([ratio for of_input in self._ratios(call, of) for ratio in of_input])

    def variation(self, call: int) -> float:
        """The interquartile range of a call's times over their median, of all sweeps and inputs."""
        times = [of_input[call] for sweep in self._ms for of_input in sweep]
        return _interquartile_range(times) / median(times)

    def _ratios(self, call: int, of: int) -> list[list[float]]:
        """[input][sweep]"""
        return [[sweep[i][call] / sweep[i][of] for sweep in self._ms] for i in range(len(self.inputs))]


def _interquartile_range(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


@dataclass(frozen=True)
class PairTimes:
    """Medians over the pairs, in ms; `time_fraction` is the median of each pair's own sparse / dense."""

    dense_ms: float
    sparse_ms: float
    time_fraction: float


def time_pairs(
    dense_call: Callable[[], Any], sparse_call: Callable[[], Any], repeats: int = 5, warm_up: int = 2
) -> PairTimes:
    """Time two calls in turn, `repeats` pairs after `warm_up` untimed ones. Waits for CUDA's work to end."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r} must be at least 1")
    for _ in range(warm_up):
        dense_call()
        sparse_call()
    race = Race([lambda _: dense_call(), lambda _: sparse_call()], [None])
    for _ in range(repeats):
        race.sweep()
    return PairTimes(race.ms(0), race.ms(1), race.fraction(1, 0))


def _milliseconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1000


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_against_dense(
    model: MIAFormer, batches: Sequence[Tensor], policy: AnyPolicy, cap: float | None = None, repeats: int = 5
) -> dict[str, float]:
    """How a policy's compute and time compare with the static backbone's, eager, on the same batches.

    batches: (B, 3, H, W) each, of equal size. Images differ in compute, so every batch is timed for itself
    and the times of all are added up: `ms` and `dense_ms` a batch, `time_fraction` their quotient,
    `macs_fraction` the mean over images, `efficiency` = MACs fraction / time fraction (1.0: saved MACs became
    saved time).
    """
    if not batches:
        raise ValueError("time_against_dense() was given no batches")
    training = model.training
    model.eval()
    dense_ms = sparse_ms = macs_fraction = 0.0
    with torch.inference_mode():
        for images in batches:

            def dense(images: Tensor = images) -> Tensor:
                return cast(Tensor, model.backbone(images))

            def sparse(images: Tensor = images) -> Tensor:
                return model.run(images, policy=policy, cap=cap).trace.macs_fraction

            times = time_pairs(dense, sparse, repeats, warm_up=1)
            macs_fraction += sparse().double().mean().item()
            dense_ms += times.dense_ms
            sparse_ms += times.sparse_ms
    model.train(training)
    count, time_fraction = len(batches), sparse_ms / dense_ms
    return {
        "batch": len(batches[0]),
        "ms": sparse_ms / count,
        "dense_ms": dense_ms / count,
        "time_fraction": time_fraction,
        "macs_fraction": macs_fraction / count,
        "efficiency": macs_fraction / count / time_fraction,
    }
