"""Adversarial training moves images against the loss of its own step, no farther than it may, and hardens models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.layers import PatchDropoutWithIndices
from tiny_training import RECIPE, STEPS, run, tiny_model
from torch import Tensor

from miaformer import cli
from miaformer.training.adversarial import Adversary
from miaformer.training.objective import Objective, Outcome, Step, Targets
from miaformer.training.trainer import Trainer

EPS = 24 / 255
ADVERSARIAL = replace(RECIPE, adversarial_eps=EPS)


@given(st.integers(1, 4), st.floats(1e-3, 0.5), st.integers(0, 100))
def test_images_stay_within_the_radius_and_the_range_and_climb(steps: int, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.full((3, 1, 1), 0.5).double(), torch.tensor([0.2, 0.3, 0.5]).double().view(3, 1, 1)
    pixels, start, slope = (torch.rand(4, 3, 6, 6, generator=generator).double() for _ in range(3))
    images = (pixels - mean) / std

    def loss(x: Tensor) -> Tensor:
        return (x * (slope - 0.5)).sum()

    moved = Adversary(eps, steps, mean, std).moved(images, loss, start)
    found = moved * std + mean
    assert (found - pixels).abs().max() <= eps + 1e-9
    assert found.min() >= -1e-9
    assert found.max() <= 1 + 1e-9
    assert loss(moved) > loss(images)
    if steps > 1:  # far enough to end at the border, or at the end of the range
        wanted = (pixels + eps * (slope - 0.5).sign()).clamp(0, 1)
        assert (found - wanted).abs().max() < 1e-9 or steps < 3


def test_every_step_learns_from_images_that_its_loss_is_higher_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adversarial training is, by construction. What comes of it differs between processors."""
    rises: list[float] = []
    learned: list[bool] = []
    last: list[Tensor] = []
    moved, forward = Trainer._moved, Objective.forward

    def watch(self: Trainer, adversary: Adversary, wrapped: Any, images: Tensor, *rest: Any) -> Tensor:
        found = moved(self, adversary, wrapped, images, *rest)
        labels, climbed, _ = rest
        with torch.no_grad(), torch.random.fork_rng():
            before, after = (float(forward(wrapped, x, labels, climbed).loss) for x in (images, found))
        rises.append(after - before)
        last[:] = [found]
        return found

    def watch_forward(self: Objective, images: Tensor, *rest: Any) -> Outcome:
        if last:
            learned.append(torch.equal(images, last.pop()))
        return forward(self, images, *rest)

    monkeypatch.setattr(Trainer, "_moved", watch)
    monkeypatch.setattr(Objective, "forward", watch_forward)
    run(tmp_path / "run", replace(ADVERSARIAL, stages=ADVERSARIAL.stages[:1], adversarial_steps=3))
    assert len(rises) == STEPS
    assert min(rises) > 0
    assert learned == [True] * STEPS  # the pass after the attack, whose gradients the weights follow


def test_the_teacher_sees_images_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = Objective._targets
    trained_on: list[Tensor] = []

    def watch(self: Objective, images: Tensor, labels: Tensor) -> Targets:
        seen.append((trained_on[-1], images))
        return original(self, images, labels)

    forward = Objective.forward

    def watch_forward(self: Objective, images: Tensor, *rest: object) -> object:
        trained_on.append(images.detach())
        return forward(self, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "_targets", watch)
    monkeypatch.setattr(Objective, "forward", watch_forward)
    run(tmp_path / "run", replace(ADVERSARIAL, stages=ADVERSARIAL.stages[:2]))
    moved = [(a - b).abs().max().item() for a, b in seen]
    assert len(seen) == 16  # twice a step, of two stages of four
    assert min(moved) > 0.01
    std = min(tiny_model().data_config()["std"])
    assert max(moved) <= EPS / std + 1e-5


def test_every_stage_trains_so_and_repeats_exactly(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "plain"
    run(whole, ADVERSARIAL)
    again = tmp_path / "again"
    run(again, ADVERSARIAL)
    run(other)
    weights = [load_file(out / "model" / "model.safetensors") for out in (whole, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    stages = [json.loads(line)["stage"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert set(stages) == {"backbone", "elastic", "supervised", "reinforce"}


def test_the_sub_network_that_is_attacked_is_the_one_that_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches are dropped by the global generator: both passes of a step drop the same."""
    kept: list[Tensor] = []
    forward = PatchDropoutWithIndices.forward

    def watch(self: PatchDropoutWithIndices, x: Tensor) -> tuple[Tensor, Tensor | None]:
        found = forward(self, x)
        kept.append(found[0].detach())
        return found

    monkeypatch.setattr(PatchDropoutWithIndices, "forward", watch)
    stage = replace(RECIPE.stages[0], patch_drop=(0.5, 0.5))
    recipe = replace(RECIPE, adversarial_eps=1e-6, augmentation={}, stages=(stage,))  # moved by nothing that is seen
    run(tmp_path / "run", recipe)
    pairs = list(zip(kept[::2], kept[1::2], strict=True))
    assert len(pairs) == 4
    for attacked, learned in pairs:
        assert (attacked - learned).abs().max() < 1e-3
    assert (pairs[0][0] - pairs[1][0]).abs().max() > 1e-2


def test_attack_and_step_take_the_same_sub_networks_at_the_same_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Step] = []
    forward = Objective.forward

    def watch(self: Objective, images: Tensor, labels: Tensor, step: Step) -> object:
        seen.append(step)
        return forward(self, images, labels, step)

    monkeypatch.setattr(Objective, "forward", watch)
    out = run(tmp_path / "run", replace(ADVERSARIAL, stages=RECIPE.stages[1:]))
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert len(pairs) == 12
    for attacked, learned in pairs:
        assert torch.equal(attacked.clean, learned.clean)
        for name in ("budgets", "depth", "tokens"):
            assert torch.equal(getattr(attacked.draws, name), getattr(learned.draws, name))
    assert all(torch.isfinite(p).all() for p in out.parameters())


def test_wrong_radii_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adversarial_eps=-1"):
        replace(RECIPE, adversarial_eps=-1)
    with pytest.raises(ValueError, match="adversarial_steps=0"):
        replace(RECIPE, adversarial_steps=0)
    command = ["train", "--recipe", "digits", "--out", str(tmp_path / "run"), "--adversarial", "much"]
    assert cli.main(command) == 2
    assert "--adversarial much: give a radius such as 4/255" in capsys.readouterr().err
