"""Policies other than the learned one: they keep what they say, and are controls of equal terms."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from plain_controller import plain
from torch import Tensor
from vits import GROUPED_QUERIES, STRUCTURES, WITHOUT_HEADS, lively, pictures, relative, vit

import miaformer
from miaformer import Decisions, MIAFormer
from miaformer.engine.decisions import Gates, likelier_heads
from miaformer.engine.dither import dither
from miaformer.engine.walk import State
from miaformer.model.policy import ClsAttention, Fixed, Full, Random, Sampling, Static


def state(index: int = 0, batch: int = 1000, active: Tensor | None = None) -> State:
    """What a policy that reads no tokens sees: 4 heads, 10 patch tokens."""
    everything = torch.ones(batch, 10, dtype=torch.bool)
    shown = everything if active is None else active
    return State(index, torch.empty(batch, 11, 0), shown, None, 1, 4, num_blocks=3, grid=(2, 5))


def shares(gates: Gates) -> list[float]:
    return [float(kept.float().mean()) for kept in (gates.depth, gates.heads, gates.tokens)]


def test_full_keeps_everything() -> None:
    assert shares(Full().decide(state())) == [1.0, 1.0, 1.0]


def test_random_keeps_the_shares_asked_for() -> None:
    policy = Random(depth=0.8, heads=0.3, tokens=[0.9, 0.5, 0.0], seed=1)
    for index, tokens in enumerate((0.9, 0.5, 0.0)):
        assert shares(policy.decide(state(index))) == pytest.approx([0.8, 0.3, tokens], abs=0.04)
    assert shares(Random(0.0, 0.0, 0.0).decide(state())) == [0.0, 0.0, 0.0]
    assert shares(Random(1.0, 1.0, 1.0).decide(state())) == [1.0, 1.0, 1.0]


def test_random_tokens_are_not_lost_block_after_block() -> None:
    """A token kept at 0.5 in one block is kept at 0.5 in the next: the scope takes no powers of it."""
    policy = Random(tokens=[0.5, 0.5, 0.3])
    first, second, third = (policy.decide(state(index)).tokens for index in range(3))
    assert torch.equal(first, second)
    assert not (third & ~second).any()


def test_random_decides_each_image_on_its_own_and_anew_in_each_pass() -> None:
    policy = Random(0.5, 0.5, 0.5, seed=1)
    passes = [policy.decide(state()) for _ in range(2)]
    for name in ("depth", "heads", "tokens"):
        first, second = (getattr(gates, name) for gates in passes)
        assert bool((first[1:] != first[:-1]).any())
        assert not torch.equal(first, second)


def test_random_is_repeated_by_its_seed() -> None:
    model = miaformer.adapt(vit()).eval()
    images = pictures(model.backbone, 4)
    traces = [model.run(images, Random(0.5, 0.5, 0.5, seed=seed)).trace for seed in (5, 5, 6)]
    assert torch.equal(traces[0].tokens, traces[1].tokens)
    assert torch.equal(traces[0].heads, traces[1].heads)
    assert not torch.equal(traces[0].tokens, traces[2].tokens)


@pytest.mark.parametrize("wrong", [{"depth": 1.5}, {"heads": -0.1}, {"tokens": [0.5, 2.0]}, {"depth": float("nan")}])
def test_random_names_a_share_that_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Random\\({next(iter(wrong))}=.*0 to 1"):
        Random(**wrong)


def test_random_names_shares_for_another_number_of_blocks() -> None:
    model = miaformer.adapt(vit()).eval()
    for name in ("depth", "heads", "tokens"):
        for count in (2, 4):
            with pytest.raises(ValueError, match=rf"{name}.*{count}.*3 blocks"):
                model.run(pictures(model.backbone, 1), Random(**{name: [0.5] * count}))


def drawn(batch: int, depth: int = 3, heads: int = 3, patches: int = 16) -> Decisions:
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, depth), (batch, depth, heads), (batch, depth, patches)]
    return Decisions(*(torch.rand(shape, generator=generator) < 0.6 for shape in shapes))


@pytest.mark.parametrize("kind", [Fixed, Static])
def test_fixed_decisions_are_executed(kind: type[Fixed]) -> None:
    model = miaformer.adapt(vit(), head_choice="subset", token_scope="per_block").eval()
    images = pictures(model.backbone, 5)
    for decisions in (drawn(5), drawn(1)):
        trace = model.run(images, kind(decisions)).trace
        depth = decisions.depth.expand(5, -1)
        assert torch.equal(trace.depth, depth)
        assert torch.equal(trace.tokens, decisions.tokens & depth[..., None])
        chosen = decisions.heads.any(dim=2) & depth
        assert torch.equal(trace.heads[chosen], decisions.heads.expand(5, -1, -1)[chosen])


@pytest.mark.parametrize(
    "wrong", [{"batch": 4}, {"batch": 0}, {"heads": 4}, {"patches": 9}, {"depth": 2}, {"depth": 4}]
)
def test_fixed_decisions_for_another_model_or_batch_are_named(wrong: dict[str, int]) -> None:
    model = miaformer.adapt(vit()).eval()
    given = {"batch": 5, "depth": 3, "heads": 3, "patches": 16, **wrong}
    found = re.escape(str(tuple(given.values())))
    with pytest.raises(ValueError, match=rf"Fixed decisions are for .* = {found}, the model needs \(5, 3, 3, 16\)"):
        model.run(pictures(model.backbone, 5), Fixed(drawn(**given)))


def class_attention(model: MIAFormer, images: Tensor, index: int) -> Tensor:
    """(B, N): what the class token of block `index` attends to, mean over heads, taken from timm's own attention."""
    x = model.embed(images).tokens
    x = model.backbone.blocks[:index](x)
    block = model.backbone.blocks[index]
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(2, 3) * attn.scale).softmax(dim=3)
    return weights[:, :, 0, model.num_prefix_tokens :].mean(dim=1)


@pytest.mark.parametrize("structure", ["plain", "registers", "layer_scale_qk_norm", "not_square_no_biases"])
def test_class_attention_keeps_the_tokens_attended_to_most(structure: str) -> None:
    """With one head the criterion is EViT's to the letter: the softmax over patches alone changes no order."""
    model = miaformer.adapt(vit(1, **{**STRUCTURES[structure], "num_heads": 1})).double().eval()
    images = pictures(model.backbone, 4)
    trace = model.run(images, ClsAttention(keep=0.5, blocks=(1,))).trace
    scores = class_attention(model, images, 1)
    count = round(scores.shape[1] / 2)
    kept = torch.zeros_like(trace.tokens[:, 1]).scatter_(1, scores.topk(count, dim=1).indices, True)
    assert trace.tokens[:, 0].all()
    assert torch.equal(trace.tokens[:, 1], kept)
    assert torch.equal(trace.tokens[:, 2], kept)


def test_class_attention_reads_keys_that_heads_share() -> None:
    """Each head its own: of two heads that share one, both count."""
    model = miaformer.adapt(vit(1, **GROUPED_QUERIES), **WITHOUT_HEADS).double().eval()
    images = pictures(model.backbone, 4)
    x, (block, *_) = model.embed(images)
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        seen.append((q @ k.transpose(2, 3) * block.attn.scale).softmax(dim=3))
        return q

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        block(x)
    weights = seen[0][:, :, 0, model.num_prefix_tokens :]
    scores = (weights / weights.sum(dim=2, keepdim=True)).mean(dim=1)  # among patches
    trace = model.run(images, ClsAttention(keep=0.5, blocks=(0,))).trace
    kept = torch.zeros_like(trace.tokens[:, 0]).scatter_(1, scores.topk(scores.shape[1] // 2, dim=1).indices, True)
    assert torch.equal(trace.tokens[:, 0], kept)


def test_class_attention_keeps_its_share_at_each_of_its_blocks() -> None:
    model = miaformer.adapt(vit(1, depth=8)).eval()
    images = pictures(model.backbone, 4)
    trace = model.run(images, ClsAttention(keep=0.5)).trace
    assert trace.tokens.sum(dim=2).tolist() == [[16, 16, 8, 8, 4, 4, 2, 2]] * 4  # a quarter, half, three quarters
    assert trace.depth.all()
    assert trace.heads.all()
    everything = model.run(images, ClsAttention(keep=1.0))
    assert everything.trace.tokens.all()
    assert relative(everything.logits, model.backbone(images)) < 1e-4


def test_class_attention_sees_kept_tokens_only() -> None:
    """What was skipped takes no part in the softmax that later blocks choose by."""
    model = miaformer.adapt(vit(1, num_heads=4)).double().eval()
    images = pictures(model.backbone, 2)
    x = model.embed(images).tokens
    active = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    policy = ClsAttention(keep=0.5, blocks=(0,))
    other = torch.where(torch.cat([torch.ones(2, 1).bool(), active], dim=1)[..., None], x, x + 50)
    found = [
        policy.decide(State(0, rows, active, None, 1, 4, 3, (4, 4), model.backbone.blocks[0])) for rows in (x, other)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert not (found[0].tokens & ~active).any()
    assert found[0].tokens.sum(dim=1).tolist() == [round(0.5 * n) for n in active.sum(dim=1).tolist()]


def test_class_attention_needs_a_class_token() -> None:
    model = miaformer.adapt(vit(0, **STRUCTURES["no_class_token_avg"])).eval()
    with pytest.raises(ValueError, match="needs a class token"):
        model.run(pictures(model.backbone, 2), ClsAttention(keep=0.5))


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_class_attention_names_a_share_that_is_none(keep: float) -> None:
    with pytest.raises(ValueError, match=r"ClsAttention\(keep=.*0 to 1"):
        ClsAttention(keep=keep)


def test_learned_decisions_are_the_signs_of_the_controllers_logits() -> None:
    model = lively(0)
    images = pictures(model.backbone, 6)
    trace = model.run(images, price=1.0, execution="masked").trace
    x = model.embed(images).tokens
    controller = model.controllers[0]
    log_price = torch.zeros(6, dtype=torch.float64)
    everything = torch.ones(6, 25, dtype=torch.bool)
    wanted = plain(controller, x, everything, 1, log_price)
    assert torch.equal(trace.depth[:, 0], wanted.depth > 0)
    assert torch.equal(trace.heads[:, 0], likelier_heads(wanted.heads, True) & (wanted.depth > 0)[:, None])
    policy = model.learned(1.0)
    gates = policy.decide(State(1, x, torch.ones(6, 25, dtype=torch.bool), None, 1, 3, 4, (5, 5)))
    controller = model.controllers[1]
    tokens = plain(controller, x, everything, 1, log_price).tokens
    assert tokens is not None
    logits = tokens + torch.tensor(dither(5, 5))
    executed = torch.from_numpy(gates.depth)[:, None]
    assert torch.equal(torch.from_numpy(gates.tokens) & executed, (logits > 0) & executed)


# Drawn decisions ------------------------------------------------------------------------------------------------------


def sampled(model: MIAFormer, images: Tensor, seed: int, temperature: float = 1.0, **asked: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return model.run(images, price=1.0, sample=Sampling(temperature, generator), **asked)


@pytest.mark.parametrize("config", [{}, {"depth_choice": "nested"}, {"head_choice": "subset"}, {"grains": ("depth",)}])
def test_drawn_decisions_repeat_by_their_seed_and_are_executed_as_drawn(config: dict[str, Any]) -> None:
    model = lively(1, **config)
    images = pictures(model.backbone, 16)
    one, same, other = (sampled(model, images, seed) for seed in (0, 0, 1))
    masked = sampled(model, images, 0, execution="masked")
    for name in ("depth", "heads", "tokens", "macs"):
        assert torch.equal(getattr(one.trace, name), getattr(same.trace, name))
        assert torch.equal(getattr(one.trace, name), getattr(masked.trace, name))
    assert relative(one.logits, masked.logits) < 1e-9
    assert not torch.equal(one.trace.macs, other.trace.macs)
    assert (sampled(model, images, 2, cap=0.5).trace.macs_fraction <= 0.5).all()


def test_cold_draws_are_the_likelier_decisions_and_warm_ones_differ_by_chance() -> None:
    model = lively(1)
    images = pictures(model.backbone, 32)
    greedy = model.run(images, price=1.0).trace
    cold = sampled(model, images, 0, temperature=1e-6).trace
    assert torch.equal(cold.depth, greedy.depth)
    assert torch.equal(cold.tokens, greedy.tokens)
    changed = [
        (sampled(model, images, 0, temperature).trace.depth != greedy.depth).double().mean().item()
        for temperature in (0.1, 1.0, 10.0)
    ]
    assert changed == sorted(changed)
    assert changed[0] < changed[-1] - 0.1


def test_a_gate_is_drawn_as_often_as_its_logit_says() -> None:
    """Of one image 4,000 times: the first block's depth gate alone draws, at temperature 1."""
    model = lively(3, grains=("depth",))
    images = pictures(model.backbone, 1).expand(4000, -1, -1, -1)
    controller = model.controllers[0]
    x = model.embed(images[:1]).tokens
    log_price = torch.zeros(1, dtype=torch.float64)
    logit = plain(controller, x, torch.ones(1, x.shape[1] - 1, dtype=torch.bool), 1, log_price).depth
    kept = sampled(model, images, 0).trace.depth[:, 0].double().mean().item()
    assert 0.02 < torch.sigmoid(logit).item() < 0.98
    assert kept == pytest.approx(torch.sigmoid(logit).item(), abs=0.03)


def test_sample_true_draws_from_the_global_generator() -> None:
    model = lively(1)
    images = pictures(model.backbone, 16)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model(images, price=1.0, sample=True))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_who_does_not_ask_controllers_cannot_draw() -> None:
    model = lively(0)
    images = pictures(model.backbone, 2)
    for asked in ({}, {"policy": Full()}):
        with pytest.raises(ValueError, match="sample= draws the decisions of controllers"):
            model.run(images, sample=True, **asked)
    with pytest.raises(ValueError, match="must be positive"):
        Sampling(0.0)
