"""I1: full decisions reproduce the backbone, whatever timm ViT it is, and the backbone can be had back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GlobalResponseNormMlp, LayerScale2d, Mlp, PatchEmbed
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn
from vits import GRAINS, GROUPED_QUERIES, SMALL, STRUCTURES, pictures, relative, vit

import miaformer
from miaformer import MIAFormer
from miaformer.vit.backbone import apply_orders, build, describe, inverse_orders

REPRODUCED = {**STRUCTURES, "grouped_queries": GROUPED_QUERIES}
CONFIGS = [
    pytest.param({"mlp_width": width, "head_choice": choice}, id=f"{width}-{choice}")
    for width in ("coupled", "hidden", "full")
    for choice in ("nested", "subset")
]


@pytest.mark.parametrize("name", REPRODUCED)
@pytest.mark.parametrize("config", CONFIGS)
def test_full_decisions_reproduce_the_backbone(name: str, config: dict[str, str]) -> None:
    """And so do the features, and the static model within."""
    backbone = vit(1, **REPRODUCED[name])
    images = pictures(backbone, 3)
    with torch.no_grad():
        logits, features = backbone(images), backbone.forward_features(images)
        pooled = backbone.forward_head(features, pre_logits=True)
        both = config == {"mlp_width": "coupled", "head_choice": "nested"}  # the other choices order less, or nothing
        for calibration_images in (None, images) if both else (images,):
            model = miaformer.adapt(
                copy.deepcopy(backbone), calibration_images, **GRAINS.get(name, {}), **config
            ).eval()
            assert relative(model(images), logits) < 1e-4
            assert relative(model.run(images, execution="masked").logits, logits) < 1e-4
            assert relative(model.train()(images), logits) < 1e-4  # no dropout here
            model.eval()
            assert relative(model.forward_features(images), features) < 1e-4
            assert relative(model.forward_head(features), logits) < 1e-4
            assert relative(model.forward_head(features, pre_logits=True), pooled) < 1e-4
            if backbone.num_classes:
                assert relative(model.backbone(images), logits) < 1e-4


@pytest.mark.parametrize("name", REPRODUCED)
def test_to_timm_gives_the_same_weights_back(name: str) -> None:
    backbone = vit(1, **REPRODUCED[name])
    weights = copy.deepcopy(backbone.state_dict())
    images = pictures(backbone, 3)
    logits = backbone(images)
    model = miaformer.adapt(backbone, images, mlp_width="coupled", head_choice="nested", **GRAINS.get(name, {}))
    if name not in ("prr_pool", "grey_one_head_no_pos", *GRAINS):
        changed = model.backbone.blocks[0].attn.proj.weight
        assert not torch.equal(changed, weights["blocks.0.attn.proj.weight"]), "nothing was reordered"
    back = model.to_timm()
    assert type(back) is type(backbone)
    found = back.state_dict()
    assert found.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(found[key], weights[key])] == []
    assert torch.equal(back.eval()(images), logits)
    with torch.no_grad():  # it is a model of its own
        next(back.parameters()).zero_()
    assert not (next(model.backbone.parameters()) == 0).all()


@pytest.mark.parametrize("name", REPRODUCED)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    backbone = vit(1, **REPRODUCED[name])
    images = pictures(backbone, 2)
    model = miaformer.adapt(backbone, mlp_width="coupled", **GRAINS.get(name, {})).eval()
    model.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert loaded.cost() == model.cost()
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    twins = loaded.to_timm().state_dict(), model.to_timm().state_dict()
    assert all(torch.equal(twins[0][key], twins[1][key]) for key in twins[1])


@pytest.mark.parametrize("name", REPRODUCED)
def test_a_description_builds_what_it_was_read_from(name: str) -> None:
    backbone = vit(1, **REPRODUCED[name])
    description = describe(backbone)
    rebuilt = build(description)
    assert describe(rebuilt) == description
    rebuilt.load_state_dict(backbone.state_dict())
    images = pictures(backbone, 2)
    assert torch.equal(rebuilt.eval()(images), backbone(images))


def test_rates_of_dropping_survive_the_description() -> None:
    rates = {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.2,
        "proj_drop_rate": 0.3,
        "attn_drop_rate": 0.4,
        "drop_path_rate": 0.5,
    }
    first, second = vit(0, **rates), build(describe(vit(0, **rates)))

    def dropping(model: nn.Module) -> list[tuple[str, float]]:
        found = [(name, getattr(m, "p", getattr(m, "drop_prob", None))) for name, m in model.named_modules()]
        return [(name, rate) for name, rate in found if rate is not None]

    assert dropping(first) == dropping(second)
    assert {rate for _, rate in dropping(first)} >= set(rates.values())


@pytest.mark.parametrize("name", REPRODUCED)
def test_any_order_of_heads_units_and_channels_gives_the_same_output(name: str) -> None:
    """Within what may be ordered: pooled features keep their channels only where there is no classifier."""
    backbone = vit(2, **REPRODUCED[name]).double()
    images = pictures(backbone, 2)
    logits = backbone(images)
    weights = copy.deepcopy(backbone.state_dict())
    generator = torch.Generator().manual_seed(0)
    depth, heads = len(backbone.blocks), backbone.blocks[0].attn.num_heads
    hidden, channels = backbone.blocks[0].mlp.fc2.in_features, backbone.embed_dim

    def shuffled(count: int) -> torch.Tensor:
        return torch.randperm(count, generator=generator)

    orders = {
        "heads": torch.stack([shuffled(heads) for _ in range(depth)]),
        "hidden": torch.stack([shuffled(hidden) for _ in range(depth)]),
        "channels": torch.arange(channels) if name == "prr_pool" else shuffled(channels),
    }
    apply_orders(backbone, orders)
    expected = logits if backbone.num_classes else logits[..., orders["channels"]]
    assert relative(backbone(images), expected) < 1e-12
    apply_orders(backbone, inverse_orders(orders))
    found = backbone.state_dict()
    assert [key for key in weights if not torch.equal(found[key], weights[key])] == []


@pytest.mark.parametrize("size", [(16, 16), (24, 12), (8, 8)])
def test_dynamic_image_sizes_are_those_of_the_backbone(size: tuple[int, int]) -> None:
    backbone = vit(1, dynamic_img_size=True)
    images = pictures(backbone, 2, size=size)
    logits = backbone(images)
    output = miaformer.adapt(backbone, mlp_width="coupled").eval().run(images)
    assert relative(output.logits, logits) < 1e-4
    assert output.trace.tokens.shape == (2, 3, size[0] * size[1] // 16)


def test_dynamic_padding_is_that_of_the_backbone() -> None:
    backbone = vit(1, dynamic_img_size=True, dynamic_img_pad=True)
    images = pictures(backbone, 2, size=(15, 10))
    logits = backbone(images)
    output = miaformer.adapt(backbone).eval().run(images)
    assert relative(output.logits, logits) < 1e-4
    assert output.trace.tokens.shape == (2, 3, 4 * 3)


def test_pretrained_settings_travel_along(tmp_path: Path) -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    cfg = dict(backbone.pretrained_cfg)
    assert cfg["mean"] == (0.5, 0.5, 0.5)
    model = miaformer.adapt(backbone)
    assert model.to_timm().pretrained_cfg == backbone.pretrained_cfg
    model.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path)
    assert tuple(loaded.pretrained_cfg["mean"]) == cfg["mean"]
    wanted = timm.data.resolve_model_data_config(backbone)
    found = timm.data.resolve_model_data_config(loaded)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()} == wanted


# I7: what cannot be adapted --------------------------------------------------------------------------------------


class ConvolutionalStem(PatchEmbed):
    """A patch embedding that nothing is known about."""


class Narrower(VisionTransformer):
    """A ViT whose forward pass may be anything."""


def changed(change: Callable[[Any], object], **settings: Any) -> VisionTransformer:
    backbone = vit(**settings)
    change(backbone)
    return backbone


UNSUPPORTED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "not a module": (lambda: "deit_small_patch16_224", TypeError, "VisionTransformer.*got str"),
    "a ResNet": (lambda: timm.create_model("resnet10t"), TypeError, "VisionTransformer.*got ResNet"),
    "a subclass": (lambda: Narrower(**SMALL), TypeError, "got Narrower"),
    "parallel scaling": (
        lambda: vit(block_fn=ParallelScalingBlock),
        ValueError,
        "Block 0 .* type ParallelScalingBlock",
    ),
    "parallel things": (lambda: vit(block_fn=ParallelThingsBlock), ValueError, "type ParallelThingsBlock"),
    "parallel diff": (
        lambda: vit(block_fn=DiffParallelScalingBlock, num_heads=2),
        ValueError,
        "DiffParallelScalingBlock",
    ),
    "post norm": (lambda: vit(block_fn=ResPostBlock), ValueError, "Block 0 .* type ResPostBlock.*Supported: Block"),
    "one odd block": (
        lambda: changed(lambda b: b.blocks.__setitem__(2, ResPostBlock(24, 3))),
        ValueError,
        "Block 2 .* type ResPostBlock",
    ),
    "differential attention": (lambda: vit(attn_layer="diff", num_heads=2), ValueError, "attention DiffAttention"),
    "gated attention": (
        lambda: changed(lambda b: setattr(b.blocks[1].attn, "gate", nn.Linear(24, 24))),
        ValueError,
        "Block 1 .* gated attention",
    ),
    "response norm MLP": (
        lambda: changed(lambda b: setattr(b.blocks[0], "mlp", GlobalResponseNormMlp(24, 48))),
        ValueError,
        "MLP GlobalResponseNormMlp",
    ),
    "convolutional MLP": (lambda: vit(mlp_layer=partial(Mlp, use_conv=True)), ValueError, "MLP Mlp"),
    "norm of a shrinking width": (
        lambda: changed(lambda b: setattr(b.blocks[0].mlp, "norm", nn.BatchNorm1d(48))),
        ValueError,
        "norm BatchNorm1d over a width that shrinks",
    ),
    "layer scale": (
        lambda: changed(lambda b: setattr(b.blocks[0], "ls2", LayerScale2d(24))),
        ValueError,
        "layer scale LayerScale2d",
    ),
    "heads that differ": (
        lambda: changed(lambda b: b.blocks.__setitem__(1, Block(24, 4))),
        ValueError,
        "same number of heads",
    ),
    "widths that differ": (
        lambda: changed(lambda b: setattr(b.blocks[1], "mlp", Mlp(24, 40))),
        ValueError,
        "parameters that .* has not, .*: blocks.1.mlp.fc1",
    ),
    "patch embedding": (lambda: vit(embed_layer=ConvolutionalStem), ValueError, "patch embedding is ConvolutionalStem"),
    "heads that share keys, as a grain": (
        lambda: vit(**GROUPED_QUERIES),
        ValueError,
        r"block 0 .* 4 heads share 2 heads of keys .* grains=\('depth', 'tokens'\)",
    ),
    "no blocks": (lambda: vit(depth=0), ValueError, "at least one block"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("head_choice", ["nested", "subset"])
def test_an_unsupported_backbone_is_named_and_left_alone(name: str, head_choice: str) -> None:
    make, error, message = UNSUPPORTED[name]
    backbone = make()
    weights = copy.deepcopy(backbone.state_dict()) if isinstance(backbone, nn.Module) else {}
    with pytest.raises(error, match=message):
        miaformer.adapt(backbone, head_choice=head_choice)  # type: ignore[arg-type]
    if isinstance(backbone, nn.Module):
        assert all(torch.equal(tensor, weights[key]) for key, tensor in backbone.state_dict().items())


def test_the_tanh_form_of_gelu_is_kept(tmp_path: Path) -> None:
    model = miaformer.adapt(vit(0, act_layer=partial(nn.GELU, approximate="tanh"))).double().eval()
    images = pictures(model.backbone, 3).double()
    with torch.no_grad():
        wanted = model.backbone(images)
        model.save_pretrained(tmp_path)
        saved = MIAFormer.from_pretrained(tmp_path).to(images).eval()
        assert relative(saved.backbone(images), wanted) < 1e-6
        assert relative(model.to_timm()(images), wanted) < 1e-6


def test_what_a_description_would_not_say_is_refused() -> None:
    """Silently it would be another function once it is saved and loaded."""
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act is LeakyReLU\(negative_slope=0\.5\)"):
        miaformer.adapt(vit(0, act_layer=partial(nn.LeakyReLU, negative_slope=0.5)))
    backbone = vit(0)
    backbone.norm.eps = 0.1
    with pytest.raises(ValueError, match=r"norm is LayerNorm\(.*eps=0\.1"):
        miaformer.adapt(backbone)
