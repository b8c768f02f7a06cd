"""One model serves any number of threads, and nothing that is kept of its weights outlives them."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vits import lively, pictures, relative

from miaformer import MIAFormer
from miaformer.data import Batch
from miaformer.evaluation.calibration import calibrate
from miaformer.prediction.predictor import Predictor

THREADS, CALLS = 6, 60  # of each thread


def calibrated(**config: object) -> MIAFormer:
    model = lively(0, **config).float()
    images = pictures(model.backbone, 24, seed=9)
    labels = torch.zeros(len(images), dtype=torch.int64)
    calibrate(model, [Batch(images, labels, labels)])
    return model


Call = Callable[[float, float | None], Tensor]  # budget, cap


def entry_points(model: MIAFormer, folder: Path) -> dict[str, Call]:
    from miaformer.export import export_onnx, open_session, run_session

    images, predictor = pictures(model.backbone, 2, seed=3), Predictor(model)
    export_onnx(model, folder / "model.onnx")
    session = open_session(folder / "model.onnx", 1)

    def of_file(budget: float, cap: float | None) -> Tensor:
        found = run_session(session, images[:1].numpy(), budget, 4.0 if cap is None else cap)
        return torch.from_numpy(found["logits"])

    calls: dict[str, Call] = {
        "run": lambda budget, cap: model.run(images, budget=budget, cap=cap).logits,
        "forward": lambda budget, cap: model(images, budget=[budget, 0.9], cap=cap),
        "masked": lambda budget, cap: model.run(images, budget=budget, cap=cap, execution="masked").logits,
        "predictor": lambda budget, cap: predictor.run(images, budget=budget, cap=cap).logits,
        "file": of_file,
    }
    if not model.adapt_config.chooses_resolution:
        calls["features"] = lambda budget, cap: model.forward_features(images, budget=budget, cap=cap)
    return calls


@pytest.mark.parametrize(
    ("config", "native"),
    [
        ({}, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        ({"looks": 2}, True),
        ({"grains": ("resolution",)}, False),
    ],
    ids=["one", "one, without numba", "two", "sizes"],
)
def test_threads_get_what_they_asked_for(
    config: dict[str, object], native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miaformer.engine.native.enabled", native)
    model = calibrated(**config)
    assert model.calibration is not None
    least, most = model.calibration.range
    calls = entry_points(model, tmp_path)
    asked = [
        (name, budget, cap)
        for name in calls
        for budget in (least + 0.01, (least + most) / 2, most)
        for cap in (None, least + 0.05)
    ]
    with torch.inference_mode():
        wanted = {one: calls[one[0]](*one[1:]) for one in asked}
    assert len({tuple(logits.flatten().tolist()) for logits in wanted.values()}) > len(calls), "budgets differ"

    def serve(seed: int) -> list[str]:
        order = random.Random(seed)
        wrong = []
        with torch.inference_mode():
            for one in order.choices(asked, k=CALLS):
                if relative(calls[one[0]](*one[1:]), wanted[one]) > 1e-4:
                    wrong.append(str(one))
        return wrong

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: threads meet each other everywhere
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert [wrong for found in pool.map(serve, range(THREADS)) for wrong in found] == []
    finally:
        sys.setswitchinterval(interval)


# What is kept of weights ---------------------------------------------------------------------------------------------


def _in_place(model: MIAFormer, draw: random.Random) -> None:
    with torch.no_grad():
        draw.choice(list(model.parameters())).mul_(1.5)


def _fused_step(model: MIAFormer, draw: random.Random) -> None:
    """Which leaves `_version` as it is."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


def _controller_replaced(model: MIAFormer, draw: random.Random) -> None:
    place = draw.randrange(len(model.controllers))
    other = copy.deepcopy(model.controllers[place])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2.0)
    model.controllers[place] = other


def _layer_replaced(model: MIAFormer, draw: random.Random) -> None:
    block = model.backbone.blocks[draw.randrange(len(model.backbone.blocks))]
    block.mlp.fc1.weight = nn.Parameter(3 * block.mlp.fc1.weight.detach())  # type: ignore[union-attr]


def _assigned(model: MIAFormer, draw: random.Random) -> None:
    part = draw.choice([*model.controllers, *model.backbone.blocks])
    part.load_state_dict({k: -1.5 * v for k, v in part.state_dict().items()}, assign=True)


def _loaded(model: MIAFormer, draw: random.Random) -> None:
    part = draw.choice([model, model.backbone, model.controllers, model.controllers[0]])
    part.load_state_dict({k: 1.2 * v if v.is_floating_point() else v for k, v in part.state_dict().items()})


BREAKERS = [_in_place, _fused_step, _controller_replaced, _layer_replaced, _assigned, _loaded]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(BREAKERS), min_size=1, max_size=3), st.integers(0, 99), st.booleans())
def test_nothing_outlives_the_weights_that_it_was_made_from(
    breakers: list[Callable[[MIAFormer, random.Random], None]], seed: int, prepack: bool
) -> None:
    draw = random.Random(seed)
    model = lively(1).float()
    images = pictures(model.backbone, 3)
    if prepack:
        model.prepack()
    for breaker in breakers:
        with torch.inference_mode():
            model.run(images, price=1.0)
        breaker(model, draw)
        with torch.inference_mode():
            found = model.run(images, price=1.0)
            wanted = copy.deepcopy(model).run(images, price=1.0)  # keeps nothing
        assert torch.equal(found.trace.tokens, wanted.trace.tokens), breaker.__name__
        assert relative(found.logits, wanted.logits) < 1e-4, breaker.__name__


def test_functional_call_is_answered_by_the_weights_given() -> None:
    model = lively(2).float().requires_grad_(False)
    images = pictures(model.backbone, 3)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.3)
    for one in (model, model.prepack()):
        one.run(images, price=1.0)
        found = torch.func.functional_call(one, dict(other.named_parameters()), (images,), {"price": 1.0})
        assert relative(found, other(images, price=1.0)) < 1e-4
        assert relative(one(images, price=1.0), copy.deepcopy(one)(images, price=1.0)) < 1e-4
