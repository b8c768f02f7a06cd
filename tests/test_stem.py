"""A convolutional stem: patches that overlap, as a patch embedding like timm's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from vits import STRUCTURES, pictures, relative, vit

import miaformer
from miaformer import MIAFormer
from miaformer.engine.cost import count_macs
from miaformer.training import get_recipe, new_backbone
from miaformer.vit.backbone import build, describe
from miaformer.vit.stem import NEIGHBOURHOOD, ConvPatchEmbed


def test_a_patch_sees_its_neighbours_and_no_further() -> None:
    stem = vit(0, img_size=64, **STRUCTURES["conv_stem"]).double().patch_embed
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    stem.proj[1] = stem.proj[4] = stem.proj[7] = torch.nn.Identity()  # whole images meet in these norms alone
    stem(image)[0, 8 * 16 + 8].sum().backward()
    seen = image.grad.abs().sum(dim=(0, 1)).reshape(16, 4, 16, 4).sum(dim=(1, 3)) > 0
    reach = NEIGHBOURHOOD // 2
    assert seen[8 - reach : 9 + reach, 8 - reach : 9 + reach].all()
    assert not seen[: 7 - reach].any()
    assert not seen[10 + reach :].any()


def test_it_is_described_built_saved_and_loaded(tmp_path: Path) -> None:
    backbone = vit(0, **STRUCTURES["conv_stem"])
    description = describe(backbone)
    assert description["stem_channels"] == [6, 8]
    assert describe(build(description)) == description
    model = miaformer.adapt(backbone, mlp_width="coupled").eval()  # channels change their order
    images = pictures(backbone, 3)
    assert relative(model(images), backbone(images)) < 1e-5
    model.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images), model(images))
    assert relative(loaded.to_timm()(images), backbone(images)) < 1e-5


def test_its_macs_are_counted() -> None:
    backbone = vit(0, **STRUCTURES["conv_stem"])
    products = 8 * 8 * 6 * 27 + 4 * 4 * (8 * 6 * 9 + 8 * NEIGHBOURHOOD**2 + 24 * 8)
    model = miaformer.adapt(backbone)
    assert model.cost().embed_macs == products == count_macs(lambda: backbone.patch_embed(pictures(backbone, 1)))


def test_a_recipe_asks_for_one() -> None:
    recipe = get_recipe("cifar10-small")
    backbone = new_backbone(recipe, 10, 0)
    assert describe(backbone)["stem_channels"] == list(recipe.conv_stem)
    assert 0.6e6 < sum(p.numel() for p in backbone.parameters()) < 1.2e6


def test_channels_must_make_the_patch_size() -> None:
    with pytest.raises(ValueError, match=r"stem_channels=\(6,\) make patches of 2, patch_size is \(16, 16\)"):
        timm.create_model("vit_tiny_patch16_224", embed_layer=partial(ConvPatchEmbed, stem_channels=(6,)))
