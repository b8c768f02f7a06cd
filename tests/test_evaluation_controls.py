"""Controls cost what is asked, by the same rules as the model, and know nothing of the image."""

from __future__ import annotations

from ast import literal_eval
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vits import lively, pictures

from miaformer import Decisions, MIAFormer
from miaformer.evaluation import (
    KeepRates,
    Simulation,
    cls_attention_policy,
    macs_of,
    random_policy,
    static_policy,
)
from miaformer.model import policy

CONFIGS: list[dict[str, Any]] = [
    {},
    {"token_scope": "per_block"},
    {"depth_choice": "nested"},
    {"head_choice": "subset", "mlp_width": "coupled"},
    {"token_scope": "per_block", "head_choice": "subset", "mlp_width": "full"},
]


def with_64_tokens(config: dict[str, Any] | None = None, **backbone: Any) -> MIAFormer:
    """Enough tokens that whole ones meet a budget within 0.005."""
    return lively(settings={"img_size": 32, "depth": 4, **backbone}, **(config or {})).float()


def random_decisions(seed: int, batch: int, model: MIAFormer) -> Decisions:
    generator = torch.Generator().manual_seed(seed)
    cost = model.cost()

    def draw(*shape: int) -> torch.Tensor:
        keep = torch.rand((batch, 1, *[1] * (len(shape) - 1)), generator=generator)
        return torch.rand((batch, *shape), generator=generator) < keep

    return Decisions(draw(cost.depth), draw(cost.depth, cost.num_heads), draw(cost.depth, cost.num_patches))


@cache
def _small(backbone: str, config: str) -> MIAFormer:
    return lively(settings={"depth": 3, "img_size": 12, **literal_eval(backbone)}, **literal_eval(config))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backbone", [{}, {"class_token": False, "global_pool": "avg"}])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_macs_of_decisions_are_those_of_running_them(
    config: dict[str, Any], backbone: dict[str, Any], seed: int
) -> None:
    model = _small(repr(backbone), repr(config))
    decisions = random_decisions(seed, 6, model)
    with torch.inference_mode():
        trace = model.run(pictures(model.backbone, 6), policy=policy.Fixed(decisions)).trace
    counted = macs_of(decisions, model.cost(), model.adapt_config.rules)
    assert counted.tolist() == trace.macs.tolist()


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def model(request: pytest.FixtureRequest) -> MIAFormer:
    return with_64_tokens(request.param)


@pytest.fixture(scope="module")
def trace(model: MIAFormer) -> Decisions:
    with torch.inference_mode():
        return model.run(pictures(model.backbone, 96, seed=1), price=1.0).trace


@pytest.mark.parametrize("budget", [0.15, 0.35, 0.6, 0.72])
def test_static_meets_its_budget_and_is_the_same_for_every_image(
    model: MIAFormer, trace: Decisions, budget: float
) -> None:
    found = static_policy(Simulation.of(model), budget, trace)
    with torch.inference_mode():
        executed = model.run(pictures(model.backbone, 5, seed=2), policy=found).trace
    assert executed.macs_fraction.tolist() == pytest.approx([budget] * 5, abs=0.005)
    for kept in (executed.depth, executed.heads, executed.tokens):
        assert (kept == kept[:1]).all()


def test_static_keeps_what_the_learned_policy_keeps_most_often(model: MIAFormer, trace: Decisions) -> None:
    rates = KeepRates.of(trace)
    spent = Simulation.of(model).fractions(policy.Fixed(trace), len(trace)).mean().item()
    decisions = static_policy(Simulation.of(model), spent, trace).decisions

    def best(rates: torch.Tensor, kept: torch.Tensor) -> bool:
        return bool(kept.all()) or not bool(kept.any()) or bool(rates[kept].min() >= rates[~kept].max())

    assert best(rates.depth, decisions.depth[0])
    for block in range(model.cost().depth):
        assert best(rates.heads[block], decisions.heads[0, block])
        per_block = model.adapt_config.token_scope == "per_block"
        assert best(rates.tokens[block] if per_block else rates.tokens.mean(dim=0), decisions.tokens[0, block])


@pytest.mark.parametrize("budget", [0.15, 0.35, 0.6, 0.72])
def test_random_meets_its_budget_on_average(model: MIAFormer, trace: Decisions, budget: float) -> None:
    simulation = Simulation.of(model)
    found = random_policy(simulation, budget, KeepRates.of(trace), seed=11)
    assert simulation.fractions(found, 4000).mean().item() == pytest.approx(budget, abs=0.01)
    with torch.inference_mode():
        executed = model.run(pictures(model.backbone, 256, seed=2), policy=found).trace
    assert executed.macs_fraction.mean().item() == pytest.approx(budget, abs=0.03)  # 256 images
    assert executed.macs_fraction.std() > 0.01


def test_random_at_the_learned_cost_keeps_as_often_as_the_learned_policy(model: MIAFormer, trace: Decisions) -> None:
    rates = KeepRates.of(trace)
    spent = Simulation.of(model).fractions(policy.Fixed(trace), len(trace)).mean().item()
    found = random_policy(Simulation.of(model), spent, rates)
    # Learned decisions go together (who skips blocks skips tokens), random ones do not: one shift of the log-odds of
    # all rates makes up for it, and a small one.
    depth = torch.tensor(found.depth).double()
    if model.adapt_config.depth_choice == "nested":  # where each is of those that executed the block before
        depth = depth.cumprod(dim=0)
    shifts = torch.logit(depth, 1e-9) - torch.logit(rates.depth, 1e-3)
    assert shifts.std() < 1e-4
    assert shifts.abs().max() < 1.0
    shift = shifts.mean().item()
    assert found.heads == pytest.approx(rates.shifted(shift).heads.mean(dim=1).tolist(), abs=1e-4)
    assert found.tokens == pytest.approx(rates.shifted(shift).tokens.mean(dim=1).tolist(), abs=1e-4)


def test_random_decisions_depend_on_the_seed_only() -> None:
    simulation = Simulation.of(with_64_tokens())

    def decisions(seed: int) -> Decisions:
        return simulation.run(random_policy(simulation, 0.5, seed=seed), 8).decisions()

    assert torch.equal(decisions(1).tokens, decisions(1).tokens)
    assert not torch.equal(decisions(1).tokens, decisions(2).tokens)


def test_random_under_a_cap_costs_what_is_asked() -> None:
    model = with_64_tokens()
    found = random_policy(Simulation.of(model), 0.5, cap=0.55)
    with torch.inference_mode():
        executed = model.run(pictures(model.backbone, 256), policy=found, cap=0.55).trace
    assert executed.macs_fraction.max().item() <= 0.55
    assert executed.macs_fraction.mean().item() == pytest.approx(0.5, abs=0.015)


def test_rates_are_means_over_executed_blocks() -> None:
    depth = torch.tensor([[True, False], [True, False], [False, False], [True, False]])
    heads = torch.tensor([[True, False]]).expand(4, 2, 2) & depth[:, :, None]
    tokens = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()[:, None].expand(4, 2, 3)
    rates = KeepRates.of(Decisions(depth, heads, tokens & depth[:, :, None]))
    assert rates.depth.tolist() == [0.75, 0.0]
    assert rates.heads.tolist() == [[1.0, 0.0], [1.0, 1.0]]  # nobody executed the second block: all kept
    assert rates.tokens[0].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_class_attention_meets_its_budget(budget: float) -> None:
    model = with_64_tokens(depth=6)
    found = cls_attention_policy(model, budget)
    with torch.inference_mode():
        executed = model.run(pictures(model.backbone, 4), policy=found).trace
    assert executed.macs_fraction.tolist() == pytest.approx([budget] * 4, abs=0.01)
    assert executed.depth.all()
    assert executed.heads.all()


def test_a_budget_beyond_what_a_policy_can_spend_is_an_error_that_says_how_little() -> None:
    model = with_64_tokens()
    simulation = Simulation.of(model)
    everything = Decisions.full(1, *(getattr(model.cost(), size) for size in ("depth", "num_heads", "num_patches")))
    for find in (
        lambda: random_policy(simulation, 0.001),
        lambda: static_policy(simulation, 0.001, everything),
        lambda: cls_attention_policy(model, 0.001),
    ):
        with pytest.raises(ValueError, match=r"budget=0\.001 is below 0\.\d+, the least this policy can spend"):
            find()


def test_a_budget_above_everything_is_everything() -> None:
    model = with_64_tokens()
    simulation = Simulation.of(model)
    full = simulation.fractions(policy.Full(), 1).item()
    assert full < 1  # the last block executes what is read
    assert simulation.fractions(random_policy(simulation, 1.0), 64).mean().item() == pytest.approx(full, abs=1e-3)
