"""Time against dense: in turn, sweep by sweep, so that a machine that slows down slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
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
        self._ms: NDArray[np.float64] = np.empty((0, len(inputs), len(calls)))  # (sweeps, inputs, calls)

    @property
    def sweeps(self) -> int:
        return len(self._ms)

    @property
    def last_ms(self) -> list[float]:
        """What each call took in the last sweep, on the last input."""
        last: list[float] = self._ms[-1, -1].tolist()
        return last

    def sweep(self) -> None:
        """Time every call on every input once. Interrupted, it leaves what was timed before as it was."""
        times = [[self._timed(call, value) for call in self.calls] for value in self.inputs]
        self._ms = np.concatenate([self._ms, [times]])

    def _timed(self, call: Callable[[Input], Any], value: Input) -> float:
        run = partial(call, value)
        if self.rehearse:
            run()
        return _milliseconds(run)

    def ms(self, call: int) -> float:
        return float(np.median(self._ms[..., call], axis=0).mean())

    def fraction(self, call: int, of: int) -> float:
        """The time of one call as a fraction of another's, each pair for itself."""
        return float(np.median(self._ms[..., call] / self._ms[..., of], axis=0).mean())

    def spread(self, call: int, of: int) -> float:
        """The interquartile range of the same fractions over all pairs, of all sweeps and inputs."""
        return _interquartile_range(self._ms[..., call] / self._ms[..., of])

    def variation(self, call: int) -> float:
        """The interquartile range of a call's times over their median, of all sweeps and inputs."""
        return _interquartile_range(self._ms[..., call]) / float(np.median(self._ms[..., call]))


def _interquartile_range(values: NDArray[np.float64]) -> float:
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def _milliseconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1000


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def time_against_dense(
    model: MIAFormer, batches: Sequence[Tensor], policy: AnyPolicy, cap: float | None = None, repeats: int = 5
) -> dict[str, float]:
    """How a policy's compute and time compare with the static backbone's, eager, on the same batches.

    batches: (B, 3, H, W) each, of equal size. `ms` and `dense_ms` are a batch's, medians over the repeats of each and
    means over batches; `time_fraction` is their quotient, `macs_fraction` the mean over images, `efficiency` = MACs
    fraction / time fraction (1.0: saved MACs became saved time).
    """
    if not batches:
        raise ValueError("time_against_dense() was given no batches")
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r} must be at least 1")
    training = model.training
    model.eval()
    race = Race([model.backbone, partial(model.run, policy=policy, cap=cap)], batches)
    fractions = []
    for images in batches:  # which warms up
        model.backbone(images)
        fractions.append(model.run(images, policy=policy, cap=cap).trace.macs_fraction.double().mean().item())
    for _ in range(repeats):
        race.sweep()
    model.train(training)
    macs_fraction, time_fraction = sum(fractions) / len(batches), race.ms(1) / race.ms(0)
    return {
        "batch": len(batches[0]),
        "ms": race.ms(1),
        "dense_ms": race.ms(0),
        "time_fraction": time_fraction,
        "macs_fraction": macs_fraction,
        "efficiency": macs_fraction / time_fraction,
    }
