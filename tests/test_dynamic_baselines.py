"""Baselines that adapt to a budget (ToMe, DynamicViT, exits) spend what they say, choose as they claim, and learn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_training import tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from vits import GROUPED_QUERIES, WITHOUT_HEADS, relative, vit

from miaformer import adapt
from miaformer.engine.cost import count_macs
from miaformer.engine.masked import Masked
from miaformer.lab.baselines.exits import EvenExits, ExitsObjective, exit_table
from miaformer.lab.baselines.merging import _merged, merged_logits, merged_macs, merges_drawn, merges_for
from miaformer.lab.baselines.tokens import (
    LEAST_KEEP,
    RelaxedTopTokens,
    TopTokens,
    add_scorers,
    drawn_keep,
    scorers_of,
    top_tokens_policy,
)
from miaformer.model.model import MIAFormer
from miaformer.training.objective import Step
from miaformer.training.policies import Draws
from miaformer.training.recipes import Stage, get_recipe


@pytest.fixture
def model() -> MIAFormer:
    return tiny_model().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def draws_of(model: MIAFormer, batch: int, full_share: float = 0.0) -> Draws:
    generator = torch.Generator().manual_seed(5)
    return Draws.of_step(generator, batch, model.cost(), full_share, (0.3, 0.9), slice(0, batch))


def with_scorers(model: MIAFormer) -> MIAFormer:
    torch.manual_seed(2)
    add_scorers(model)
    for scorer in scorers_of(model):
        for parameter in scorer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


# merging


def test_merging_nothing_is_the_backbone(model: MIAFormer, images: Tensor) -> None:
    merges = [0] * model.cost().depth
    with torch.no_grad():
        torch.testing.assert_close(merged_logits(model, images, merges), model.backbone(images), atol=1e-5, rtol=1e-4)


def test_merging_takes_heads_that_share_keys(images: Tensor) -> None:
    settings = {**GROUPED_QUERIES, "use_rot_pos_emb": False}
    model = adapt(vit(0, **settings), **WITHOUT_HEADS).eval()
    cost, merges = model.cost(), merges_drawn(model.cost(), 0.7)
    with torch.no_grad():
        assert relative(merged_logits(model, images, [0] * cost.depth), model.backbone(images)) < 1e-5
    assert merged_macs(cost, merges) == count_macs(lambda: merged_logits(model, images[:1], merges))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 1.0])
def test_macs_of_merging_are_those_counted(model: MIAFormer, images: Tensor, rate: float) -> None:
    merges = merges_drawn(model.cost(), rate)
    assert merged_macs(model.cost(), merges) == count_macs(lambda: merged_logits(model, images[:1], merges))


def test_merging_joins_equal_tokens_and_leaves_the_result(model: MIAFormer) -> None:
    """Patches that are all alike stay alike: with as many merged as may be, attention still weighs them as before."""
    flat = torch.full((1, 3, 16, 16), 0.4)
    torch.nn.init.zeros_(model.backbone.pos_embed)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model.backbone(flat)
        merged = merged_logits(model, flat, merges_drawn(model.cost(), 1.0))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


def test_the_class_token_is_kept_apart() -> None:
    """However alike patches are to it; and what is merged is the mean of what it stands for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 8, generator=generator)
    x[:, 2] = x[:, 0]  # a patch as the class token is
    x[:, 5] = x[:, 0]
    size = torch.rand(3, 9, generator=generator) + 0.5
    joined, sizes = _merged(x, size, x, 3)
    torch.testing.assert_close(joined[:, 0], x[:, 0])
    assert torch.equal(sizes[:, 0], size[:, 0])
    assert joined.shape == (3, 6, 8)
    torch.testing.assert_close(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((joined * sizes[..., None]).sum(dim=1), (x * size[..., None]).sum(dim=1))


def test_as_many_are_merged_in_every_block_as_far_as_there_are(model: MIAFormer) -> None:
    cost = replace(model.cost(), depth=6, grid=(8, 8), trims_last_block=True)
    assert merges_drawn(cost, 0.0) == [0] * 6
    assert merges_drawn(cost, 0.25) == [8, 8, 8, 8, 8, 0]
    assert merges_drawn(cost, 1.0) == [32, 16, 8, 4, 2, 0]
    assert sorted(merges_drawn(cost, 0.33), reverse=True) == merges_drawn(cost, 0.33)


def test_merges_meet_a_budget_or_say_what_is_the_least(model: MIAFormer) -> None:
    cost = model.cost()
    least = merged_macs(cost, merges_drawn(cost, 1.0)) / cost.backbone
    budget = (1 + least) / 2
    assert abs(merged_macs(cost, merges_for(cost, budget)) / cost.backbone - budget) < 0.03
    with pytest.raises(ValueError, match="the least that token merging can spend"):
        merges_for(cost, least / 2)


def test_merging_is_trained_through(model: MIAFormer, images: Tensor) -> None:
    merged_logits(model, images, merges_drawn(model.cost(), 0.5)).sum().backward()
    assert all(p.grad is not None for p in model.backbone.blocks.parameters())


# top tokens


def test_top_tokens_keep_the_same_number_for_every_image_by_score(model: MIAFormer, images: Tensor) -> None:
    policy = TopTokens(0.5, (1,), scorers=scorers_of(with_scorers(model)))
    with torch.no_grad():
        trace = model.run(images, policy=policy).trace
        x, _ = model.walk(model.embed(images), policy, _FirstBlockOnly(model), model.cost())
    kept = trace.tokens[:, 1].sum(dim=1)
    assert kept.tolist() == [model.cost().num_patches // 2] * len(images)
    scores = scorers_of(model)[1](x[:, 1:], torch.ones(len(images), model.cost().num_patches))
    for image in range(len(images)):
        assert scores[image][trace.tokens[image, 1]].min() >= scores[image][~trace.tokens[image, 1]].max()


class _FirstBlockOnly:
    def __init__(self, model: MIAFormer) -> None:
        self.model = model

    def __call__(self, index: int, block: torch.nn.Module, x: Tensor, gates: object) -> Tensor:
        return block(x) if index == 0 else x


def test_macs_of_top_tokens_are_those_counted(model: MIAFormer, images: Tensor) -> None:
    policy = TopTokens(0.6, (1, 2), scorers=scorers_of(with_scorers(model)))
    model.cost()  # which runs parts of the model, once
    reported: list[int] = []
    counted = count_macs(lambda: reported.append(int(model.run(images[:1], policy=policy).trace.macs)))
    assert reported == [counted]


def test_top_tokens_meet_a_budget(model: MIAFormer, images: Tensor) -> None:
    policy = top_tokens_policy(with_scorers(model), 0.7)
    with torch.inference_mode():
        spent = model.run(images, policy=policy).trace.macs_fraction
    assert torch.allclose(spent, torch.full_like(spent, 0.7), atol=0.06)  # whole tokens of few


def test_relaxed_top_tokens_are_the_hard_ones_without_noise_and_teach_scorers(model: MIAFormer, images: Tensor) -> None:
    draws = draws_of(with_scorers(model), len(images))
    relaxed = RelaxedTopTokens(scorers_of(model), torch.full((len(images),), 0.5), draws, temperature=0.0)
    hard = TopTokens(0.5, tuple(i for i, s in enumerate(scorers_of(model)) if any(True for _ in s.parameters())),
                     scorers=scorers_of(model))  # fmt: skip
    cost = model.cost()
    x, steps = model.walk(model.embed(images), relaxed, Masked(cost), cost)
    with torch.inference_mode():
        trace = model.run(images, policy=hard).trace
    assert torch.equal(steps.decisions().tokens, trace.tokens)
    (x.square().mean() + steps.macs.mean() / cost.backbone).backward()
    for scorer in scorers_of(model):
        for parameter in scorer.parameters():
            assert parameter.grad is not None


def test_images_that_execute_everything_keep_all_tokens(model: MIAFormer) -> None:
    draws = draws_of(model, 8, full_share=0.5)
    keep = drawn_keep(draws)
    assert (keep[draws.full] == 1).all()
    assert ((keep[~draws.full] >= LEAST_KEEP) & (keep[~draws.full] <= 1)).all()


# early exits


@pytest.mark.parametrize(("threshold", "blocks"), [(0.0, 1), (1.01, None)])
def test_exits_leave_at_once_or_never(model: MIAFormer, images: Tensor, threshold: float, blocks: int | None) -> None:
    with torch.inference_mode():
        output = model.run(images, policy=EvenExits(model.backbone, threshold))
    assert (output.trace.depth.sum(dim=1) == (blocks or model.cost().depth)).all()
    if blocks is None:
        torch.testing.assert_close(output.logits, model.backbone(images), atol=1e-5, rtol=1e-4)


def test_exits_are_final_and_follow_confidence(model: MIAFormer, images: Tensor) -> None:
    with torch.inference_mode():
        x = model.backbone.blocks[0](model.embed(images).tokens)
        confidence = model.backbone.forward_head(model.backbone.norm(x)).softmax(dim=1).amax(dim=1)
        threshold = float(confidence.median())
        depth = model.run(images, policy=EvenExits(model.backbone, threshold)).trace.depth
    assert torch.equal(~depth[:, 1], confidence >= threshold)
    assert (depth[:, 1:] <= depth[:, :-1]).all(), "who has left does not come back"


def test_a_share_of_the_tokens_enters_evenly_and_stays(model: MIAFormer, images: Tensor) -> None:
    with torch.inference_mode():
        tokens = model.run(images, policy=EvenExits(model.backbone, 2.0, keep=0.5)).trace.tokens
    assert (tokens.sum(dim=2) == model.cost().num_patches // 2).all()
    assert torch.equal(tokens, tokens[:1, :1].expand_as(tokens))


def test_a_table_of_exits_foretells_what_they_do(model: MIAFormer, images: Tensor) -> None:
    labels = model.backbone(images).argmax(dim=1)
    table = exit_table(model, [SimpleNamespace(images=images, labels=labels)], 0.5)
    macs = float(table.macs[1:3].mean())
    accuracy, threshold = table.at(macs)
    with torch.inference_mode():
        output = model.run(images, policy=EvenExits(model.backbone, threshold, keep=0.5))
    depth = output.trace.depth.sum(dim=1)
    assert torch.equal(output.trace.macs, torch.from_numpy(table.macs)[depth - 1])
    assert output.trace.macs.double().mean() <= macs
    assert float((output.logits.argmax(dim=1) == labels).double().mean()) == pytest.approx(accuracy)
    assert table.at(0.0)[1] == pytest.approx(0.0, abs=1e-6)
    assert table.at(float(table.macs[-1]))[0] == pytest.approx(float(table.correct[:, -1].mean()))


def test_exits_are_trained_on_the_answers_after_every_block(model: MIAFormer, images: Tensor) -> None:
    labels = torch.eye(model.num_classes)[torch.arange(len(images)) % model.num_classes]
    drawn = draws_of(model, len(images))
    step = Step(drawn, drawn, torch.zeros(len(images)), torch.zeros(len(images)), (0.0, 1.0), 1.0)
    stage = Stage("exits", epochs=1, lr=0)
    found = ExitsObjective(model, stage, get_recipe("digits"), None)(images, labels, step).task_loss
    x, losses = model.embed(images).tokens, []
    for block in model.backbone.blocks:
        x = block(x)
        logits = model.backbone.forward_head(model.backbone.norm(x))
        losses.append(cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(found, torch.stack(losses).mean(dim=0).detach(), atol=1e-5, rtol=1e-4)
