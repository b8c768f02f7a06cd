"""Attacks on a model that chooses resolutions see its choice, and what they raise is what it spends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import class_folders
from test_looks import EXITS, SIZES, looking
from torch import Tensor
from vits import pictures

from miaformer import MIAFormer
from miaformer.data import open_data
from miaformer.lab.attacks import Ball, Climb, attack
from miaformer.lab.attacks.compute import raise_macs
from miaformer.lab.attacks.evaluate import frozen
from miaformer.lab.attacks.looks import looks_target, weighed
from miaformer.lab.attacks.target import Pixels
from miaformer.model.policy import Full, RandomSizes

either = pytest.mark.parametrize("config", [SIZES, EXITS], ids=["sizes", "exits"])


def spread_pixels(model: MIAFormer, batch: int) -> Tensor:
    return Pixels.of(model).restored(pictures(model.backbone, batch))


@either
def test_views_answer_what_the_deployed_model_answers(config: dict[str, Any]) -> None:
    model = looking(**config)
    with frozen(model):
        target = looks_target(model, model.at_budget(0.5))
        x = spread_pixels(model, 24).requires_grad_()
        deployed = target.deployed(x.detach())
        assert len(deployed.macs_fraction.unique()) >= (3 if "exits" in config else 2), "several ways to be answered"
        for view in target.views.values():
            seen = view(x)
            torch.testing.assert_close(seen.logits, deployed.logits.log_softmax(dim=1), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(seen.macs_fraction.float(), deployed.macs_fraction, atol=1e-6, rtol=0)
        (fixed,) = torch.autograd.grad(target.views["fixed"](x).logits[:, 0].sum(), x)
        assert bool((fixed.flatten(1).abs().amax(dim=1) > 0).all())
        assert not target.views["fixed"](x).macs_fraction.requires_grad
        (through,) = torch.autograd.grad(target.views["through"](x).macs_fraction.sum(), x)
        assert bool((through.flatten(1).abs().amax(dim=1) > 0).all())


@either
def test_gradients_through_looks_raise_macs_where_noise_does_not(config: dict[str, Any]) -> None:
    model = looking(**config)
    with frozen(model):
        target = looks_target(model, model.at_budget(0.5))
        images, ball = spread_pixels(model, 32), Ball(16 / 255)
        before = target.deployed(images).macs_fraction.mean()
        noise = target.deployed(ball.start(images, torch.Generator().manual_seed(0))).macs_fraction.mean()
        found = target.deployed(raise_macs(target, images, ball, Climb(steps=10), False, 0)).macs_fraction.mean()
    assert found - before > 0.02
    assert found - before > 2 * (noise - before)


@either
def test_weights_of_answers_are_shares_and_those_of_sure_thresholds_decisions(config: dict[str, Any]) -> None:
    model = looking(**config)
    images = pictures(model.backbone, 24)
    with torch.no_grad():
        for temperature in (1e-4, 0.5):
            _, macs, given, likely = weighed(model, images, model.at_budget(0.5), temperature)
            torch.testing.assert_close(likely.sum(dim=1), torch.ones(24, dtype=likely.dtype), atol=1e-4, rtol=0)
            assert likely.shape == (24, len(macs))
            if temperature < 0.1:
                assert torch.equal(likely.argmax(dim=1), given)


def test_sizes_are_drawn_anew_for_each_call_and_can_be_repeated() -> None:
    model = looking(**SIZES)
    sizes = model.image_sizes()
    with frozen(model):
        target = looks_target(model, RandomSizes(Full(), (sizes[0], sizes[-1])))
        assert target.is_random
        x, spent = spread_pixels(model, 24), []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            spent.append(target.deployed(x).macs_fraction)
    assert torch.equal(spent[0], spent[2])
    assert not torch.equal(spent[0], spent[1])


def test_it_is_attacked_beside_its_controls(tmp_path: Path) -> None:
    model = looking(**EXITS, settings={"num_classes": 3}).float()
    folder = str(class_folders(tmp_path / "data", each=20))
    data = open_data(folder, "test")
    report = attack(
        model,
        data,
        (Ball(2 / 255),),
        ("fgsm", "pgd", "adaptive", "transfer", "macs"),
        ("backbone", "adaptive", "static", "random"),
        budget=0.5,
        held_out=open_data(folder, "calibration"),
        climb=Climb(steps=3),
        masking=False,
    )
    rows = {(row["target"], row["attack"]): row for row in report["rows"]}
    assert {name for name, _ in rows} == {"backbone", "adaptive", "static", "random"}
    assert ("static", "macs") in rows
    assert ("backbone", "macs") not in rows
    for row in rows.values():
        assert row["robust"] <= row["clean"]
    adaptive, static = rows["adaptive", "macs"], rows["static", "macs"]
    assert adaptive["macs_fraction_attacked"] >= adaptive["macs_fraction_clean"]
    assert static["macs_fraction_attacked"] == static["macs_fraction_clean"]
    with pytest.raises(ValueError, match="draws no decisions"):
        attack(model, data, targets=("sampled",), masking=False)
