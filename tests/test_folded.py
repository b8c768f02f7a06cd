"""Controllers as inference runs them say what the controllers say, and follow every change of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vits import STRUCTURES, lively, pictures

from miaformer import MIAFormer
from miaformer.engine.folded import Folded
from miaformer.model.policy import _rounded_up


@pytest.mark.parametrize("structure", ["plain", "registers", "no_class_token_avg", "uneven_groups"])
@pytest.mark.parametrize("prices", [[0.3], [0.01, 0.1, 1.0, 10.0, 100.0]])
@torch.no_grad()
def test_folded_logits_are_the_controllers_own(structure: str, prices: list[float]) -> None:
    model = lively(3, STRUCTURES[structure])
    with torch.no_grad():
        for controller in model.controllers:
            controller.difficulty.weight.normal_()  # so that difficulty and its gain show
    x = model.embed(pictures(model.backbone, 5))
    prefix = model.num_prefix_tokens
    log_price = torch.tensor(prices).double().log()
    active = torch.rand(5, x.shape[1] - prefix, generator=torch.Generator().manual_seed(0)) < 0.6
    for controller, folded in zip(model.controllers, Folded.of(list(model.controllers), log_price), strict=True):
        context = controller.context(x, active, prefix, log_price.expand(5))
        shift = controller.shift(controller.predicted_difficulty(context), log_price.expand(5))
        depth, heads = controller.depth_and_heads(context, shift)
        patches = x[:, prefix:]
        pooled = torch.stack([patches[i, active[i]].mean(dim=0) for i in range(5)])
        logits, direction = folded.logits(pooled, x[:, :prefix].mean(dim=1) if prefix else pooled)
        wanted = [depth[:, None], heads]
        if controller.rank:
            token_query, shared = controller.token_query(context, shift)
            wanted.append(shared[:, None])
            image, token = active.nonzero(as_tuple=True)
            found = folded.token_logits(patches[image, token], direction[image], logits[image, -1])
            all_tokens = controller.token_logits(patches, token_query[:, None], shared[:, None])
            np.testing.assert_allclose(found, all_tokens[image, token].detach().numpy(), atol=1e-9)
        np.testing.assert_allclose(logits, torch.cat(wanted, dim=1).detach().numpy(), atol=1e-9)
        assert np.array_equal(
            folded.heads(logits[:, 1 : 1 + heads.shape[1]]), controller.most_likely_heads(heads).numpy()
        )


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
    found = torch.from_numpy(_rounded_up(kept.numpy(), scores.numpy(), prefix, multiple))
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
