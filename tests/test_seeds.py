"""Streams of random numbers are each other's neither in whole nor in part, and repeat."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_training import RECIPE, run

from miaformer.data.seeds import stream_seed
from miaformer.lab.attacks.evaluate import seeded
from miaformer.training.objective import Objective, Step


def test_every_name_has_numbers_of_its_own() -> None:
    names = list(product(("draws", "start"), (0, 1, 2, 2**31), (0, 1, 7, 100_000)))
    firsts = [torch.rand(64, generator=torch.Generator().manual_seed(stream_seed(*name))) for name in names]
    everything = torch.cat(firsts)
    assert len(everything.unique()) == len(everything)
    again = torch.rand(64, generator=torch.Generator().manual_seed(stream_seed(*names[5])))
    assert torch.equal(again, firsts[5])


def test_a_number_below_zero_is_named() -> None:
    with pytest.raises(ValueError, match="seed -3 must be a whole number, 0 or more"):
        stream_seed("start", -3)


def test_attacks_of_other_seeds_and_of_other_names_draw_otherwise() -> None:
    found = []
    for seed, what in ((0, "pgd"), (1, "pgd"), (0, "fgsm"), (0, "pgd")):
        with seeded(seed, what):
            found.append(torch.rand(8))
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_runs_of_other_seeds_draw_other_sub_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do the two samples of an image in the reinforce stage, whose difference is what it learns from."""
    steps: list[Step] = []
    forward = Objective.forward

    def watch(self: Objective, images: torch.Tensor, labels: torch.Tensor, step: Step) -> object:
        steps.append(step)
        return forward(self, images, labels, step)

    monkeypatch.setattr(Objective, "forward", watch)
    recipe = RECIPE.with_changes(stages=RECIPE.stages[3:])
    for seed in (0, 1):
        run(tmp_path / str(seed), recipe, seed=seed)
    first, second = steps[0], steps[len(steps) // 2]
    numbers = [one.flatten() for step in (first, second) for one in (step.draws.tokens, step.other_draws.tokens)]
    everything = torch.cat(numbers)
    assert len(everything.unique()) > 0.999 * len(everything)  # float32 numbers meet now and then
