"""Dense and sparse are timed in turn, and medians are those of the pairs. No test here takes a real time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from vits import lively, pictures

from miaformer.evaluation import time_against_dense, time_pairs, timing
from miaformer.model import policy


class Clock:
    """A clock that a call sets forward by what it is said to take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[str] = []

    def call(self, name: str, durations_ms: list[float]) -> object:
        left: Iterator[float] = iter(durations_ms)

        def run() -> None:
            self.calls.append(name)
            self.seconds += next(left) / 1000

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.seconds)
    return found


def test_pairs_are_timed_in_turn_after_a_warm_up(clock: Clock) -> None:
    dense = clock.call("dense", [100.0, 10.0, 20.0, 12.0])
    sparse = clock.call("sparse", [900.0, 5.0, 20.0, 3.0])
    times = time_pairs(dense, sparse, repeats=3, warm_up=1)
    assert clock.calls == ["dense", "sparse"] * 4
    assert times.dense_ms == pytest.approx(12.0)
    assert times.sparse_ms == pytest.approx(5.0)
    assert times.time_fraction == pytest.approx(0.5)  # of 0.5, 1.0 and 0.25; not 5 / 12


def test_at_least_one_pair() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        time_pairs(lambda: None, lambda: None, repeats=0)


def test_efficiency_is_saved_macs_over_saved_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively().train()
    batches = [pictures(model.backbone, 2, seed=seed) for seed in range(3)]
    taken = iter([timing.PairTimes(10.0, 4.0, 0.4), timing.PairTimes(10.0, 6.0, 0.6), timing.PairTimes(20.0, 6.0, 0.3)])
    monkeypatch.setattr(timing, "time_pairs", lambda *args, **kwargs: next(taken))
    found = time_against_dense(model, batches, policy.Random(depth=0.5))
    with torch.inference_mode():
        chance = policy.Random(depth=0.5)
        macs = torch.cat([model.eval().run(images, policy=chance).trace.macs_fraction for images in batches])
    assert found["batch"] == 2
    assert found["ms"] == pytest.approx(16 / 3)
    assert found["dense_ms"] == pytest.approx(40 / 3)
    assert found["time_fraction"] == pytest.approx(0.4)
    assert found["macs_fraction"] == pytest.approx(macs.mean().item())
    assert found["efficiency"] == pytest.approx(macs.mean().item() / 0.4)


def test_timing_needs_batches() -> None:
    with pytest.raises(ValueError, match="no batches"):
        time_against_dense(lively(), [], policy.Full())
