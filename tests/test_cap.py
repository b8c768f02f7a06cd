"""I5, the cap: no image ever takes more MACs, whatever decides and whatever it shows."""

from __future__ import annotations

import copy
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vits import ALL_STRUCTURES, WITHOUT_HEADS, lively, pictures, relative, vit

import miaformer
from miaformer import Decisions, MIAFormer, Output
from miaformer.engine.cost import count_macs
from miaformer.engine.decisions import Gates
from miaformer.engine.walk import State
from miaformer.model.policy import ClsAttention, Fixed, Full, Random

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"mlp_width": "coupled"},
    "registers": {"depth_choice": "nested"},
    "map_pool": {"head_choice": "subset", "token_scope": "per_block"},
    "uneven_groups": {"head_choice": "subset", "mlp_width": "coupled"},
    "distilled": {"token_scope": "per_block", "mlp_width": "full"},
    "grouped_queries": WITHOUT_HEADS,
}


@cache
def model_of(structure: str) -> MIAFormer:
    """Made once: capping is what varies."""
    return lively(4, ALL_STRUCTURES[structure], **CONFIGS[structure])


def shown(model: MIAFormer, kind: str, seed: int) -> Tensor:
    images = pictures(model.backbone, 3, seed)
    return {
        "usual": images,
        "huge": images * 1e6,
        "tiny": images * 1e-9,
        "black": torch.zeros_like(images),
        "one colour": images[..., :1, :1].expand_as(images).contiguous(),
        "largest": images.sign() * torch.finfo(images.dtype).max ** 0.25,
    }[kind]


def least_cap(model: MIAFormer, arguments: dict[str, Any]) -> float:
    """What every image pays whatever is decided, as a fraction."""
    cost = model.cost()
    policy = arguments.get("policy") or model.learned(1.0)
    return (cost.fixed + sum(policy.context_macs(cost, index) for index in range(cost.depth)) + 1) / cost.backbone


@given(
    structure=st.sampled_from(sorted(CONFIGS)),
    cap_share=st.floats(0, 1),
    who=st.sampled_from(["full", "learned", "free", "random", "attention"]),
    what=st.sampled_from(["usual", "huge", "tiny", "black", "one colour", "largest"]),
    execution=st.sampled_from(["sparse", "sparse", "masked"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_no_image_takes_more_than_its_cap(
    structure: str, cap_share: float, who: str, what: str, execution: Any, seed: int
) -> None:
    model = model_of(structure)
    cost = model.cost()
    if who == "attention" and not cost.num_prefix_tokens:
        who = "full"
    arguments: dict[str, Any] = {
        "full": {"policy": Full()},
        "learned": {"price": 1.0},
        "free": {"price": 0.0},  # as much as the controllers can ask for
        "random": {"policy": Random(0.9, 0.8, 0.8, seed)},
        "attention": {"policy": ClsAttention(keep=0.8, blocks=(1, 2))},
    }[who]
    least = least_cap(model, arguments)
    cap = least + cap_share * (1 - least)
    outputs: list[Output] = []
    counted = count_macs(
        lambda: outputs.append(model.run(shown(model, what, seed), cap=cap, execution=execution, **arguments))
    )
    trace = outputs[0].trace
    assert int(trace.macs.max()) <= cap * cost.backbone
    if execution == "sparse":
        assert counted == int(trace.macs.sum())
    assert bool(outputs[0].logits.isfinite().all())
    # What is left of the decisions is executable as it stands.
    again = model.run(shown(model, what, seed), Fixed(trace), execution=execution)
    assert torch.equal(again.trace.tokens, trace.tokens)
    assert relative(again.logits, outputs[0].logits) < 1e-8


def one_block(**settings: Any) -> tuple[MIAFormer, Any]:
    """A model of 16 patch tokens and 3 heads whose cap bites in one place; and what is kept under a cap in MACs."""
    config = {name: settings.pop(name) for name in ("mlp_width", "head_choice") if name in settings}
    model = miaformer.adapt(vit(0, depth=1, global_pool="avg", **settings), **config).eval()
    images = pictures(model.backbone, 1)

    def kept(macs: float) -> tuple[int, int]:
        trace = model.run(images, Full(), cap=min(1.0, macs / model.cost().backbone)).trace
        assert int(trace.depth) == int(trace.heads.any())
        return int(trace.heads.sum()), int(trace.tokens.sum())

    return model, kept


@pytest.mark.parametrize("config", [{}, {"mlp_width": "coupled"}, {"head_choice": "subset", "mlp_width": "full"}])
@pytest.mark.parametrize("class_token", [True, False])
def test_fewer_tokens_then_fewer_heads_then_no_block(config: dict[str, Any], class_token: bool) -> None:
    """And not before it has to be: what fits to the last MAC is executed, one MAC less takes one thing away."""
    model, kept = one_block(class_token=class_token, **config)
    fewest = 0 if class_token else 1  # a block needs a row
    steps = [(3, tokens) for tokens in range(16, fewest - 1, -1)] + [(2, fewest), (1, fewest), (0, 0)]
    for (heads, tokens), fewer in pairwise(steps):
        gates = Gates(torch.tensor([True]), torch.arange(3)[None] < heads, torch.arange(16)[None] < tokens)
        macs = model.cost().fixed + int(model.cost().block(0, gates))
        assert kept(macs + 0.5) == (heads, tokens)
        assert kept(macs - 0.5) == fewer


def test_the_lowest_scores_go_first() -> None:
    model, _ = one_block()
    images = pictures(model.backbone, 2)
    scores = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))

    class Scoring(Full):
        def decide(self, state: State) -> Gates:
            full = super().decide(state)
            return Gates(full.depth, full.heads, full.tokens, scores)

    trace = model.run(images, Scoring(), cap=0.6).trace
    for image in range(2):
        kept = trace.tokens[image, 0]
        assert 0 < int(kept.sum()) < 16
        assert scores[image][kept].min() > scores[image][~kept].max()
    unscored = model.run(images, Full(), cap=0.6).trace.tokens[:, 0]
    assert unscored.sum(dim=1).tolist() == trace.tokens[:, 0].sum(dim=1).tolist()
    assert unscored[:, : int(unscored[0].sum())].all()  # without scores the last ones go


def test_early_blocks_are_paid_first() -> None:
    model = miaformer.adapt(vit(0, depth=6)).eval()
    trace = model.run(pictures(model.backbone, 1), Full(), cap=0.5).trace
    depth = trace.depth[0].tolist()
    assert depth == sorted(depth, reverse=True)
    assert depth[0]
    assert not depth[-1]


@pytest.mark.parametrize("structure", CONFIGS)
def test_a_cap_that_nothing_exceeds_changes_nothing(structure: str) -> None:
    model = model_of(structure)
    images = pictures(model.backbone, 4)
    for arguments in ({"policy": Full()}, {"price": 1.0}, {"policy": Random(0.5, 0.5, 0.5, seed=1)}):
        if "policy" in arguments and isinstance(arguments["policy"], Random):
            free = model.run(images, Random(0.5, 0.5, 0.5, seed=1))
        else:
            free = model.run(images, **arguments)
        assert float(free.trace.macs_fraction.max()) <= 1
        capped = model.run(images, cap=1.0, **arguments)
        assert torch.equal(capped.logits, free.logits)
        assert torch.equal(capped.trace.macs, free.trace.macs)
        assert torch.equal(capped.trace.tokens, free.trace.tokens)


def test_a_cap_holds_where_controllers_would_exceed_the_backbone() -> None:
    """Everything kept and scored is more than the static model takes, if nothing is trimmed."""
    model = miaformer.adapt(vit(0, global_pool="avg"), controller_rank=8).eval()
    images = pictures(model.backbone, 2)
    assert float(model.run(images, price=1e-3).trace.macs_fraction.max()) > 1
    assert float(model.run(images, price=1e-3, cap=1.0).trace.macs_fraction.max()) <= 1


@pytest.mark.parametrize("arguments", [{}, {"price": 1.0}])
def test_a_cap_below_what_must_be_paid_is_named(arguments: dict[str, Any]) -> None:
    model = lively(0)
    images = pictures(model.backbone, 2)
    least = least_cap(model, arguments if arguments else {"policy": Full()})
    with pytest.raises(ValueError, match=r"cap=.* is less than the 0\.\d+ .* patch embedding, controllers and classif"):
        model.run(images, cap=least * 0.9, **arguments)
    output = model.run(images, cap=least * 1.001, **arguments)
    assert not output.trace.depth.any() or float(output.trace.macs_fraction.max()) <= least * 1.001


@pytest.mark.parametrize("cap", [0.0, -1, 1.5, float("nan"), "0.5", True])
def test_a_cap_that_is_no_fraction_is_named(cap: Any) -> None:
    model = lively(0)
    with pytest.raises(ValueError, match=r"cap=.* must be a fraction"):
        model.run(pictures(model.backbone, 1), cap=cap)


def test_each_image_may_have_a_cap_of_its_own() -> None:
    model = lively(0)
    images = pictures(model.backbone, 3)
    caps = [0.3, 0.9, 0.5]
    together = model.run(images, cap=caps)
    for i, cap in enumerate(caps):
        alone = model.run(images[i : i + 1], cap=cap)
        assert together.trace.macs[i] == alone.trace.macs[0]
        assert relative(together.logits[i], alone.logits[0]) < 1e-9
    with pytest.raises(ValueError, match=r"cap=\[0.3, 0.9\] must be a number, or one for each of 3 images"):
        model.run(images, cap=caps[:2])
    with pytest.raises(ValueError, match=r"cap=1.5 must be a fraction"):
        model.run(images, cap=[0.3, 0.9, 1.5])


def test_a_cap_goes_with_a_budget_and_with_features() -> None:
    model = lively(0)
    images = pictures(model.backbone, 4)
    uncapped = model.forward_features(images, price=0.01)
    capped = model.forward_features(images, price=0.01, cap=0.3)
    assert capped.shape == uncapped.shape
    assert not torch.equal(capped, uncapped)
    assert torch.equal(model(images, price=0.01, cap=0.3), model.run(images, price=0.01, cap=0.3).logits)


def test_a_fixed_decision_may_ask_for_anything() -> None:
    """Full decisions given as fixed ones are as capped as any."""
    model = model_of("plain")
    cost, images = model.cost(), pictures(model.backbone, 2)
    everything = Decisions.full(1, cost.depth, cost.num_heads, cost.num_patches)
    for cap in (0.2, 0.4, 0.8):
        fixed, full = (model.run(images, policy, cap=cap).trace for policy in (Fixed(everything), Full()))
        assert torch.equal(fixed.macs, full.macs)
        assert int(fixed.macs.max()) <= cap * cost.backbone
        assert int(fixed.macs.min()) > 0.5 * cap * cost.backbone  # and it is not thrown away either


@pytest.mark.parametrize("structure", sorted(CONFIGS))
def test_a_cap_is_checked_as_running_checks_it(structure: str) -> None:
    model = model_of(structure)
    outline = copy.deepcopy(model).to("meta")  # checking needs no weights
    least = model.least_macs() / model.cost().backbone
    refused = []
    for cap in (1.0, least + 1e-6, least - 1e-3, 0.0, 1.5):
        said = []
        for check in (partial(model.run, pictures(model.backbone, 1), price=1.0), outline.check_cap):
            try:
                check(cap=cap)
            except ValueError as error:
                said.append(str(error))
        assert len(said) in (0, 2)
        assert len(set(said)) <= 1
        refused.append(bool(said))
    assert refused == [False, False, True, True, True]
