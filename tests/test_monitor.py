"""The monitor stays quiet on usual spending, whatever its shape, and finds a rise in few images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miaformer.serving.monitor import SpendingMonitor

SHAPES = {
    "normal": lambda rng, n: 0.5 + 0.08 * rng.standard_normal(n),
    "two kinds": lambda rng, n: np.where(rng.random(n) < 0.7, 0.3, 0.7) + 0.01 * rng.standard_normal(n),
    "long tail": lambda rng, n: np.minimum(0.2 + 0.1 * rng.exponential(size=n), 1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_images_raise_no_alarm_and_dearer_ones_do(shape: str) -> None:
    rng = np.random.default_rng(0)
    monitor = SpendingMonitor.fit(SHAPES[shape](rng, 2000))
    assert not monitor.see(SHAPES[shape](rng, 20_000)), monitor.alarm_at
    assert monitor.images == 20_000
    monitor.reset()
    assert (monitor.images, monitor.alarm) == (0, False)
    rise = monitor.std  # by one standard deviation
    assert monitor.see(SHAPES[shape](rng, 400) + rise)
    assert monitor.alarm_at is not None
    assert monitor.alarm_at < 100


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=40), st.integers(1, 40))
def test_it_does_not_matter_how_images_are_batched(values: list[float], cut: int) -> None:
    whole, parts = (SpendingMonitor(0.4, 0.05) for _ in range(2))
    whole.see(torch.tensor(values))
    parts.see(torch.tensor(values[:cut]))
    parts.see(torch.tensor(values[cut:]))
    assert (whole.alarm_at, whole.images) == (parts.alarm_at, parts.images)


def test_cheaper_images_never_alarm_and_do_not_hide_dearer_ones() -> None:
    monitor = SpendingMonitor(0.5, 0.05)
    assert not monitor.see([0.1] * 5000)
    assert monitor.see([0.6] * 30)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        SpendingMonitor(0.5, 0.05).see([0.5, float("nan")])


def test_equal_costs_can_be_watched_too() -> None:
    monitor = SpendingMonitor.fit([0.4] * 10)
    assert not monitor.see([0.4] * 1000)
    assert monitor.see([0.45] * 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpendingMonitor(0.0, 0.1),
        lambda: SpendingMonitor(0.5, 0.0),
        lambda: SpendingMonitor(0.5, 0.1, allowance=-1.0),
        lambda: SpendingMonitor(0.5, 0.1, threshold=0.0),
        lambda: SpendingMonitor.fit([0.5]),
        lambda: SpendingMonitor.fit(torch.zeros(2, 2)),
    ],
)
def test_mistakes_are_named(make: object) -> None:
    with pytest.raises(ValueError, match=r"mean=|allowance=|two images or more"):
        make()  # type: ignore[operator]
