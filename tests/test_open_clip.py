"""Vision towers of open_clip that are timm models: adapted in place, the model encodes as before, or for less."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("open_clip")

from open_clip.model import CLIP, CustomTextCLIP
from vits import enliven, pictures, relative

import miaformer

TOWERS = {  # what open_clip's own configurations say of these towers
    "vit_pe_core_tiny_patch16_384": {"timm_pool": "map", "timm_proj": None},
    "vit_base_patch16_siglip_224": {"timm_pool": "map", "timm_proj": "none"},
    "eva02_base_patch16_clip_224": {"timm_pool": "token", "timm_proj": None},
}
TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}


def clip_with(tower: str, width: int) -> Any:
    size = int(tower.rpartition("_")[2])
    torch.manual_seed(0)
    return CustomTextCLIP(width, {"timm_model_name": tower, "image_size": size, **TOWERS[tower]}, TEXT).eval()


@pytest.mark.parametrize(
    ("tower", "width"),
    [
        ("vit_pe_core_tiny_patch16_384", 512),
        pytest.param("vit_base_patch16_siglip_224", 768, marks=pytest.mark.slow),
        pytest.param("eva02_base_patch16_clip_224", 512, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_a_tower_is_adapted_in_place(tower: str, width: int) -> None:
    clip = clip_with(tower, width)
    images = pictures(clip.visual.trunk, 2)
    wanted = clip.encode_image(images, normalize=True)
    assert wanted.shape == (2, width)
    clip.visual.trunk = enliven(miaformer.adapt(clip.visual.trunk)).eval()
    assert relative(clip.encode_image(images, normalize=True), wanted) < 1e-4

    trunk = clip.visual.trunk
    output = trunk.run(images, price=1.0)
    assert output.trace.macs_fraction.max() < 1
    trunk.forward = partial(trunk.forward, price=1.0)
    cheaper = clip.encode_image(images)
    assert torch.equal(cheaper, clip.visual.head(output.logits))
    assert relative(torch.nn.functional.normalize(cheaper, dim=-1), wanted) > 1e-3


def test_what_is_not_the_tower_is_refused_with_what_to_give_instead() -> None:
    clip = clip_with("vit_pe_core_tiny_patch16_384", 512)
    with pytest.raises(TypeError, match=r"got CustomTextCLIP\. It is open_clip's: give its timm model, visual\.trunk$"):
        miaformer.adapt(clip)
    with pytest.raises(TypeError, match=r"got TimmModel\. It is open_clip's: give its timm model, trunk$"):
        miaformer.adapt(clip.visual)
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32}
    for own in (CLIP(16, vision, TEXT), CLIP(16, vision, TEXT).visual):
        with pytest.raises(
            TypeError,
            match=r"got .* It is open_clip's own: load it from transformers instead, as CLIPVisionModelWithProj",
        ):
            miaformer.adapt(own)
