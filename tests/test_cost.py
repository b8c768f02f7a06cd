"""I4: what is reported is what is executed, to the last multiply-accumulate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from vits import ALL_STRUCTURES, GRAINS, STRUCTURES, WITHOUT_HEADS, lively, pictures, vit

import miaformer
from miaformer import AdaptConfig, MIAFormer, Output
from miaformer.engine.cost import Cost, count_macs, group_sizes
from miaformer.engine.decisions import Decisions, Gates, HostGates
from miaformer.model.policy import ClsAttention, Fixed, Full, Random, Static

WIDTHS = ("coupled", "hidden", "full")


@pytest.mark.parametrize(
    ("macs", "call"),
    [
        (7 * 5 * 3, lambda: F.linear(torch.rand(7, 5), torch.rand(3, 5), torch.rand(3))),
        (2 * 7 * 5 * 3, lambda: F.linear(torch.rand(2, 7, 5), torch.rand(3, 5))),
        (2 * 8 * 4 * 4 * 3 * 3 * 3, lambda: nn.Conv2d(3, 8, 3, padding=1)(torch.rand(2, 3, 4, 4))),
        (2 * 8 * 3 * 2 * 2, lambda: nn.Conv2d(3, 8, 2, stride=2)(torch.rand(2, 3, 2, 2))),
        # batch 2, 3 heads of 4 channels, 5 queries and 7 keys: products with keys, then with values
        (2 * 3 * (2 * 5 * 7 * 4), lambda: attend(torch.float32)),
        (2 * 3 * (2 * 5 * 7 * 4), lambda: attend(torch.float64)),
        (2 * 3 * (2 * 5 * 7 * 4), lambda: attend(torch.bfloat16)),
        (2 * 3 * (2 * 5 * 7 * 4), lambda: attend(torch.float32, masked=True)),
        (0, lambda: F.layer_norm(torch.rand(4, 8), (8,)).softmax(dim=0) * 3),
    ],
)
def test_counted_macs_are_those_done_by_hand(macs: int, call: Any) -> None:
    assert count_macs(call) == macs


def attend(dtype: torch.dtype, masked: bool = False) -> torch.Tensor:
    q, k, v = (torch.rand(2, 3, rows, 4, dtype=dtype) for rows in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.1 if masked else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("name", [*STRUCTURES, "grouped_queries"])
def test_the_backbones_macs_are_counted_ones(name: str) -> None:
    backbone = vit(1, **ALL_STRUCTURES[name])
    images = pictures(backbone, 2)
    model = miaformer.adapt(backbone, **GRAINS.get(name, {}))
    assert 2 * model.cost().backbone == count_macs(lambda: backbone(images))


def test_another_image_size_has_its_own_macs() -> None:
    backbone = vit(1, dynamic_img_size=True)
    model = miaformer.adapt(backbone)
    images = pictures(backbone, 1, size=(24, 12))
    assert model.cost((24, 12)).num_patches == 18
    assert model.cost((24, 12)).backbone == count_macs(lambda: backbone(images))


def policies(model: MIAFormer, batch: int) -> dict[str, dict[str, Any]]:
    """Arguments of `run` for every way to decide."""
    cost = model.cost()
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    one = Decisions(draw(1, cost.depth), draw(1, cost.depth, cost.num_heads), draw(1, cost.depth, cost.num_patches))
    each = Decisions(
        draw(batch, cost.depth), draw(batch, cost.depth, cost.num_heads), draw(batch, cost.depth, cost.num_patches)
    )
    made: dict[str, dict[str, Any]] = {
        "full": {"policy": Full()},
        "random": {"policy": Random(0.7, 0.6, 0.5, seed=1)},
        "learned": {"price": 1.0},
        "learned_each": {"price": [0.01 * 4**i for i in range(batch)]},
        "static": {"policy": Static(one)},
        "fixed": {"policy": Fixed(each)},
    }
    if cost.num_prefix_tokens:
        made["cls_attention"] = {"policy": ClsAttention(keep=0.6, blocks=(0, 2, 3))}
    return made


@pytest.mark.parametrize("mlp_width", WIDTHS)
@pytest.mark.parametrize(
    ("structure", "config"),
    [
        ("distilled", {"head_choice": "subset"}),
        ("map_pool", {"token_scope": "per_block"}),
        ("swiglu", {"token_scope": "per_block", "head_choice": "subset"}),
        ("uneven_groups", {}),
        ("grouped_queries", WITHOUT_HEADS),
        ("grouped_queries", {**WITHOUT_HEADS, "head_choice": "subset"}),
    ],
)
def test_reported_macs_are_counted_macs(structure: str, config: dict[str, Any], mlp_width: str) -> None:
    model = lively(2, ALL_STRUCTURES[structure], mlp_width=mlp_width, **config)
    images = pictures(model.backbone, 5)
    cost = model.cost()  # its own count, of the meta model, is not to be counted
    for name, arguments in policies(model, len(images)).items():
        for cap in (None, 0.5) if name in ("learned", "cls_attention", "full") else (None,):
            outputs: list[Output] = []
            counted = count_macs(lambda a=arguments, c=cap, o=outputs: o.append(model.run(images, cap=c, **a)))
            trace = outputs[0].trace
            assert trace.macs.dtype == torch.int64
            assert int(trace.macs.sum()) == counted, (name, cap)
            torch.testing.assert_close(trace.macs_fraction, (trace.macs / cost.backbone).float())


def test_each_images_macs_are_its_own(lively_model: MIAFormer) -> None:
    images = pictures(lively_model.backbone, 6)
    lively_model.cost()
    reported = lively_model.run(images, price=1.0).trace.macs
    counted = [count_macs(lambda i=i: lively_model(images[i : i + 1], price=1.0)) for i in range(6)]
    assert reported.tolist() == counted
    assert len(set(counted)) > 1


def test_masked_execution_reports_what_sparse_would_take(lively_model: MIAFormer) -> None:
    images = pictures(lively_model.backbone, 6)
    sparse, masked = (lively_model.run(images, price=1.0, execution=e).trace.macs for e in ("sparse", "masked"))
    assert torch.equal(sparse, masked)


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(192, 3), (384, 6), (768, 12)])
def test_controllers_take_under_one_percent_of_a_deit(embed_dim: int, num_heads: int) -> None:
    with torch.device("meta"):
        backbone = VisionTransformer(embed_dim=embed_dim, num_heads=num_heads, weight_init="skip")
        model = MIAFormer(backbone, AdaptConfig(), {})
    assert 0 < model.controller_macs() < 0.01 * model.cost().backbone


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    num_heads, head_dim = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
    return Cost(
        depth=2,
        embed_dim=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=draw(st.tuples(*[st.sampled_from(divisors)] * 2)),
        head_dim=head_dim,
        mlp_hidden=draw(st.integers(num_heads, 20)),
        mlp_inputs=draw(st.sampled_from([1, 2])),
        num_prefix_tokens=draw(st.integers(0, 2)),
        grid=draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
        mlp_width=draw(st.sampled_from(WIDTHS)),
        trims_last_block=draw(st.booleans()),
        embed_macs=draw(st.integers(0, 99)),
        head_macs=draw(st.integers(0, 99)),
    )


@given(costs(), st.integers(0, 2**32), st.sampled_from([0, 1]))
@settings(max_examples=60)
def test_a_blocks_macs_are_those_of_its_products(cost: Cost, seed: int, index: int) -> None:
    """The formula, written out product by product as (rows, inputs, outputs)."""
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(
        *(torch.rand(shape, generator=generator) < 0.6 for shape in [(3,), (3, cost.num_heads), (3, cost.num_patches)])
    )
    found = cost.block(index, gates)
    for image in range(3):
        kept = gates.heads[image].nonzero().flatten().tolist()
        rows = cost.num_prefix_tokens + int(gates.tokens[image].sum())
        read = cost.num_prefix_tokens if cost.trims_last_block and index == 1 else rows
        width = {w: sum(group_sizes(w, cost.num_heads)[j] for j in kept) for w in (cost.embed_dim, cost.mlp_hidden)}
        dim = width[cost.embed_dim] if cost.mlp_width == "coupled" else cost.embed_dim
        hidden = cost.mlp_hidden if cost.mlp_width == "full" else width[cost.mlp_hidden]
        channels = len(kept) * cost.head_dim
        shared = cost.num_kv_heads[index] < cost.num_heads
        key_channels = cost.num_kv_heads[index] * cost.head_dim if shared else channels
        products = [
            (read, cost.embed_dim, channels),
            *[(rows, cost.embed_dim, key_channels)] * 2,
            *[(read, cost.head_dim, rows), (read, rows, cost.head_dim)] * len(kept),
            (read, channels, cost.embed_dim),
            *[(read, dim, hidden)] * cost.mlp_inputs,
            (read, hidden, dim),
        ]
        assert int(found[image]) == int(gates.depth[image]) * sum(a * b * c for a, b, c in products)


@given(costs(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_blocks_together_take_what_each_takes(cost: Cost, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (3, cost.num_heads), (3, cost.num_patches)]
    each = [
        HostGates.of(Gates(*(torch.rand(shape, generator=generator) < 0.6 for shape in shapes)))
        for _ in range(cost.depth)
    ]
    wanted = sum(cost.of_host(index, gates) for index, gates in enumerate(each))
    assert cost.of_blocks(each).tolist() == wanted.tolist()


@given(costs(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_gates_as_numbers_cost_the_same_and_pass_gradients_on(cost: Cost, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (3, cost.num_heads), (3, cost.num_patches)]
    gates = [torch.rand(shape, generator=generator) < 0.6 for shape in shapes]
    numbers = [gate.double().requires_grad_() for gate in gates]
    for index in (0, 1):
        macs = cost.block(index, Gates(*numbers))
        assert macs.tolist() == cost.block(index, Gates(*gates)).tolist()
        for gradient in torch.autograd.grad(macs.sum(), numbers, allow_unused=True):
            # None: of tokens, in a last block that has no prefix rows to trim to. More executed never costs less.
            assert gradient is None or bool(((gradient >= 0) & gradient.isfinite()).all())
    inside = [torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *g: cost.block(0, Gates(*g)), inside)


@given(st.integers(1, 300), st.integers(1, 16))
def test_groups_are_even_and_complete(width: int, num_heads: int) -> None:
    sizes = group_sizes(width, num_heads)
    assert len(sizes) == num_heads
    assert sum(sizes) == width
    assert max(sizes) - min(sizes) <= 1
