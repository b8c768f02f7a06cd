"""I2: masked execution is sparse execution is the definition, for any decisions. I3: images do not meet in a batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import RmsNorm, SwiGLU
from timm.models.eva import Eva
from torch import Tensor, nn
from vits import GLU_FIRST, GLU_LAST, STRUCTURES, WITHOUT_HEADS, Mlp, enliven, lively, pictures, relative, vit

import miaformer
from miaformer import Decisions, MIAFormer
from miaformer.engine.masked import Masked
from miaformer.engine.sparse import Sparse
from miaformer.model.policy import ClsAttention, Fixed, Full, Random

WIDTHS = ("coupled", "hidden", "full")
KEEPS = st.sampled_from([0.0, 0.15, 0.5, 0.85, 1.0])


@st.composite
def backbones(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a ViT of any size and structure that is supported."""
    kind = draw(st.sampled_from(["plain", "plain", "no class token", "distilled", "eva", "eva"]))
    if kind == "eva":
        return draw(of_the_other_family())
    num_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    made: dict[str, Any] = {
        "embed_dim": num_heads * head_dim,
        "num_heads": num_heads,
        "depth": draw(st.integers(1, 4)),
        "patch_size": 2,
        "img_size": (2 * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))),
        "num_classes": draw(st.sampled_from([3, 3, 0])),
        "norm_layer": draw(st.sampled_from([None, RmsNorm])),
        "qk_norm": draw(st.booleans()),
        "scale_attn_norm": draw(st.booleans()),
        "scale_mlp_norm": draw(st.booleans()),
        "init_values": draw(st.sampled_from([None, 0.1])),
        "qkv_bias": draw(st.booleans()),
        "proj_bias": draw(st.booleans()),
        "pre_norm": draw(st.booleans()),
    }
    mlp, act = draw(st.sampled_from([(Mlp, nn.GELU), (SwiGLU, nn.SiLU), (GLU_LAST, nn.Sigmoid), (GLU_FIRST, nn.SiLU)]))
    units = draw(st.integers(num_heads, 3 * num_heads + 2)) * (2 if mlp in (GLU_LAST, GLU_FIRST) else 1)
    made |= {"mlp_layer": mlp, "act_layer": act, "mlp_ratio": (units + 0.5) / made["embed_dim"]}
    if kind == "distilled":
        made["distilled"] = True
    else:
        pools = ["avg", "max", "avgmax", "map", "prr", ""] + ["token"] * 3 * (kind == "plain")
        made |= {
            "class_token": kind == "plain",
            "global_pool": draw(st.sampled_from(pools)),
            "reg_tokens": draw(st.integers(0, 2)),
            "pool_include_prefix": draw(st.booleans()),
        }
    return made


@st.composite
def of_the_other_family(draw: st.DrawFn) -> dict[str, Any]:
    num_heads, head_dim, depth = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8])), draw(st.integers(1, 3))
    class_token, attn_type = draw(st.booleans()), draw(st.sampled_from(["eva", "rope"]))
    rope_type = draw(st.sampled_from([None, "cat", "mixed", "dinov3"]))
    post_norm = draw(st.integers(0, 4)) == 0
    made: dict[str, Any] = {
        "kind": Eva,
        "embed_dim": num_heads * head_dim,
        "num_heads": num_heads,
        "depth": depth,
        "patch_size": 2,
        "img_size": (2 * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))),
        "num_classes": draw(st.sampled_from([3, 3, 0])),
        "norm_layer": draw(st.sampled_from([nn.LayerNorm, RmsNorm])),
        "attn_type": attn_type,
        "qkv_bias": draw(st.booleans()),
        "qkv_fused": draw(st.booleans()),
        "qk_norm": not post_norm and draw(st.booleans()),
        "scale_attn_inner": draw(st.booleans()),
        "swiglu_mlp": draw(st.booleans()),
        "scale_mlp": draw(st.booleans()),
        "mlp_ratio": (draw(st.integers(num_heads, 3 * num_heads + 2)) + 0.5) / (num_heads * head_dim),
        "init_values": draw(st.sampled_from([None, 0.1])),
        "attn_only_layer_scale": not post_norm and draw(st.booleans()),
        "use_post_norm": post_norm,
        "use_pre_transformer_norm": draw(st.booleans()),
        "use_abs_pos_emb": draw(st.booleans()),
        "no_embed_class": draw(st.booleans()),
        "class_token": class_token,
        "num_reg_tokens": draw(st.integers(0, 2)),
        "dynamic_img_size": draw(st.booleans()),
        "global_pool": draw(st.sampled_from(["avg", "max", "avgmax", "map", ""] + ["token"] * 3 * class_token)),
    }
    if rope_type is not None:
        made |= {"use_rot_pos_emb": True, "rope_type": rope_type}
        made["rope_rotate_half"] = rope_type != "mixed" and draw(st.booleans())
        made["rope_grid_indexing"] = draw(st.sampled_from(["ij", "xy"]))
    if attn_type == "rope" and rope_type != "mixed" and not post_norm and draw(st.booleans()):
        divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
        made |= {"num_kv_heads": draw(st.tuples(*[st.sampled_from(divisors)] * depth)), "qkv_fused": False}
    return made


@st.composite
def models(draw: st.DrawFn) -> MIAFormer:
    settings_of_backbone = draw(backbones())
    widths = WIDTHS[1:] if settings_of_backbone.get("use_post_norm") else WIDTHS
    config = {
        "mlp_width": draw(st.sampled_from(widths)),
        "token_scope": draw(st.sampled_from(["progressive", "per_block"])),
        "head_choice": draw(st.sampled_from(["nested", "subset"])),
        "depth_choice": draw(st.sampled_from(["nested", "any"])),
    }
    if "num_kv_heads" in settings_of_backbone:
        config |= WITHOUT_HEADS
    backbone = vit(draw(st.integers(0, 99)), **settings_of_backbone)
    return miaformer.adapt(backbone, **config).double().eval()


def drawn_decisions(model: MIAFormer, batch: int, keeps: tuple[float, float, float], seed: int) -> Decisions:
    generator = torch.Generator().manual_seed(seed)
    cost = model.cost()
    shapes = [(), (cost.num_heads,), (cost.num_patches,)]
    return Decisions(
        *(
            torch.rand(batch, cost.depth, *shape, generator=generator) < keep
            for shape, keep in zip(shapes, keeps, strict=True)
        )
    )


def executed_plainly(model: MIAFormer, x: Tensor, decisions: Decisions) -> Tensor:
    """What docs/concepts.md says, to the letter: image by image, head by head, with lists of indices."""
    x, prefix = x.clone(), model.num_prefix_tokens
    rope = getattr(model.backbone, "rope", None)
    angles = None if rope is None else rope.get_embed(model.cost().grid)
    for image in range(len(x)):
        for index, block in enumerate(model.backbone.blocks):
            if decisions.depth[image, index]:
                rows = [*range(prefix), *(decisions.tokens[image, index].nonzero().flatten() + prefix).tolist()]
                heads = decisions.heads[image, index].nonzero().flatten().tolist()
                own = angles
                if angles is not None and angles.ndim == 4:  # each block has its own
                    own = angles[index]
                kept = [row - prefix for row in rows if row >= prefix]
                width = model.adapt_config.mlp_width
                x[image, rows] = block_plainly(block, x[image, rows], heads, width, own, kept)
    return x


def turned(y: Tensor, angles: Tensor, half: bool) -> Tensor:
    """Pairs of numbers (n, D) as complex ones, turned by (n, 2 D) sines and cosines."""
    sin, cos = angles.chunk(2, dim=1)
    size = y.shape[1]
    pairs = [(i, i + size // 2) for i in range(size // 2)] if half else [(i, i + 1) for i in range(0, size, 2)]
    out = y.clone()
    for real, imaginary in pairs:
        turned = torch.complex(y[:, real], y[:, imaginary]) * torch.complex(cos[:, real], sin[:, real])
        out[:, real], out[:, imaginary] = turned.real, turned.imag
    return out


def block_plainly(
    block: Any, x: Tensor, heads: list[int], mlp_width: str, angles: Tensor | None, patches: list[int]
) -> Tensor:
    """angles: (N, 2 D), or (H, N, 2 D), of all patch tokens; patches: those among the rows x, the last ones."""
    attn, mlp = block.attn, block.mlp
    post_norm = not hasattr(block, "ls1") and not hasattr(block, "gamma_1")
    total, size = attn.num_heads, attn.head_dim

    def share(width: int) -> list[int]:
        return [unit for j in heads for unit in range(j * width // total, (j + 1) * width // total)]

    def linear(layer: nn.Linear, y: Tensor, outputs: list[int], inputs: list[int]) -> Tensor:
        out = y @ layer.weight[outputs][:, inputs].T
        return out if layer.bias is None else out + layer.bias[outputs]

    def norm(layer: nn.Module, y: Tensor, kept: list[int]) -> Tensor:
        if isinstance(layer, nn.Identity):
            return y
        if isinstance(layer, nn.LayerNorm):
            y = y - y.mean(dim=1, keepdim=True)
        y = y / (y.square().mean(dim=1, keepdim=True) + layer.eps).sqrt() * layer.weight[kept]
        return y + layer.bias[kept] if isinstance(layer, nn.LayerNorm) else y

    def scaled(y: Tensor, number: int) -> Tensor:
        if hasattr(block, f"ls{number}"):
            return getattr(block, f"ls{number}")(y)
        gamma = getattr(block, f"gamma_{number}", None)
        return y if gamma is None else y * gamma

    def of_head(part: int, head: int, y: Tensor) -> Tensor:
        if attn.qkv is None:
            layer = (attn.q_proj, attn.k_proj, attn.v_proj)[part]
            head //= attn.q_proj.out_features // layer.out_features  # so many heads in turn read the same one
            return linear(layer, y, list(range(head * size, (head + 1) * size)), every)
        units = list(range(head * size, (head + 1) * size))
        out = linear(attn.qkv, y, [u + part * total * size for u in units], every)
        bias = (getattr(attn, "q_bias", None), None, getattr(attn, "v_bias", None))[part]
        return out if bias is None else out + bias[units]

    every = list(range(x.shape[1]))
    y = x if post_norm else block.norm1(x)
    out = []
    for head in heads:
        q, k, v = (of_head(part, head, y) for part in range(3))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if angles is not None and patches:
            own = (angles[head] if angles.ndim == 3 else angles)[patches]
            first = len(x) - len(patches)
            q, k = (torch.cat([p[:first], turned(p[first:], own, attn.rotate_half)]) for p in (q, k))
        out.append((q @ k.T / size**0.5).softmax(dim=1) @ v)
    units = [u for head in heads for u in range(head * size, (head + 1) * size)]
    y = linear(attn.proj, norm(attn.norm, torch.cat(out, dim=1), units), every, units)
    x = x + (block.norm1(y) if post_norm else scaled(y, 1))

    width = mlp.fc2.in_features
    hidden = list(range(width)) if mlp_width == "full" else share(width)
    dim = share(x.shape[1]) if mlp_width == "coupled" else every
    y = (x if post_norm else block.norm2(x))[:, dim]
    if isinstance(mlp, SwiGLU):
        y = mlp.act(linear(mlp.fc1_g, y, hidden, dim)) * linear(mlp.fc1_x, y, hidden, dim)
    elif hasattr(mlp, "gate_last"):
        first, second = (linear(mlp.fc1, y, [u + half for u in hidden], dim) for half in (0, width))
        y = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        y = mlp.act(linear(mlp.fc1, y, hidden, dim))
    y = linear(mlp.fc2, norm(mlp.norm, y, hidden), dim, hidden)
    change = torch.zeros_like(x)
    change[:, dim] = y
    return x + (block.norm2(change) if post_norm else scaled(change, 2))


# I2 --------------------------------------------------------------------------------------------------------------


@given(models(), st.integers(1, 5), st.tuples(KEEPS, KEEPS, KEEPS), st.integers(0, 2**32))
@settings(max_examples=100)
def test_masked_is_sparse_is_the_definition(
    model: MIAFormer, batch: int, keeps: tuple[float, float, float], seed: int
) -> None:
    images = pictures(model.backbone, batch, seed)
    policy = Fixed(drawn_decisions(model, batch, keeps, seed))
    with torch.no_grad():
        sparse, masked = (model.run(images, policy, execution=e) for e in ("sparse", "masked"))
        assert relative(sparse.logits, masked.logits) < 1e-8
        for name in ("depth", "heads", "tokens", "macs"):
            assert torch.equal(getattr(sparse.trace, name), getattr(masked.trace, name))
        # All rows, where the last block is not trimmed to those that the classifier reads.
        cost = replace(model.cost(), trims_last_block=False)
        start = model.embed(images)
        rows = [model.walk(start, policy, execution, cost)[0] for execution in (Sparse(cost), Masked(cost))]
        wanted = executed_plainly(model, start.tokens, sparse.trace)
        assert relative(rows[0], wanted) < 1e-7  # norms of what hardly varies magnify rounding
        assert relative(rows[1], wanted) < 1e-7


@given(models(), st.integers(1, 5), st.tuples(KEEPS, KEEPS, KEEPS), st.integers(0, 2**32))
@settings(max_examples=40)
def test_gradients_are_the_same_masked_and_sparse(
    model: MIAFormer, batch: int, keeps: tuple[float, float, float], seed: int
) -> None:
    """What is skipped gets none from either."""
    images, cost = pictures(model.backbone, batch, seed), model.cost()
    policy = Fixed(drawn_decisions(model, batch, keeps, seed))
    found = []
    for execution in (Sparse(cost), Masked(cost)):
        model.zero_grad(set_to_none=True)
        x, _ = model.walk(model.embed(images), policy, execution, cost)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        prefix = cost.num_prefix_tokens if cost.trims(cost.depth - 1) else x.shape[1]
        (x * weights)[:, :prefix].sum().backward()
        found.append({name: p.grad for name, p in model.backbone.named_parameters()})
    sparse, masked = found
    for name, gradient in masked.items():
        if gradient is None:
            assert sparse[name] is None, name
            continue
        packed = torch.zeros_like(gradient) if sparse[name] is None else sparse[name]
        torch.testing.assert_close(packed, gradient, rtol=1e-7, atol=1e-9 + 1e-9 * float(gradient.abs().max()))


EMPTY = {
    "every block skipped": (0.0, 0.5, 0.5),
    "every token skipped": (1.0, 0.5, 0.0),
    "every head skipped": (1.0, 0.0, 0.5),
    "everything skipped": (0.0, 0.0, 0.0),
    "everything kept": (1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("structure", ["plain", "no_class_token_avg", "grey_one_head_no_pos", "distilled"])
@pytest.mark.parametrize("token_scope", ["progressive", "per_block"])
def test_empty_decisions_are_executed_as_defined(case: str, structure: str, token_scope: str) -> None:
    model = miaformer.adapt(vit(0, **STRUCTURES[structure]), token_scope=token_scope).double().eval()
    images = pictures(model.backbone, 4)
    policy = Fixed(drawn_decisions(model, 4, EMPTY[case], 0))
    sparse, masked = (model.run(images, policy, execution=e) for e in ("sparse", "masked"))
    assert relative(sparse.logits, masked.logits) < 1e-10
    trace = sparse.trace
    if case in ("every block skipped", "everything skipped"):
        assert not trace.depth.any()
        assert not trace.heads.any()
        assert not trace.tokens.any()
        assert trace.macs.tolist() == [model.cost().fixed] * 4
        untouched = model.backbone.forward_head(model.backbone.norm(model.embed(images).tokens))
        assert torch.equal(sparse.logits, untouched)
    elif case == "every token skipped":  # without prefix tokens nothing is left to execute
        assert trace.depth.all() if model.num_prefix_tokens else not trace.depth.any()
        assert not trace.tokens.any()
    elif case == "every head skipped":
        assert torch.equal(trace.heads.sum(dim=2), trace.depth.long())
    else:
        assert relative(sparse.logits, model.backbone(images)) < 1e-10


@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("structure", ["plain", "map_pool", "distilled", "tokens_out"])
def test_an_empty_batch_comes_back_empty(structure: str, execution: Any) -> None:
    model = lively(0, STRUCTURES[structure])
    images = pictures(model.backbone, 2)
    expected = model(images).shape[1:]
    decisions = drawn_decisions(model, 2, (0.5, 0.5, 0.5), 0)
    ways: list[dict[str, Any]] = [
        {},
        {"price": 1.0},
        {"policy": Random(0.5, 0.5, 0.5)},
        {"policy": Fixed(decisions[:0])},
    ]
    if model.num_prefix_tokens:
        ways.append({"policy": ClsAttention(keep=0.5)})
    for arguments in ways:
        for cap in (None, 0.5):
            output = model.run(images[:0], execution=execution, cap=cap, **arguments)
            assert output.logits.shape == (0, *expected)
            assert output.trace.tokens.shape == (0, 4, model.cost().num_patches)
            assert output.trace.macs.shape == output.trace.macs_fraction.shape == (0,)
    assert model(images[:0], price=[]).shape == (0, *expected)
    assert model.forward_features(images[:0]).shape[0] == 0


@pytest.mark.parametrize("mlp_width", WIDTHS)
def test_tokens_once_skipped_stay_skipped_only_if_progressive(mlp_width: Any) -> None:
    for scope in ("progressive", "per_block"):
        model = miaformer.adapt(vit(0), token_scope=scope, mlp_width=mlp_width).eval()
        decisions = drawn_decisions(model, 8, (0.7, 1.0, 0.6), 1)
        trace = model.run(pictures(model.backbone, 8), Fixed(decisions)).trace
        assert torch.equal(trace.depth, decisions.depth)
        if scope == "per_block":
            assert torch.equal(trace.tokens, decisions.tokens & decisions.depth[..., None])
            continue
        for image in range(8):
            left = torch.ones(model.cost().num_patches, dtype=torch.bool)
            for index in range(3):
                if decisions.depth[image, index]:  # a skipped block loses no token
                    left = left & decisions.tokens[image, index]
                    assert torch.equal(trace.tokens[image, index], left)


@pytest.mark.parametrize("structure", ["plain", "no_class_token_avg"])
def test_who_skips_a_block_leaves_only_if_depth_is_nested(structure: str) -> None:
    for choice in ("nested", "any"):
        model = miaformer.adapt(vit(0, depth=5, **STRUCTURES[structure]), depth_choice=choice).eval()
        decisions = drawn_decisions(model, 16, (0.7, 1.0, 0.9), 1)
        trace = model.run(pictures(model.backbone, 16), Fixed(decisions)).trace
        stays = decisions.depth.long().cumprod(dim=1).bool()
        assert torch.equal(trace.depth, stays if choice == "nested" else decisions.depth)
        assert not trace.heads[~trace.depth].any()
        assert not trace.tokens[~trace.depth].any()
        assert (decisions.depth & ~stays).any()


@pytest.mark.parametrize("token_scope", ["progressive", "per_block"])
def test_a_skipped_token_keeps_its_value(token_scope: str) -> None:
    model = lively(1, {"global_pool": "avg"}, token_scope=token_scope, mlp_width="coupled")
    images = pictures(model.backbone, 3)
    decisions = drawn_decisions(model, 3, (0.8, 0.5, 0.5), 2)
    decisions.tokens[..., :4] = False
    start = model.embed(images)
    before = start.tokens.clone()
    for execution in (Sparse(model.cost()), Masked(model.cost())):
        after, _ = model.walk(start, Fixed(decisions), execution, model.cost())
        assert torch.equal(after[:, 1:5], before[:, 1:5])
        assert not torch.equal(after[:, 5:], before[:, 5:])
        assert torch.equal(start.tokens, before), "what was handed in was written to"


def test_features_without_gradients_do_not_write_to_what_was_handed_in(lively_model: MIAFormer) -> None:
    images = pictures(lively_model.backbone, 3)
    copied = images.clone()
    with torch.inference_mode():
        start = lively_model.embed(images)
        before = start.tokens.clone()
        lively_model.walk(start, lively_model.learned(1.0), Sparse(lively_model.cost()), lively_model.cost())
        lively_model(images, price=1.0)
    assert torch.equal(start.tokens, before)
    assert torch.equal(images, copied)


@pytest.mark.parametrize("frozen", [(), ("patch_embed", "cls_token", "pos_embed")])
@pytest.mark.parametrize("config", [{"mlp_width": w, "head_choice": c} for w in WIDTHS for c in ("nested", "subset")])
def test_sparse_and_masked_give_the_same_gradients(config: dict[str, Any], frozen: tuple[str, ...]) -> None:
    model = miaformer.adapt(vit(0, scale_mlp_norm=True, init_values=0.1), **config).double().eval()
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or "-"))
    images = pictures(model.backbone, 4)
    policy = Fixed(drawn_decisions(model, 4, (0.8, 0.6, 0.6), 3))
    gradients = []
    for execution in ("sparse", "masked"):
        model.zero_grad()
        model.run(images, policy, execution=execution).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.backbone.named_parameters() if p.requires_grad})
    assert len(gradients[0]) > 20
    for name, wanted in gradients[1].items():
        found = gradients[0][name]
        assert found is not None, name
        assert (found - wanted).abs().max() <= 1e-8 * wanted.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("mlp_width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_lower_precision_stays_near(dtype: torch.dtype, tolerance: float, mlp_width: Any) -> None:
    """Against double precision, under the same decisions: bfloat16 has 8 bits, and these weights are random."""
    model = miaformer.adapt(vit(0, depth=6), mlp_width=mlp_width).eval()
    policy = Fixed(drawn_decisions(model, 6, (0.8, 0.7, 0.6), 5))
    images = pictures(model.backbone, 6)
    wanted = copy.deepcopy(model).double().run(images.double(), policy).logits
    low = model.to(dtype)
    for execution in ("sparse", "masked"):
        found = low.run(images.to(dtype), policy, execution=execution).logits
        assert found.dtype == dtype
        assert relative(found.double(), wanted) < tolerance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.float().run(images, policy).logits
    assert relative(found.double(), wanted) < 0.05


# I3 --------------------------------------------------------------------------------------------------------------


def varied(trace: Decisions) -> bool:
    """Whether images were decided differently at every grain."""
    grains = (trace.depth, trace.heads, trace.tokens)
    return all(bool((grain != grain[:1]).any()) for grain in grains)


@pytest.mark.parametrize("cap", [None, 0.45])
@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize(
    ("structure", "config"),
    [
        ("plain", {"mlp_width": "coupled"}),
        ("no_class_token_avg", {"head_choice": "subset"}),
        ("distilled", {"token_scope": "per_block", "mlp_width": "full"}),
        ("map_pool", {"token_scope": "per_block", "head_choice": "subset"}),
    ],
)
def test_an_image_is_alone_in_its_batch(
    structure: str, config: dict[str, Any], execution: Any, cap: float | None
) -> None:
    model = lively(3, STRUCTURES[structure], **config)
    images = pictures(model.backbone, 8, seed=1)
    images[5] *= 100  # mates far out of range
    prices = torch.tensor([1.0, 1.0, 0.3, 1.0, 3.0, 1.0, 0.1, 1.0])

    def run(which: list[int]) -> miaformer.Output:
        return model.run(images[which], price=prices[which], execution=execution, cap=cap)

    with torch.no_grad():
        together = run(list(range(8)))
        assert varied(together.trace)
        for which in [*([i] for i in range(8)), [7, 2, 5, 0, 1, 6, 3, 4], [3, 3, 0]]:
            apart = run(which)
            for name in ("depth", "heads", "tokens", "macs", "macs_fraction"):
                assert torch.equal(getattr(apart.trace, name), getattr(together.trace, name)[which]), name
            assert relative(apart.logits, together.logits[which]) < 1e-9


def test_class_attention_is_alone_in_its_batch(lively_model: MIAFormer) -> None:
    images = pictures(lively_model.backbone, 6)
    policy = ClsAttention(keep=0.5, blocks=(1, 3))
    together = lively_model.run(images, policy)
    assert bool((together.trace.tokens != together.trace.tokens[:1]).any())
    for image in range(6):
        alone = lively_model.run(images[image : image + 1], policy)
        assert torch.equal(alone.trace.tokens[0], together.trace.tokens[image])
        assert relative(alone.logits[0], together.logits[image]) < 1e-9


def test_prices_of_one_batch_are_each_images_own(lively_model: MIAFormer) -> None:
    image = pictures(lively_model.backbone, 1, seed=4)
    prices = torch.tensor([1e-3, 0.3, 1.0, 3.0, 300.0])
    together = lively_model.run(image.expand(5, -1, -1, -1), price=prices).trace.macs
    assert together.tolist() == [int(lively_model.run(image, price=float(p)).trace.macs) for p in prices]
    assert together[0] > together[2] > together[4]


@pytest.mark.parametrize("seed", range(3))
def test_lively_models_decide_differently_at_every_grain(seed: int) -> None:
    """What the tests above rest on."""
    for structure in ("plain", "map_pool", "swiglu"):
        model = lively(seed, STRUCTURES[structure])
        trace = model.run(pictures(model.backbone, 16, seed), price=1.0).trace
        assert varied(trace)
        assert 0.2 < float(trace.depth.float().mean()) < 0.98
        assert trace.macs_fraction.std() > 0.02


def test_full_execution_of_a_lively_model_is_the_backbone() -> None:
    model = enliven(miaformer.adapt(vit(2), mlp_width="coupled")).double().eval()
    images = pictures(model.backbone, 3)
    assert relative(model.run(images, Full()).logits, model.backbone(images)) < 1e-10


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep", [1.0, 0.7])  # everything, which the block then reads where it lies, and less
def test_gradients_reach_the_last_block_alone(batch: int, keep: float) -> None:
    """As in fine-tuning the end of a frozen backbone: what a block reads must not be written over."""
    model = lively(0).eval()
    last = f"backbone.blocks.{len(model.backbone.blocks) - 1}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((last, "backbone.norm", "backbone.head")))
    images = pictures(model.backbone, batch)
    found = []
    for execution in ("sparse", "masked"):
        model.zero_grad()
        policy = Random(1.0, keep, keep, seed=1)
        model.run(images, policy, execution=execution).logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith(last) for name in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-9), name


@pytest.mark.parametrize("part", ["", "attn", "mlp"])
def test_hooks_on_parts_of_a_block_do_not_depend_on_what_is_executed(part: str) -> None:
    """Blocks are executed by their parts: hooks on them count nowhere, also where all of a block is executed."""
    model = miaformer.adapt(vit()).eval()
    images = pictures(model.backbone, 2)
    before = model.run(images, policy=Full()).logits
    model.backbone.blocks[0].get_submodule(part).register_forward_hook(lambda module, args, out: 3 * out)
    for execution in ("sparse", "masked"):
        assert relative(model.run(images, policy=Full(), execution=execution).logits, before) < 1e-4  # type: ignore[arg-type]
