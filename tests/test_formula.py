"""A controller's formula is what its layers say one by one, and follows every change of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_controller import plain
from torch import Tensor
from vits import STRUCTURES, lively, pictures

from miaformer import MIAFormer
from miaformer.engine.controller import Formula, means, token_scores
from miaformer.engine.deciding import rounded_up


@pytest.mark.parametrize("structure", ["plain", "registers", "no_class_token_avg", "uneven_groups"])
@pytest.mark.parametrize("prices", [[0.3], [0.01, 0.1, 1.0, 10.0, 100.0]])
@torch.no_grad()
def test_a_formula_says_what_its_controller_does_layer_by_layer(structure: str, prices: list[float]) -> None:
    """Of all blocks together for inference, and of one with gradients for training."""
    model = lively(3, STRUCTURES[structure])
    for controller in model.controllers:
        controller.difficulty.weight.normal_()  # so that difficulty and its gain show
    x = model.embed(pictures(model.backbone, 5)).tokens
    prefix, grid = model.num_prefix_tokens, model.cost().grid
    log_price = torch.tensor(prices).double().log()
    each = log_price.expand(5)
    active = torch.rand(5, x.shape[1] - prefix, generator=torch.Generator().manual_seed(0)) < 0.6
    for controller, formula in zip(model.controllers, Formula.of(list(model.controllers), log_price), strict=True):
        wanted = plain(controller, x, active, prefix, each)
        content, direction = formula.content(*means(x, active, prefix))
        logits = formula.logits(content)
        said = controller.logits(x, active, prefix, each, grid, through_difficulty=True)
        for depth, heads in ((logits[:, 0], logits[:, 1 : 1 + wanted.heads.shape[1]]), (said.depth, said.heads)):
            torch.testing.assert_close(depth, wanted.depth, atol=1e-9, rtol=0)
            torch.testing.assert_close(heads, wanted.heads, atol=1e-9, rtol=0)
        torch.testing.assert_close(said.difficulty, wanted.difficulty, atol=1e-9, rtol=0)
        assert (said.tokens is None) == (wanted.tokens is None) == (not controller.rank)
        if wanted.tokens is not None and said.tokens is not None:
            image, token = active.nonzero(as_tuple=True)
            rows = x[image, prefix + token][:, None]
            found = token_scores(rows, direction[image]).flatten() + logits[image, -1]
            torch.testing.assert_close(found, wanted.tokens[image, token], atol=1e-9, rtol=0)
            thresholds = torch.tensor(controller.thresholds(grid))
            torch.testing.assert_close(said.tokens, wanted.tokens + thresholds, atol=1e-9, rtol=0)


def running_first_block() -> MIAFormer:
    model = lively(0)
    with torch.no_grad():
        model.controllers[0].gates.bias[0] = 1e6
    return model


def skip_the_first_block(model: MIAFormer) -> None:
    with torch.no_grad():
        model.controllers[0].gates.bias[0] = -1e6


def load_assigned(model: MIAFormer) -> None:
    changed = copy.deepcopy(model)
    skip_the_first_block(changed)
    model.load_state_dict(changed.state_dict(), assign=True)


def train_a_step(model: MIAFormer) -> None:
    model.train()
    model.controllers[0].gates.bias.data[0] = -1e6  # past the version counter, as some optimisers do
    model.eval()


@pytest.mark.parametrize("change", [skip_the_first_block, load_assigned, train_a_step])
def test_changed_controllers_decide_as_changed(change: Callable[[MIAFormer], None]) -> None:
    model = running_first_block()
    images = pictures(model.backbone, 4)
    assert model.run(images, price=1.0).trace.depth[:, 0].all()
    change(model)
    assert not model.run(images, price=1.0).trace.depth[:, 0].any()


def test_a_copy_of_a_model_decides_by_its_own_controllers() -> None:
    model = lively(0)
    images = pictures(model.backbone, 4)
    before = model.run(images, price=1.0)
    copied = copy.deepcopy(model)
    skip_the_first_block(copied)
    assert not copied.run(images, price=1.0).trace.depth[:, 0].any()
    assert torch.equal(model.run(images, price=1.0).logits, before.logits)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2), st.sampled_from([2, 8, 16]))
@settings(max_examples=60)
def test_rows_are_rounded_up_with_the_best_of_the_other_tokens(
    seed: int, batch: int, patches: int, prefix: int, multiple: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, patches, generator=generator)
    scores[torch.rand(batch, patches, generator=generator) < 0.3] = -torch.inf  # not active: no score
    kept = scores > 0.5
    found = torch.from_numpy(rounded_up(kept.numpy(), scores.numpy(), prefix, multiple))
    for image in range(batch):
        one, asked, own = found[image], kept[image], scores[image]
        scored = own.isfinite()
        count = int(one.sum())
        if not asked.any():
            assert not one.any()  # nothing asked for, nothing added
            continue
        assert (one | ~asked).all()
        assert not one[~scored].any()
        assert (prefix + count) % multiple == 0 or count == int(scored.sum())
        assert count - int(asked.sum()) < multiple
        left_out: Tensor = own[scored & ~one]
        assert not len(left_out) or left_out.max() <= own[one].min()
