"""I5, the mean: the calibration table is monotone, and a price looked up brings the budget asked for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miaformer.engine.controller import LOG_PRICE_RANGE
from miaformer.evaluation.calibration import price_table
from miaformer.model.budget import Calibration, check_fraction

LOW, HIGH = LOG_PRICE_RANGE


def logistic(steepness: float, middle: float, least: float = 0.1) -> Any:
    return lambda price: least + (1 - least) / (1 + math.exp(steepness * (math.log(price) - middle)))


@given(st.floats(0.3, 30), st.floats(-5, 5), st.floats(0.1, 1.0))
@settings(max_examples=100)
def test_the_price_of_a_budget_brings_it_within_a_hundredth(steepness: float, middle: float, share: float) -> None:
    """For a spending that falls with the price, however suddenly."""
    spend = logistic(steepness, middle)
    table = price_table(spend, num_images=10)
    least, most = table.range
    budget = least + share * (most - least)
    assert abs(spend(table.price(budget)) - budget) <= 0.01


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20), st.floats(0.001, 1.0))
@settings(max_examples=100)
def test_a_table_inverts_itself(spent: list[float], budget: float) -> None:
    fractions = sorted(set(spent), reverse=True)
    prices = [math.exp(LOW + (HIGH - LOW) * i / 20) for i in range(len(fractions))]
    table = Calibration(tuple(prices), tuple(fractions), 1)
    for price, fraction in zip(prices, fractions, strict=True):
        assert table.price(fraction) == pytest.approx(price, rel=1e-6)
    assert prices[0] * (1 - 1e-9) <= table.price(budget) <= prices[-1] * (1 + 1e-9)
    assert table.range == (fractions[-1], fractions[0])


def test_a_larger_budget_never_costs_a_higher_price() -> None:
    table = price_table(logistic(2, 0), 1)
    prices = [table.price(b / 200) for b in range(1, 201)]
    assert prices == sorted(prices, reverse=True)


def test_measuring_is_finer_where_spending_changes() -> None:
    asked: list[float] = []

    def steep(price: float) -> float:
        asked.append(math.log(price))
        return logistic(8, 1.7)(price)

    table = price_table(steep, 1, tolerance=0.05)
    assert len(asked) == len(set(asked)) <= 48
    near = sum(abs(log_price - 1.7) < 1 for log_price in asked)
    assert near > len(asked) / 2
    steps = [a - b for a, b in zip(table.fractions, table.fractions[1:], strict=False)]
    assert max(steps) <= 0.05


def test_a_step_is_found_and_both_its_ends_are_met() -> None:
    """Nothing lies between: a budget within the step gets one of its ends, one outside of it its own."""
    calls = 0

    def step(price: float) -> float:
        nonlocal calls
        calls += 1
        log_price = math.log(price)
        return (0.9 if log_price < 1.234 else 0.3) - 0.01 * log_price

    table = price_table(step, 1)
    assert calls <= 48
    for budget in (0.29, 0.9):
        assert step(table.price(budget)) == pytest.approx(budget, abs=0.01)
    between = step(table.price(0.6))
    assert min(abs(between - end) for end in (0.9 - 0.01234, 0.3 - 0.01234)) < 0.005


def test_spending_that_wobbles_makes_a_monotone_table() -> None:
    def wobbling(price: float) -> float:
        place = (math.log(price) - LOW) / (HIGH - LOW)
        return 0.9 - 0.6 * place + 0.04 * math.sin(90 * place)

    table = price_table(wobbling, 1)
    assert list(table.prices) == sorted(set(table.prices))
    assert list(table.fractions) == sorted(set(table.fractions), reverse=True)
    for price, fraction in zip(table.prices, table.fractions, strict=True):
        assert wobbling(price) == pytest.approx(fraction, abs=1e-9)


def test_spending_that_never_changes_makes_a_table_of_one_price() -> None:
    table = price_table(lambda price: 0.7, 1)
    assert table.fractions == (0.7,)
    assert table.price(0.1) == table.price(0.7) == table.price(1.0) == table.prices[0]


def test_prices_measured_are_those_between_the_ends_given() -> None:
    asked: list[float] = []
    price_table(lambda price: asked.append(price) or 1 / (1 + price), 1, prices=(0.01, 5.0))
    assert min(asked) == pytest.approx(0.01)
    assert max(asked) == pytest.approx(5.0)


def test_a_table_survives_json() -> None:
    table = price_table(logistic(2, 0), num_images=123, data="digits")
    assert Calibration.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"prices": [1.0], "num_images": 1},
        {"prices": [1.0, 2.0], "fractions": [0.5], "num_images": 1},
        {"prices": [2.0, 1.0], "fractions": [0.6, 0.5], "num_images": 1},
        {"prices": [1.0, 2.0], "fractions": [0.5, 0.6], "num_images": 1},
        {"prices": [1.0, 1.0], "fractions": [0.6, 0.5], "num_images": 1},
        {"prices": [], "fractions": [], "num_images": 1},
        {"prices": "dear", "fractions": [0.5], "num_images": 1},
        {"prices": [1.0], "fractions": [0.5], "num_images": None},
        {"prices": [0.0], "fractions": [0.5], "num_images": 1},
        {"prices": [float("nan")], "fractions": [0.5], "num_images": 1},
        {"prices": [1.0], "fractions": [float("nan")], "num_images": 1},
        [1.0, 2.0],
    ],
)
def test_a_damaged_table_is_named(content: Any) -> None:
    with pytest.raises(ValueError, match=r"calibration\.json is not a calibration table"):
        Calibration.from_json(content)


@pytest.mark.parametrize("wrong", [0, -0.1, 1.01, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_a_fraction_that_is_none_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"budget=.* must be a fraction of the backbone's MACs"):
        check_fraction("budget", wrong)
    with pytest.raises(ValueError, match=r"budget=.* must be a fraction of the backbone's MACs"):
        Calibration((1.0,), (0.5,), 1).price(wrong)
    assert check_fraction("cap", 1) == 1.0
