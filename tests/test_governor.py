"""Under load the budget falls as far as answers in time need, and no further; only past that is anybody refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaformer.serving.governor import HEADROOM, LATEST, LONGEST_BATCH, Governor, ServiceTime

A_BATCH, A_PICTURE, A_BUDGET = 0.004, 0.003, 0.02  # seconds; a picture at budget 1 takes 23 ms
OBJECTIVE = 0.5
BOUNDS = 1.0, 0.35


def true_time(pictures: int, budgets: float) -> float:
    return A_BATCH + A_PICTURE * pictures + A_BUDGET * budgets


def measured() -> list[tuple[int, float, float]]:
    return [(n, n * b, true_time(n, n * b)) for n in (1, 8) for b in BOUNDS]


def governor(bounds: tuple[float, float] | None = BOUNDS, **limits: int) -> Governor:
    return Governor(ServiceTime(measured()), OBJECTIVE, bounds, **{"max_batch": 16, "max_queue": 10_000, **limits})


def test_time_is_learned_from_batches_that_ran() -> None:
    time = ServiceTime([(1, 1.0, 5.0), (8, 8.0, 30.0)])  # wrong by far
    generator = np.random.default_rng(0)
    for _ in range(400):
        pictures = int(generator.integers(1, 17))
        budgets = float(generator.uniform(0.3, 1, pictures).sum())
        time.add(pictures, budgets, true_time(pictures, budgets) * generator.lognormal(0, 0.1))
    for pictures, budget in ((1, 1.0), (8, 0.5), (16, 0.35)):
        assert time.of(pictures, budget) == pytest.approx(true_time(pictures, pictures * budget), rel=0.1)


def test_what_budgets_save_is_not_forgotten_while_all_get_the_same() -> None:
    time = ServiceTime(measured())
    for _ in range(2000):
        time.add(4, 4.0, true_time(4, 4.0))
    saved = 1 - time.of(8, 0.35) / time.of(8, 1.0)
    assert saved == pytest.approx(1 - true_time(8, 8 * 0.35) / true_time(8, 8), abs=0.1)


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(0.01, 1), st.floats(1e-4, 10)), min_size=1, max_size=30))
def test_no_batch_takes_less_than_nothing(batches: list[tuple[int, float, float]]) -> None:
    time = ServiceTime([])
    for pictures, budget, seconds in batches:
        time.add(pictures, pictures * budget, seconds)
        assert time.of(pictures, budget) >= time.of(pictures, budget / 2) >= time.of(1, budget / 2) >= 0


@given(st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 2))
def test_budgets_stay_in_bounds_and_fall_with_what_waits(few: int, more: int, oldest: float) -> None:
    plans = [governor().plan(waiting, oldest) for waiting in sorted((few, few + more))]
    for plan in plans:
        assert plan.budget is not None
        assert BOUNDS[1] <= plan.budget <= BOUNDS[0]
        assert plan.pictures <= 16
    assert plans[0].budget >= plans[1].budget
    if few:
        assert plans[0].pictures >= 1


def test_nothing_waits_nothing_is_lowered() -> None:
    assert governor().plan(1, 0.0).budget == BOUNDS[0]
    assert governor(bounds=None).plan(500, 3.0).budget is None


def test_the_budget_is_what_the_time_left_affords() -> None:
    plan = governor().plan(18, 0.01)
    assert BOUNDS[1] < plan.budget < BOUNDS[0]
    assert 0.01 + 2 * A_BATCH + 18 * (A_PICTURE + A_BUDGET * plan.budget) == pytest.approx(HEADROOM * OBJECTIVE)


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(0.01, 1), st.floats(1e-6, 10)), max_size=4))
def test_whatever_was_learned_there_is_a_plan(batches: list[tuple[int, float, float]]) -> None:
    time = ServiceTime((pictures, pictures * budget, seconds) for pictures, budget, seconds in batches)
    learned = Governor(time, OBJECTIVE, BOUNDS, 16, 100)
    assert 1 <= learned.plan(30, 0.0).pictures <= 16
    assert learned.retry_after(0, 1, 0.0) is None


def test_no_batch_is_so_long_that_others_would_be_late() -> None:
    slow = Governor(ServiceTime([(1, 1.0, 0.1), (1, 0.5, 0.06), (4, 4.0, 0.4)]), OBJECTIVE, BOUNDS, 32, 100)
    plan = slow.plan(30, 0.0)
    assert 1 <= plan.pictures <= 3


def test_who_would_be_late_at_the_least_budget_is_refused_and_told_when_to_come() -> None:
    batch = int((LONGEST_BATCH * OBJECTIVE - A_BATCH) / (A_PICTURE + A_BUDGET * BOUNDS[1]))
    batches = int(LATEST * OBJECTIVE / true_time(batch, batch * BOUNDS[1]))
    fits = batch * batches - 1
    assert governor().retry_after(fits, 1, 0.1) is None
    assert governor().retry_after(fits + 10, 1, 0.1) > 0
    assert governor().retry_after(1, 1, oldest=OBJECTIVE + 0.1) > 0  # slower than it should be: say so
    assert governor().retry_after(0, 32, 0.0) is None
    assert governor(max_queue=10).retry_after(8, 3, 0.0) > 0
    assert governor().retry_after(fits - batch, 1, 0.1, busy=LATEST * OBJECTIVE) > 0
    assert governor().retry_after(fits * 4, 1, 0.1) > governor().retry_after(fits + 10, 1, 0.1)


@dataclass
class Simulated:
    """One server whose batches take `true_time`, give or take, and requests that come whether or not it keeps up."""

    latencies: list[float] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    refused: int = 0

    def run(self, load: float, governor: Governor, requests: int = 3000) -> Simulated:
        """load: pictures a second, of what batches of 16 at the full budget sustain."""
        generator = np.random.default_rng(0)
        rate = load * 16 / true_time(16, 16.0)
        arrivals = np.cumsum(generator.exponential(1 / rate, requests)).tolist()
        now, waiting, running_until, running = 0.0, [], 0.0, 0
        while arrivals or waiting:
            if waiting and now >= running_until:
                plan = governor.plan(len(waiting), now - waiting[0])
                batch, waiting = waiting[: plan.pictures], waiting[plan.pictures :]
                budget = plan.budget or 1.0
                seconds = true_time(len(batch), len(batch) * budget) * generator.lognormal(0, 0.15)
                governor.time.add(len(batch), len(batch) * budget, seconds)
                running, running_until = len(batch), now + seconds
                self.latencies += [running_until - came for came in batch]
                self.budgets += [budget] * len(batch)
            comes = arrivals[0] if arrivals else math.inf
            now = min(comes, running_until) if waiting else comes
            if arrivals and now == comes:
                came = arrivals.pop(0)
                busy = running if now < running_until else 0
                first = waiting[0] if waiting else now
                if governor.retry_after(len(waiting) + busy, 1, now - first) is None:
                    waiting.append(came)
                else:
                    self.refused += 1
        return self

    @property
    def p95(self) -> float:
        return float(np.quantile(self.latencies, 0.95))


def test_twice_what_a_static_server_sustains_is_answered_in_time() -> None:
    for load in (0.5, 1.0, 1.5, 2.0):
        seen = Simulated().run(load, governor())
        assert seen.p95 <= OBJECTIVE, load
        assert seen.refused == 0 or load == 2.0, load
        assert seen.refused < 30, load  # bursts, where the least budget is just enough on average
    assert np.mean(Simulated().run(0.5, governor()).budgets) > 0.95
    assert BOUNDS[1] < np.mean(seen.budgets) < 0.7


def test_a_static_server_refuses_at_that_load() -> None:
    seen = Simulated().run(1.5, governor(bounds=None))
    assert seen.refused > 500


def test_past_the_least_budget_it_refuses_and_answers_the_others_in_time() -> None:
    seen = Simulated().run(5.0, governor())
    assert 300 < seen.refused < 3000
    assert seen.p95 <= OBJECTIVE
    assert np.mean(seen.budgets[500:]) < BOUNDS[1] + 0.02
