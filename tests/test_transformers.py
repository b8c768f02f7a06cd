"""A model of transformers is adapted as the timm ViT of the same function, its names and its pictures included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from vits import enliven, randomise, relative

import miaformer
from miaformer import Decisions, MIAFormer
from miaformer.data import build_transform
from miaformer.engine.cost import count_macs
from miaformer.model.policy import Fixed
from miaformer.vit.from_transformers import ACTIVATIONS, MODELS, to_timm

transformers = pytest.importorskip("transformers", minversion="5.24")

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
CLASSIFIERS = [name for name in MODELS if "For" in name]
MULTIPLES = {"mlp_ratio": 2}  # DINOv2's MLP, in the place of intermediate_size
WIDTHS = {"intermediate_size": 40}


def hugging(name: str, seed: int = 0, **changes: Any) -> Any:
    """A small model of transformers in eval mode, every parameter drawn."""
    kind = getattr(transformers, name)
    more = MULTIPLES if name.startswith("Dinov2") else WIDTHS
    return randomise(kind(kind.config_class(**{**SMALL, **more, **changes})), seed).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(model: Any, images: Tensor, **options: Any) -> Tensor:
    """Logits, or the class token of a model without a classifier."""
    with torch.no_grad():
        output = model(images, **options)
    return output.logits if "logits" in output else output.last_hidden_state[:, 0]


def drawn(model: MIAFormer, batch: int, seed: int = 0) -> Decisions:
    cost, generator = model.cost(), torch.Generator().manual_seed(seed)
    shapes = ((), (cost.num_heads,), (cost.num_patches,))
    return Decisions(*(torch.rand(batch, cost.depth, *shape, generator=generator) < 0.6 for shape in shapes))


@st.composite
def models(draw: st.DrawFn) -> Any:
    name = draw(st.sampled_from(sorted(MODELS)))
    heads, patch, dinov2 = draw(st.integers(1, 4)), draw(st.integers(1, 5)), name.startswith("Dinov2")
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    if dinov2:  # it takes other grids than square ones for square ones, and interpolates
        grid = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 4), (4, 1)]))
    beyond = draw(st.integers(0, patch - 1))  # pixels that no patch covers
    sizes = {"mlp_ratio": draw(st.integers(1, 4))} if dinov2 else {"intermediate_size": draw(st.integers(3, 50))}
    if dinov2:
        sizes |= {"use_swiglu_ffn": draw(st.booleans()), "drop_path_rate": draw(st.sampled_from([0.0, 0.2]))}
    if "Registers" in name:
        sizes["num_register_tokens"] = draw(st.integers(0, 3))
    return hugging(
        name,
        draw(st.integers(0, 1000)),
        **sizes,
        hidden_size=heads * draw(st.integers(2, 8)),
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        image_size=[side * patch + beyond for side in grid],
        patch_size=patch,
        num_channels=draw(st.sampled_from([3, 1])),
        num_labels=draw(st.integers(0, 6)),
        qkv_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(sorted(ACTIVATIONS))),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        hidden_dropout_prob=draw(st.sampled_from([0.0, 0.1])),
        attention_probs_dropout_prob=draw(st.sampled_from([0.0, 0.1])),
    )


@settings(max_examples=80)
@given(
    model=models(), width=st.sampled_from(["coupled", "hidden", "full"]), choice=st.sampled_from(["nested", "subset"])
)
def test_full_decisions_reproduce_the_transformers_model(model: Any, width: Any, choice: Any) -> None:
    """And leave it as it is."""
    images = noise(2, model.config.num_channels, *model.config.image_size)
    wanted = answer(model, images)
    adapted = miaformer.adapt(model, mlp_width=width, head_choice=choice).eval()
    assert relative(adapted(images), wanted) < 1e-4
    assert relative(adapted.run(images, execution="masked").logits, wanted) < 1e-4
    assert relative(to_timm(model)(images), wanted) < 1e-4
    assert torch.equal(answer(model, images), wanted)
    assert adapted.num_classes == (model.config.num_labels if "For" in type(model).__name__ else 0)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_features_are_the_last_hidden_state(name: str) -> None:
    model, images = hugging(name), noise(2, 3, 16, 16)
    adapted = miaformer.adapt(model, mlp_width="coupled").eval()
    with torch.no_grad():
        wanted = model(images).last_hidden_state
    assert relative(adapted.forward_features(images), wanted) < 1e-4


def test_pooled_features_of_dinov2_are_the_class_token_and_the_mean_of_patches() -> None:
    model, images = hugging("Dinov2WithRegistersForImageClassification"), noise(2, 3, 16, 16)
    adapted = miaformer.adapt(model, mlp_width="coupled").eval()
    features = adapted.forward_features(images)
    wanted = torch.cat([features[:, 0], features[:, 5:].mean(dim=1)], dim=1)  # four registers between
    assert relative(adapted.forward_head(features, pre_logits=True), wanted) < 1e-5
    assert adapted.to_timm().head_hidden_size == 48
    adapted.backbone.reset_classifier(7)
    assert adapted.backbone(images).shape == (2, 7)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("width", ["coupled", "hidden"])
def test_masked_and_sparse_agree_and_macs_are_those_executed(name: str, width: Any) -> None:
    adapted = miaformer.adapt(hugging(name, use_swiglu_ffn=True), mlp_width=width).double().eval()
    images = noise(6, 3, 16, 16).double()
    policy = Fixed(drawn(adapted, 6))
    with torch.no_grad():
        sparse, masked = (adapted.run(images, policy, execution=how) for how in ("sparse", "masked"))
        assert relative(sparse.logits, masked.logits) < 1e-9
        assert count_macs(lambda: adapted.run(images, policy)) == int(sparse.trace.macs.sum())
    assert len(set(sparse.trace.macs.tolist())) > 1


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, images = hugging(name, id2label={0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}), noise(3, 3, 16, 16)
    adapted = enliven(miaformer.adapt(model, mlp_width="coupled")).eval()
    adapted.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path)
    for run in (lambda m: m.run(images), lambda m: m.run(images, price=1.0)):
        assert torch.equal(run(loaded).logits, run(adapted).logits)
        assert torch.equal(run(loaded).trace.tokens, run(adapted).trace.tokens)
    assert relative(loaded.to_timm()(images), answer(model, images)) < 1e-4
    assert loaded.label_names == ["ant", "bee", "cat", "dog", "eel"]
    assert json.loads(json.dumps(adapted.data_config())) == json.loads(json.dumps(loaded.data_config()))


def test_placeholders_are_no_class_names() -> None:
    assert miaformer.adapt(hugging("ViTForImageClassification")).label_names is None
    model = hugging("ViTForImageClassification", id2label={label: f"kind {label}" for label in range(5)})
    model.classifier = nn.Linear(24, 3)  # by hand: the names belong to the classifier that was there before
    assert miaformer.adapt(model).label_names is None


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_names_of_version_4_are_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files keep version 4's names in version 5 too."""
    from safetensors.torch import load_file

    model, images = hugging(name, use_swiglu_ffn=True), noise(2, 3, 16, 16)
    wanted = answer(model, images)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any(".attention.attention.query." in key for key in state)
    monkeypatch.setattr(model, "state_dict", lambda: state)
    assert relative(to_timm(model)(images), wanted) < 1e-4


def test_precision_and_mode_are_kept() -> None:
    model = hugging("Dinov2ForImageClassification").bfloat16()
    vit = to_timm(model)
    assert not vit.training
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.bfloat16}
    assert to_timm(model.train()).training


def test_rates_of_dropping_become_timms() -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    vit = to_timm(hugging("Dinov2ForImageClassification", drop_path_rate=0.3, **rates))
    block = vit.blocks[-1]
    assert (vit.pos_drop.p, block.attn.proj_drop.p, block.attn.attn_drop.p) == (0.1, 0.1, 0.2)
    assert block.drop_path1.drop_prob == pytest.approx(0.3)


# Pictures ------------------------------------------------------------------------------------------------------------


def photo(width: int = 90, height: int = 60) -> Image.Image:
    """Smooth, so that an image processor and timm, whose filters round differently, agree on it."""
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_normalize": False}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "do_rescale": False}),
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5}),
        ("DeiTImageProcessor", {"size": {"height": 24, "width": 24}, "crop_size": {"height": 16, "width": 16}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    ],
)
def test_pictures_are_prepared_as_by_the_image_processor(processor: str, settings: dict[str, Any]) -> None:
    prepare = getattr(transformers, processor)(**settings)
    adapted = miaformer.adapt(hugging("ViTForImageClassification"), image_processor=prepare)
    found = build_transform(adapted.data_config())(photo())
    wanted = prepare(photo(), return_tensors="pt").pixel_values[0]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.03 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("side", [24, 12])
def test_an_image_processor_says_the_size_and_positions_are_interpolated_to_it(name: str, side: int) -> None:
    model, images = hugging(name), noise(2, 3, side, side)
    processor = transformers.ViTImageProcessor(size={"height": side, "width": side})
    adapted = miaformer.adapt(model, image_processor=processor).eval()
    asked = {} if name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    assert adapted.image_size() == (side, side)
    assert relative(adapted(images), answer(model, images, **asked)) < 1e-4


def test_without_an_image_processor_pictures_are_prepared_as_for_published_models() -> None:
    found = miaformer.adapt(hugging("ViTForImageClassification")).data_config()
    assert (found["mean"], found["std"], found["input_size"]) == ((0.5,) * 3, (0.5,) * 3, (3, 16, 16))
    found = miaformer.adapt(hugging("Dinov2ForImageClassification")).data_config()
    assert found["mean"] == pytest.approx((0.485, 0.456, 0.406))


# The rest of the way -------------------------------------------------------------------------------------------------


def test_a_converted_dinov2_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from miaformer.export import export_onnx, open_session, run_session

    adapted = enliven(miaformer.adapt(hugging("Dinov2WithRegistersForImageClassification", num_hidden_layers=2))).eval()
    export_onnx(adapted, tmp_path / "model.onnx", price=1.0)
    session = open_session(tmp_path / "model.onnx", 1)
    for image in noise(3, 3, 16, 16).split(1):
        with torch.inference_mode():
            wanted = adapted.run(image, price=1.0)
        found = run_session(session, image.numpy())
        assert relative(torch.from_numpy(found["logits"]), wanted.logits) < 1e-4
        assert found["macs_fraction"][0] == pytest.approx(wanted.trace.macs_fraction.item(), abs=1e-6)


def test_importing_miaformer_does_not_import_transformers() -> None:
    code = "import sys, miaformer; miaformer.adapt; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Changed(transformers.ViTForImageClassification):
    """A model whose forward pass may be anything."""


def hand_made(**settings: Any) -> Any:
    """An image processor that says what it is told to."""
    processor = transformers.ViTImageProcessor()
    processor.to_dict = lambda: settings
    return processor


def grown() -> Any:
    model = hugging("ViTForImageClassification")
    model.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 5))
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: {"backbone": hugging("ViTForImageClassification", hidden_act="laplace")},
            ValueError,
            "hidden_act='laplace'; adapt.* knows gelu, ",
        ),
        (
            lambda: {"backbone": hugging("ViTModel", hidden_size=25)},
            ValueError,
            "hidden_size=25, num_attention_heads=3",
        ),
        (lambda: {"backbone": hugging("ViTModel", head_dim=4)}, ValueError, "head_dim=4"),
        (
            lambda: {"backbone": transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL))},
            TypeError,
            "does not know transformers' ViTForMaskedImageModeling; it takes ViTModel, ",
        ),
        (lambda: {"backbone": Changed(transformers.ViTConfig(**SMALL))}, TypeError, "got Changed"),
        (lambda: {"backbone": grown()}, ValueError, "that a timm ViT of its settings has not: head.0.bias"),
        (
            lambda: {"backbone": hugging("ViTModel"), "image_processor": "google/vit-base-patch16-224"},
            TypeError,
            "image_processor is a str; give .*AutoImageProcessor",
        ),
        (
            lambda: {"backbone": hugging("ViTModel"), "image_processor": hand_made(size={"longest_edge": 9})},
            ValueError,
            "no size that is known before: size={'longest_edge': 9}",
        ),
        (
            lambda: {
                "backbone": hugging("ViTModel", image_size=[8, 16]),
                "image_processor": transformers.ViTImageProcessor(size={"height": 20, "width": 20}),
            },
            ValueError,
            "cannot interpolate its position embeddings, for images of 8 x 16, to images of 20 x 20",
        ),
        (
            lambda: {"backbone": to_timm(hugging("ViTModel")), "image_processor": transformers.ViTImageProcessor()},
            TypeError,
            "image_processor goes with a transformers model",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        miaformer.adapt(**make())


def sides(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


@pytest.mark.parametrize(
    ("processor", "settings", "message"),
    [
        ("ViTImageProcessor", {"size": sides(16, 24)}, None),
        ("DeiTImageProcessor", {"size": sides(24, 36), "crop_size": sides(16, 24)}, None),
        ("DeiTImageProcessor", {"size": sides(24, 24), "crop_size": sides(16, 24)}, "as timm's transforms do not"),
        ("DeiTImageProcessor", {"size": sides(24, 30), "crop_size": sides(16, 16)}, "as timm's transforms do not"),
        ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": sides(16, 24)}, "transforms do not"),
        ("BitImageProcessor", {"do_resize": False, "crop_size": sides(16, 16)}, "'do_resize': False"),
        ("BitImageProcessor", {"size": {"shortest_edge": 20}, "do_center_crop": False}, "no size that is known before"),
    ],
)  # fmt: skip
def test_pictures_are_the_image_processors_own_or_it_is_refused(
    processor: str, settings: dict[str, Any], message: str | None
) -> None:
    prepare = getattr(transformers, processor)(**settings)
    model = hugging("ViTForImageClassification")
    if message is not None:
        with pytest.raises(ValueError, match=message):
            miaformer.adapt(model, image_processor=prepare)
        return
    transform = build_transform(miaformer.adapt(model, image_processor=prepare).data_config())
    for width, height in ((61, 37), (20, 50), (24, 16), (9, 11)):
        picture = photo(width, height)
        wanted = prepare(picture, return_tensors="pt").pixel_values[0]
        assert (transform(picture) - wanted).abs().max() < 0.03 * (wanted.max() - wanted.min())
