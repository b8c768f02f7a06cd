"""Nested choices keep what matters most."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from vits import GROUPED_QUERIES, STRUCTURES, pictures, vit

import miaformer
from miaformer import Decisions
from miaformer.model.policy import Fixed
from miaformer.vit.importance import identity_orders, importance_orders


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_orders_are_permutations(name: str, calibrated: bool) -> None:
    backbone = vit(0, **STRUCTURES[name])
    orders = importance_orders(backbone, pictures(backbone, 2) if calibrated else None)
    identity = identity_orders(backbone)
    assert orders.keys() == identity.keys()
    for part, order in orders.items():
        assert torch.equal(order.sort(dim=-1).values, identity[part])


@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_that_share_keys_stay_where_they_are(calibrated: bool) -> None:
    """Those of other blocks, and the units of all, do not."""
    backbone = vit(0, **GROUPED_QUERIES)
    orders = importance_orders(backbone, pictures(backbone, 2) if calibrated else None)
    identity = identity_orders(backbone)
    stay = [block.attn.num_kv_heads < block.attn.num_heads for block in backbone.blocks]
    assert [torch.equal(*heads) for heads in zip(orders["heads"], identity["heads"], strict=True)] == stay
    assert not any(torch.equal(*units) for units in zip(orders["hidden"], identity["hidden"], strict=True))


def weakened(backbone: VisionTransformer, factor: float) -> tuple[dict[str, Tensor], VisionTransformer]:
    """The backbone with known heads, units and channels made weak, in an order drawn; and that order, weakest last."""
    generator = torch.Generator().manual_seed(7)
    attn, mlp = backbone.blocks[0].attn, backbone.blocks[0].mlp
    depth, hidden, size = len(backbone.blocks), mlp.fc2.in_features, attn.head_dim

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    orders = {
        "heads": torch.stack([order(attn.num_heads) for _ in range(depth)]),
        "hidden": torch.stack([order(hidden) for _ in range(depth)]),
        "channels": order(backbone.embed_dim),
    }
    with torch.no_grad():
        for index, block in enumerate(backbone.blocks):
            for place, head in enumerate(orders["heads"][index].tolist()):
                block.attn.proj.weight[:, head * size : (head + 1) * size].mul_(factor**place)
            for place, unit in enumerate(orders["hidden"][index].tolist()):
                block.mlp.fc2.weight[:, unit].mul_(factor ** (place / 4))
    return orders, backbone


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["plain", "swiglu", "swiglu_packed", "scale_norms_layer", "uneven_groups"])
def test_what_is_weak_comes_last(name: str, calibrated: bool) -> None:
    wanted, backbone = weakened(vit(3, **STRUCTURES[name]), factor=0.01)
    found = importance_orders(backbone, pictures(backbone, 4) if calibrated else None)
    assert torch.equal(found["heads"], wanted["heads"])
    last = wanted["hidden"].shape[1] // 4
    for index in range(len(backbone.blocks)):
        weakest = set(wanted["hidden"][index, -last:].tolist())
        assert len(weakest & set(found["hidden"][index, -last:].tolist())) >= 0.6 * last


@pytest.mark.parametrize("calibrated", [False, True])
def test_channels_that_no_mlp_reads_or_writes_come_last(calibrated: bool) -> None:
    backbone = vit(3)
    silent = [1, 5, 23]
    with torch.no_grad():
        for block in backbone.blocks:
            block.mlp.fc1.weight[:, silent] = 0
            block.mlp.fc2.weight[silent] = 0
    orders = importance_orders(backbone, pictures(backbone, 4) if calibrated else None)
    assert set(orders["channels"][-3:].tolist()) == set(silent)


def test_only_images_tell_that_a_unit_is_dead() -> None:
    """Weights as large as any, but never active: what measuring is for."""
    backbone = vit(3)
    with torch.no_grad():
        backbone.blocks[1].mlp.fc1.bias[5] = -100
    images = pictures(backbone, 4)
    assert importance_orders(backbone, images)["hidden"][1, -1] == 5
    assert importance_orders(backbone)["hidden"][1, -1] != 5


def test_measuring_leaves_the_backbone_as_it_was() -> None:
    backbone = vit(3, drop_path_rate=0.5).train()
    weights = copy.deepcopy(backbone.state_dict())
    importance_orders(backbone, pictures(backbone, 4))
    assert backbone.training
    assert all(torch.equal(weights[key], tensor) for key, tensor in backbone.state_dict().items())
    assert not any(module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("mlp_width", ["coupled", "hidden"])
def test_the_first_heads_serve_better_than_the_last(mlp_width: Any) -> None:
    """Of a backbone with heads and units of unequal strength, half the width comes nearer to its output."""
    _, backbone = weakened(vit(3, num_heads=4, mlp_ratio=4.0), factor=0.2)
    images = pictures(backbone, 8)
    logits = backbone(images)

    @torch.no_grad()
    def distance(model: miaformer.MIAFormer, heads: list[int]) -> float:
        half = Decisions.full(1, 3, 4, 16)
        half.heads[..., [j for j in range(4) if j not in heads]] = False
        return float((model.run(images, Fixed(half)).logits - logits).square().mean())

    ordered = miaformer.adapt(copy.deepcopy(backbone), mlp_width=mlp_width).eval()
    # The same order, executed as subsets: the last half of it, and the first.
    reordered = miaformer.adapt(ordered.backbone, mlp_width=mlp_width, head_choice="subset").eval()
    assert distance(ordered, [0, 1]) == pytest.approx(distance(reordered, [0, 1]))
    assert distance(ordered, [0, 1]) < 0.5 * distance(reordered, [2, 3])
