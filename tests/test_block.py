"""The attention backends agree, and a block under gates is one block, however it is executed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vits import STRUCTURES, pictures, relative, vit

from miaformer.engine.attention import attend_masked, attend_packed
from miaformer.engine.block import Width, masked_block, packed_block
from miaformer.engine.decisions import Gates
from miaformer.engine.products import products_for
from miaformer.vit.embedding import embedded

WIDTHS = ("coupled", "hidden", "full")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as it stands in the paper. q, k, v: (rows, H, D)."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        weights = (q[:, head] @ k[:, head].T / q.shape[2] ** 0.5).softmax(dim=1)
        out[:, head] = weights @ v[:, head]
    return out


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40)
def test_packed_attention_is_that_of_each_image(lengths: list[int], heads: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (normal(generator, sum(lengths), heads, dim) for _ in range(3))
    found = attend_packed(q, k, v, lengths, lengths)
    wanted = torch.cat([attend_plainly(*parts) for parts in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)])
    assert relative(found, wanted) < 1e-12


@given(st.lists(st.integers(2, 5), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=20)
def test_packed_attention_takes_fewer_queries_than_keys(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = [2] * len(lengths)
    q = normal(generator, sum(queries), 2, 3)
    k, v = (normal(generator, sum(lengths), 2, 3) for _ in range(2))
    found = attend_packed(q, k, v, queries, lengths)
    parts = zip(q.split(queries), k.split(lengths), v.split(lengths), strict=True)
    assert relative(found, torch.cat([attend_plainly(*part) for part in parts])) < 1e-12


@given(st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40)
def test_masked_attention_is_that_among_kept_keys(batch: int, rows: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (normal(generator, batch, 2, rows, 3) for _ in range(3))
    keys = torch.rand(batch, rows, generator=generator) < keep
    for given_keys in (keys, keys.double()):
        found = attend_masked(q, k, v, given_keys)
        assert bool(found.isfinite().all())
        for image in range(batch):
            kept = keys[image]
            if kept.any():
                wanted = attend_plainly(
                    q[image].transpose(0, 1), k[image][:, kept].transpose(0, 1), v[image][:, kept].transpose(0, 1)
                )
                assert relative(found[image].transpose(0, 1), wanted) < 1e-12


def test_key_gates_tell_the_effect_of_keeping_a_key() -> None:
    """A kept key's gate gets the derivative of its weight, a skipped one's what adding the key would change."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (normal(generator, 1, 2, 4, 3) for _ in range(3))
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    gates = kept.clone().requires_grad_()

    def gated(gate: Tensor) -> Tensor:
        weights = (q @ k.transpose(2, 3) / 3**0.5).exp() * gate[:, None, None]
        return weights / weights.sum(dim=3, keepdim=True) @ v

    seen = normal(generator, 1, 2, 4, 3)
    (found,) = torch.autograd.grad((attend_masked(q, k, v, gates) * seen).sum(), gates)
    (derivative,) = torch.autograd.grad((gated(gates) * seen).sum(), gates)
    wanted = derivative.clone()
    for key in (1, 3):
        added = kept.clone()
        added[0, key] = 1
        wanted[0, key] = ((gated(added) - gated(kept)) * seen).sum()
    assert relative(found, wanted) < 1e-10
    assert (found != 0).all()


def test_key_gates_survive_scores_far_apart() -> None:
    k = torch.tensor([0.0, 800.0]).double().reshape(1, 1, 2, 1)
    q = torch.ones(1, 1, 2, 1).double().requires_grad_()
    for kept in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]):
        gates = torch.tensor([kept], dtype=torch.float64, requires_grad=True)
        out = attend_masked(q, k, torch.ones_like(k), gates)
        gradients = torch.autograd.grad(out.sum(), (gates, q))
        assert all(bool(t.isfinite().all()) for t in (out, *gradients))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_variable_length_kernel_agrees(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, queries = [5, 1, 17, 17, 3], [1] * 5
    k, v = (normal(generator, sum(lengths), 3, 64) for _ in range(2))
    for q_lengths in (lengths, queries):
        q = normal(generator, sum(q_lengths), 3, 64)
        found = attend_packed(*(t.to("cuda", dtype) for t in (q, k, v)), q_lengths, lengths)
        assert relative(found.double().cpu(), attend_packed(q, k, v, q_lengths, lengths)) < 0.02


def gates_of(generator: torch.Generator, batch: int, heads: int, patches: int) -> Gates:
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    kept_heads = draw(batch, heads)
    kept_heads[:, 0] |= ~kept_heads.any(dim=1)
    return Gates(draw(batch), kept_heads, draw(batch, patches))


def numbers(gates: Gates) -> list[Tensor]:
    return [g.double().requires_grad_() for g in (gates.depth, gates.heads, gates.tokens)]


@pytest.mark.parametrize("mlp_width", WIDTHS)
@pytest.mark.parametrize(
    "structure",
    ["plain", "layer_scale_qk_norm", "scale_norms_rms", "scale_norms_layer", "swiglu_packed", "uneven_groups"],
)
def test_gates_as_numbers_do_what_booleans_do(structure: str, mlp_width: Any) -> None:
    block = vit(3, **STRUCTURES[structure]).double().blocks[1]
    generator = torch.Generator().manual_seed(4)
    gates = gates_of(generator, 6, block.attn.num_heads, 5)
    x = normal(generator, 6, 7, block.attn.qkv.in_features)
    as_numbers = numbers(gates)
    found = masked_block(block, x, Gates(*as_numbers), 2, mlp_width)
    wanted = masked_block(block, x, gates, 2, mlp_width)
    assert relative(found, wanted) < 1e-12
    seen = normal(generator, *found.shape)
    for gradient in torch.autograd.grad((found * seen).sum(), as_numbers):
        assert bool(gradient.isfinite().all())
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("mlp_width", WIDTHS)
def test_gradients_of_gates_between_zero_and_one_are_true(mlp_width: Any) -> None:
    block = vit(3, embed_dim=8, num_heads=2, scale_attn_norm=True, scale_mlp_norm=True).double().blocks[1]
    generator = torch.Generator().manual_seed(4)
    x = normal(generator, 2, 4, 8)
    depth, heads = (
        (0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in [(2,), (2, 2)]
    )
    tokens = torch.tensor([[True, False, True], [False, True, True]])  # a key is attended to or not: see test above

    def executed(d: Tensor, h: Tensor) -> Tensor:
        return masked_block(block, x, Gates(d, h, tokens), 1, mlp_width)

    assert torch.autograd.gradcheck(executed, (depth, heads))


@pytest.mark.parametrize("gates", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
def test_gates_of_all_zeros_pass_finite_gradients_on(gates: list[float]) -> None:
    """No key at all, and norms over no unit at all, are where a division by zero would show."""
    block = vit(3, scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True).double().blocks[1]
    shapes = [(2,), (2, 3), (2, 4)]
    given_gates = [torch.full(s, g, dtype=torch.float64).requires_grad_() for s, g in zip(shapes, gates, strict=True)]
    x = normal(torch.Generator().manual_seed(0), 2, 4, 24)
    out = masked_block(block, x, Gates(*given_gates), 0, "hidden")
    for gradient in torch.autograd.grad(out.sum(), [*given_gates, block.attn.qkv.weight, block.mlp.fc1.weight]):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("mlp_width", WIDTHS)
@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 1, 2, 3, 4], [1, 4], [4]])
def test_a_choice_of_heads_takes_its_share_of_every_layer(kept: list[int], mlp_width: Any) -> None:
    block = vit(0, **STRUCTURES["uneven_groups"]).blocks[0]  # 20 channels and 23 units in 5 groups
    width = Width.of(kept, block, mlp_width, torch.device("cpu"))
    units = torch.arange(100)
    groups = {20: [4, 4, 4, 4, 4], 23: [4, 5, 4, 5, 5]}

    def share(total: int) -> list[int]:
        group = torch.arange(5).repeat_interleave(torch.tensor(groups[total]))
        return torch.isin(group, torch.tensor(kept)).nonzero().flatten().tolist()

    assert width.num_heads == len(kept)
    assert units[:20][width.heads].tolist() == share(20)
    assert units[:23][width.hidden].tolist() == (list(range(23)) if mlp_width == "full" else share(23))
    assert units[:20][width.dim].tolist() == (share(20) if mlp_width == "coupled" else list(range(20)))
    if kept == list(range(len(kept))):  # the first heads are views of the weights, no copies
        assert all(isinstance(part, slice) for part in (width.heads, width.hidden, width.dim))


def test_packed_rows_of_the_full_width_are_the_blocks_own() -> None:
    for structure in STRUCTURES.values():
        backbone = vit(5, **structure).double()
        x, (block, *_) = embedded(backbone, pictures(backbone, 3))
        rows, dim, prefix = x.shape[1], x.shape[2], backbone.num_prefix_tokens
        width = Width.of(range(block.attn.num_heads), block, "coupled", x.device)
        places = torch.arange(rows).repeat(3)
        found = packed_block(block, x.flatten(0, 1), width, [rows] * 3, None, products_for(x), places)
        assert relative(found.view_as(x), block(x)) < 1e-12
        if prefix:
            read = packed_block(block, x.flatten(0, 1), width, [rows] * 3, prefix, products_for(x), places)
            assert relative(read.view(3, prefix, dim), block(x)[:, :prefix]) < 1e-12


def test_dropout_of_attention_is_applied_in_training_only() -> None:
    block = vit(0, attn_drop_rate=0.5).blocks[0]
    x = normal(torch.Generator().manual_seed(1), 2, 5, 24).float()
    everything = Gates.full(2, 3, 4)
    gated = Gates(*(g.float() for g in (everything.depth, everything.heads, everything.tokens)))
    for gates in (everything, gated):
        at_rest = masked_block(block.eval(), x, gates, 1, "full")
        assert torch.allclose(at_rest, block(x), atol=1e-5)
        assert not torch.allclose(masked_block(block.train(), x, gates, 1, "full"), at_rest, atol=1e-3)
