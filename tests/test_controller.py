"""Controllers start near "keep everything", spend less at a higher price, and cost what they say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import softplus
from vits import enliven, lively, pictures, vit

import miaformer
from miaformer import MIAFormer
from miaformer.engine.controller import (
    KEEP_LOGIT,
    LEAST_LOG_PRICE,
    LOG_PRICE_RANGE,
    LOGIT_BOUND,
    PRICE_FEATURES,
    Controller,
    Formula,
    means,
    price_features,
    token_scores,
)
from miaformer.engine.cost import count_macs
from miaformer.engine.decisions import likelier_heads
from miaformer.engine.masked import Masked
from miaformer.engine.walk import State
from miaformer.training import policies
from miaformer.training.policies import Draws, Relaxed

BATCH, PREFIX, PATCHES, DIM, HEADS = 4, 2, 7, 12, 3
GRID = (1, PATCHES)


def drawn(seed: int, rank: int = 5, nested: bool = True, scale: float = 1.0) -> Controller:
    """A controller all of whose parameters are random."""
    generator = torch.Generator().manual_seed(seed)
    controller = Controller(DIM, HEADS, hidden=8, rank=rank, nested=nested).double()
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.normal_(std=scale, generator=generator)
    return controller


def logits(controller: Controller, x: Tensor, active: Tensor, log_price: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth (B,), heads (B, H) and tokens (B, N), without thresholds."""
    said = controller.logits(x, active, PREFIX, log_price, GRID, through_difficulty=True)
    assert said.tokens is not None
    return said.depth, said.heads, said.tokens - torch.tensor(controller.thresholds(GRID))


def context(controller: Controller, x: Tensor, active: Tensor, log_price: Tensor) -> Tensor:
    return Formula.of([controller], log_price)[0].twice_context(*means(x, active, PREFIX))


def rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, PREFIX + PATCHES, DIM, generator=generator, dtype=torch.float64)


def test_an_untrained_controller_keeps_nearly_everything() -> None:
    controller = Controller(DIM, HEADS, hidden=8, rank=5, nested=True).double()
    everything = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    for found in logits(controller, rows(0), everything, torch.zeros(BATCH, dtype=torch.float64)):
        assert (found - KEEP_LOGIT).abs().max() < 0.5
    for dithers in (False, True):
        model = miaformer.adapt(vit(), dither=dithers).eval()
        trace = model.run(pictures(model.backbone, 3), price=1.0).trace
        assert trace.depth.all()
        assert trace.heads.all()
        assert (trace.tokens.float().mean(dim=2) >= (0.9 if dithers else 1.0)).all()


@given(st.integers(0, 2**32), st.floats(0.1, 30.0))
@settings(max_examples=40)
def test_content_alone_never_saturates_a_gate(seed: int, scale: float) -> None:
    """At a log-price of 0 logits stay near KEEP_LOGIT, whatever weights and input are."""
    everything = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    controller = drawn(seed, scale=scale)
    found = logits(controller, rows(seed) * scale, everything, torch.zeros(BATCH).double())
    difficulty = 3 * softplus(controller.gain)
    for part, bounded_terms, hard in zip(found, (1, 1, 2), difficulty, strict=True):  # tokens': own, and shared
        assert (part - KEEP_LOGIT).abs().max() <= bounded_terms * LOGIT_BOUND + hard + 1e-9


def test_predicted_difficulty_raises_every_logit_and_learns_from_nothing_else_in_training() -> None:
    controller = drawn(0)
    everything, prices = torch.ones(BATCH, PATCHES, dtype=torch.bool), torch.zeros(BATCH).double()
    before = logits(controller, rows(0), everything, prices)
    controller.zero_grad()
    state = State(0, rows(0), everything, None, PREFIX, HEADS, 1, (1, PATCHES))
    said = policies._logits(nn.ModuleList([controller]), state, prices)
    assert torch.equal(said.depth, before[0])
    (said.depth.sum() + said.heads.sum() + said.tokens.sum()).backward()
    assert controller.difficulty.weight.grad is not None
    assert not controller.difficulty.weight.grad.any()
    with torch.no_grad():
        controller.difficulty.bias += 1
    after = logits(controller, rows(0), everything, prices)
    assert all(bool((b > a).all()) for a, b in zip(before, after, strict=True))


@given(st.integers(0, 2**32), st.floats(-6, 6), st.floats(0.05, 6))
@settings(max_examples=40)
def test_a_higher_price_lowers_every_logit_that_content_does_not_move(seed: int, low: float, more: float) -> None:
    controller = drawn(seed)
    torch.nn.init.zeros_(controller.price.weight)  # what is left of the price is the direct path
    everything = torch.ones(BATCH, PATCHES, dtype=torch.bool)
    prices = [torch.full((BATCH,), p, dtype=torch.float64) for p in (low, low + more)]
    cheap, dear = (logits(controller, rows(seed), everything, p) for p in prices)
    for at_low, at_high in zip(cheap, dear, strict=True):
        assert bool((at_high < at_low).all())


@given(st.integers(0, 2**32), st.floats(0.1, 30.0))
@settings(max_examples=40)
def test_the_least_price_keeps_everything_whatever_content_says(seed: int, scale: float) -> None:
    """Else a model could not spend the larger budgets. Slopes and gains as they are to begin with."""
    controller, everything = drawn(seed, scale=scale), torch.ones(BATCH, PATCHES, dtype=torch.bool)
    fresh = Controller(DIM, HEADS, hidden=8, rank=5, nested=True)
    with torch.no_grad():
        controller.slope.copy_(fresh.slope)
        controller.gain.copy_(fresh.gain)
    least = torch.full((BATCH,), LEAST_LOG_PRICE, dtype=torch.float64)
    for found in logits(controller, rows(seed) * scale, everything, least):
        assert (found > 0).all()


def test_the_price_also_speaks_through_the_context() -> None:
    controller, everything = drawn(0), torch.ones(BATCH, PATCHES, dtype=torch.bool)
    contexts = [context(controller, rows(0), everything, torch.full((BATCH,), p).double()) for p in (-1.0, 1.0)]
    assert ((contexts[0] - contexts[1]).abs().amax(dim=1) > 0).all()


def test_prices_over_the_whole_range_are_told_apart() -> None:
    prices = torch.linspace(*LOG_PRICE_RANGE, 49)
    features = price_features(prices)
    assert features.shape == (49, PRICE_FEATURES)
    distances = torch.cdist(features, features) + torch.eye(49)
    assert distances.min() > 0.05


def test_skipped_tokens_are_not_seen() -> None:
    controller, x = drawn(1), rows(1)
    active = torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool().expand(BATCH, -1)
    other = torch.where(torch.cat([torch.ones(BATCH, PREFIX).bool(), active], dim=1)[..., None], x, x + 100)
    log_price = torch.zeros(BATCH, dtype=torch.float64)
    assert torch.equal(*(context(controller, rows_, active, log_price) for rows_ in (x, other)))


@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_a_context_without_any_active_token_is_finite(prefix: int) -> None:
    nothing = torch.zeros(BATCH, PATCHES + PREFIX - prefix, dtype=torch.bool)
    content, direction = Formula.of([drawn(2)], torch.zeros(1).double())[0].content(*means(rows(2), nothing, prefix))
    assert bool(content.isfinite().all() and direction.isfinite().all())


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=30)
def test_at_least_one_head_is_most_likely_and_nested_ones_are_the_first(seed: int, nested: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    head_logits = torch.randn(6, HEADS, generator=generator) - 0.5
    kept = likelier_heads(head_logits, nested)
    assert (likelier_heads(head_logits.numpy(), nested) == kept.numpy()).all()  # on the host
    for row, found in zip(head_logits.tolist(), kept.tolist(), strict=True):
        if nested:  # head j goes on only if all before it do; the first is always kept
            count = 1
            while count < HEADS and row[count] > 0:
                count += 1
            assert found == [j < count for j in range(HEADS)]
        else:
            assert found == [logit > 0 or (max(row) <= 0 and logit == max(row)) for logit in row]


@pytest.mark.parametrize("rank", [0, 5])
def test_a_controller_costs_what_it_says(rank: int) -> None:
    controller, x = drawn(0, rank=rank), rows(0)
    (formula,) = Formula.of([controller], torch.zeros(1, dtype=torch.float64))
    patches = x[:, PREFIX:]

    @torch.no_grad()
    def decide() -> None:
        content, direction = formula.content(patches.mean(dim=1), x[:, :PREFIX].mean(dim=1))
        formula.logits(content)
        if rank:
            image = torch.arange(BATCH).repeat_interleave(PATCHES)
            token_scores(patches.flatten(0, 1)[:, None], direction[image])

    assert count_macs(decide) == BATCH * (controller.context_macs + PATCHES * controller.token_score_macs)


def test_the_first_blocks_decide_no_tokens() -> None:
    for depth, config, first in [
        (4, {}, 1),
        (5, {}, 2),
        (5, {"first_token_block": 3}, 3),
        (5, {"first_token_block": 0}, 0),
    ]:
        model: MIAFormer = enliven(miaformer.adapt(vit(depth=depth), token_scope="per_block", **config).eval())
        assert [bool(c.rank) for c in model.controllers] == [index >= first for index in range(depth)]
        trace = model.run(pictures(model.backbone, 16), price=1.0).trace
        skips = [not trace.tokens[:, index][trace.depth[:, index]].all() for index in range(depth)]
        assert skips[:first] == [False] * first
        assert any(skips[first:])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "grains", [("depth",), ("heads",), ("tokens",), ("depth", "heads"), ("heads", "tokens"), ("tokens", "depth")]
)
def test_grains_that_are_not_decided_are_always_kept(
    grains: tuple[str, ...], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any price, in inference and in training; those that are decided still go."""
    monkeypatch.setattr("miaformer.engine.native.enabled", native)
    model = enliven(miaformer.adapt(vit(), grains=grains)).eval()
    images = pictures(model.backbone, 8)
    dearest = model.run(images, price=model.price_range()[1]).trace
    some = model.run(images, price=1.0).trace
    for trace in (dearest, some):
        executed = trace.depth
        kept = {
            "depth": bool(executed.all()),
            "heads": bool(trace.heads[executed].all()),
            "tokens": bool(trace.tokens[executed].all()),
        }
        assert all(kept[grain] for grain in kept if grain not in grains)
    executed = dearest.depth
    gone = {"depth": executed, "heads": dearest.heads[executed], "tokens": dearest.tokens[executed]}
    first = next(iter(grain for grain in ("depth", "heads", "tokens") if grain in grains))
    assert not bool(gone[first].all())

    cost = model.cost()
    draws = Draws.of_step(torch.Generator().manual_seed(0), 8, cost, 0.0, (0.3, 0.9), slice(0, 8))
    prices = torch.full((8,), 6.0, dtype=images.dtype)
    policy = Relaxed(model.controllers, prices, draws, temperature=1.0)
    _, steps = model.walk(model.embed(images), policy, Masked(cost), cost)
    taken = steps.decisions()
    kept = {"depth": taken.depth.all(), "heads": taken.heads.all(), "tokens": taken.tokens.all()}
    assert {name for name, everything in kept.items() if bool(everything)} >= {"depth", "heads", "tokens"} - set(grains)


def test_mistaken_grains_are_named() -> None:
    for grains in ((), ("depth", "depth"), ("layers",)):
        with pytest.raises(ValueError, match="grains"):
            miaformer.adapt(vit(), grains=grains)


def test_even_tokens_are_told_apart_by_their_place_alone() -> None:
    """How many are kept is decided image by image, in training as in inference; which is the same for as many."""
    model = lively(token_choice="even", first_token_block=0, grains=("tokens",)).float()
    images = pictures(model.backbone, 24)
    with torch.inference_mode():
        tokens = model.run(images, price=20.0).trace.tokens[:, 0]
    counts = tokens.sum(dim=1)
    assert len(set(counts.tolist())) > 2
    order = counts.argsort()
    for fewer, more in pairwise(tokens[order]):
        assert not (fewer & ~more).any(), "who keeps more keeps what others keep, too"
    controller = model.controllers[0]
    grid = model.cost().grid
    x = torch.randn(3, 1 + grid[0] * grid[1], model.embed_dim)
    active = torch.ones(3, x.shape[1] - 1, dtype=torch.bool)
    said = controller.logits(x, active, 1, torch.zeros(3), grid, through_difficulty=True)
    assert said.tokens is not None
    alike = said.tokens - torch.tensor(controller.thresholds(grid))
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike))
    with pytest.raises(ValueError, match="needs dither"):
        miaformer.adapt(vit(), token_choice="even", dither=False)
