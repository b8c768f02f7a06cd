"""A model of transformers is adapted as the timm model of the same function, its names and its pictures included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
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
    "projection_dim": 7,
}
CLASSIFIERS = [name for name in MODELS if "For" in name]
MULTIPLES = {"mlp_ratio": 2}  # DINOv2's MLP, in the place of intermediate_size
WIDTHS = {"intermediate_size": 40}
GATED: dict[str, dict[str, Any]] = {
    "Dinov2": {"use_swiglu_ffn": True},
    "DINOv3": {"use_gated_mlp": True, "hidden_act": "silu"},
}
OF_TWO_TOWERS = ("num_labels", "id2label")  # stand beside the configuration of the tower


def family(name: str) -> str:
    return next(start for start in ("ViT", "DeiT", "Dinov2", "DINOv3", "CLIP", "Siglip") if name.startswith(start))


def hugging(name: str, seed: int = 0, gated: bool = False, **changes: Any) -> Any:
    """A small model of transformers in eval mode, every parameter drawn. gated: if it can be."""
    kind = getattr(transformers, name)
    sizes = MULTIPLES if family(name) == "Dinov2" else WIDTHS
    settings = {**SMALL, **sizes, **(GATED.get(family(name), {}) if gated else {}), **changes}
    if "vision_config" in kind.config_class.sub_configs:
        tower = {key: value for key, value in settings.items() if key not in OF_TWO_TOWERS}
        settings = {"vision_config": tower, **{key: settings[key] for key in OF_TWO_TOWERS if key in settings}}
    return randomise(kind(kind.config_class(**settings)), seed).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(model: Any, images: Tensor, **options: Any) -> Tensor:
    """What a model is for: logits, image embeddings, or else pooled features."""
    with torch.no_grad():
        output = model(images, **options)
    if family(type(model).__name__) in ("ViT", "DeiT") and "logits" not in output:
        return output.last_hidden_state[:, 0]  # the pooler comes after what timm has
    found = next((output[name] for name in ("logits", "image_embeds", "pooler_output") if name in output), None)
    return output.last_hidden_state.mean(dim=1) if found is None else found  # SigLIP without a head


def drawn(model: MIAFormer, batch: int, seed: int = 0) -> Decisions:
    cost, generator = model.cost(), torch.Generator().manual_seed(seed)
    shapes = ((), (cost.num_heads,), (cost.num_patches,))
    return Decisions(*(torch.rand(batch, cost.depth, *shape, generator=generator) < 0.6 for shape in shapes))


# What configurations of a kind may say, beside what all say.
RATES, BOOLEANS = st.sampled_from([0.0, 0.1]), st.booleans()
_OF_MLP = {"intermediate_size": st.integers(3, 50)}
_OF_VIT = {"qkv_bias": BOOLEANS, "hidden_dropout_prob": RATES, "attention_probs_dropout_prob": RATES}
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "ViT": {**_OF_MLP, **_OF_VIT},
    "DeiT": {**_OF_MLP, **_OF_VIT},
    "Dinov2": {
        **_OF_VIT,
        "mlp_ratio": st.integers(1, 4),
        "use_swiglu_ffn": BOOLEANS,
        "num_register_tokens": st.integers(0, 3),  # of those with registers
        "drop_path_rate": RATES,
    },
    "DINOv3": {
        **_OF_MLP,
        **{f"{part}_bias": BOOLEANS for part in ("query", "key", "value", "proj", "mlp")},
        "num_register_tokens": st.integers(0, 3),
        "rope_theta": st.sampled_from([100.0, 10.0]),
        "attention_dropout": RATES,
        "drop_path_rate": RATES,
    },
    "CLIP": {**_OF_MLP, "projection_dim": st.integers(1, 30), "attention_dropout": RATES},
    "Siglip": {**_OF_MLP, "vision_use_head": BOOLEANS, "attention_dropout": RATES},
}
ACTS = st.sampled_from(sorted(ACTIVATIONS)).map(lambda act: {"hidden_act": act})
ACTS_OF_DINOV3 = [{"hidden_act": "gelu"}, *({"hidden_act": act, "use_gated_mlp": True} for act in ("silu", "swish"))]


@st.composite
def models(draw: st.DrawFn) -> Any:
    name = draw(st.sampled_from(sorted(MODELS)))
    heads, patch, kind = draw(st.integers(1, 4)), draw(st.integers(1, 5)), family(name)
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    if kind == "Dinov2":  # it takes other grids than square ones for square ones, and interpolates
        grid = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 4), (4, 1)]))
    beyond = draw(st.integers(0, patch - 1))  # pixels that no patch covers
    image_size = [side * patch + beyond for side in grid]
    channels = 4 * draw(st.integers(1, 2)) if kind == "DINOv3" else draw(st.integers(2, 8))
    return hugging(
        name,
        draw(st.integers(0, 1000)),
        hidden_size=heads * channels,
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 3)),
        image_size=image_size[0] if kind in ("CLIP", "Siglip") else image_size,
        patch_size=patch,
        num_channels=draw(st.sampled_from([3, 1])),
        num_labels=draw(st.integers(int(kind == "Siglip"), 6)),  # transformers' SigLIP cannot be made without labels
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-6, 1e-2])),
        **{setting: draw(values) for setting, values in SETTINGS[kind].items()},
        **draw(st.sampled_from(ACTS_OF_DINOV3) if kind == "DINOv3" else ACTS),
    ).double()


@settings(max_examples=120)
@given(
    model=models(), width=st.sampled_from(["coupled", "hidden", "full"]), choice=st.sampled_from(["nested", "subset"])
)
def test_full_decisions_reproduce_the_transformers_model(model: Any, width: Any, choice: Any) -> None:
    """And leave it as it is."""
    vit = to_timm(model)
    images = noise(2, vit.in_chans, *vit.patch_embed.img_size).double()
    wanted = answer(model, images)
    adapted = miaformer.adapt(model, mlp_width=width, head_choice=choice).eval()
    assert relative(adapted(images), wanted) < 1e-5
    assert relative(adapted.run(images, execution="masked").logits, wanted) < 1e-5
    assert relative(vit(images), wanted) < 1e-5
    assert torch.equal(answer(model, images), wanted)
    name, config = type(model).__name__, model.config
    outputs = config.num_labels if "For" in name else config.projection_dim if "Projection" in name else 0
    assert adapted.num_classes == outputs


@pytest.mark.parametrize(
    "name",
    ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "SiglipVisionModel"],
)
def test_features_are_the_last_hidden_state(name: str) -> None:
    model, images = hugging(name), noise(2, 3, 16, 16)
    adapted = miaformer.adapt(model, mlp_width="coupled").eval()
    with torch.no_grad():
        wanted = model(images).last_hidden_state
    assert relative(adapted.forward_features(images), wanted) < 1e-5


def test_pooled_features_of_dinov2_are_the_class_token_and_the_mean_of_patches() -> None:
    model, images = hugging("Dinov2WithRegistersForImageClassification"), noise(2, 3, 16, 16)
    adapted = miaformer.adapt(model, mlp_width="coupled").eval()
    features = adapted.forward_features(images)
    wanted = torch.cat([features[:, 0], features[:, 5:].mean(dim=1)], dim=1)  # four registers between
    assert relative(adapted.forward_head(features, pre_logits=True), wanted) < 1e-5
    assert adapted.to_timm().head_hidden_size == 48
    adapted.backbone.reset_classifier(7)
    assert adapted.backbone(images).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", ["coupled", "hidden"])
def test_masked_and_sparse_agree_and_macs_are_those_executed(name: str, width: Any) -> None:
    adapted = miaformer.adapt(hugging(name, gated=True), mlp_width=width).double().eval()
    images = noise(6, 3, 16, 16).double()
    policy = Fixed(drawn(adapted, 6))
    with torch.no_grad():
        sparse, masked = (adapted.run(images, policy, execution=how) for how in ("sparse", "masked"))
        assert relative(sparse.logits, masked.logits) < 1e-9
        assert count_macs(lambda: adapted.run(images, policy)) == int(sparse.trace.macs.sum())
    assert len(set(sparse.trace.macs.tolist())) > 1


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    names = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    model, images = hugging(name, gated=True, id2label=names), noise(3, 3, 16, 16)
    adapted = enliven(miaformer.adapt(model, mlp_width="coupled")).eval()
    adapted.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path)
    for run in (lambda m: m.run(images), lambda m: m.run(images, price=1.0)):
        assert torch.equal(run(loaded).logits, run(adapted).logits)
        assert torch.equal(run(loaded).trace.tokens, run(adapted).trace.tokens)
    assert relative(loaded.to_timm()(images), answer(model, images)) < 1e-5
    assert loaded.label_names == (list(names.values()) if name in CLASSIFIERS else None)
    assert json.loads(json.dumps(adapted.data_config())) == json.loads(json.dumps(loaded.data_config()))


def test_placeholders_are_no_class_names() -> None:
    assert miaformer.adapt(hugging("ViTForImageClassification")).label_names is None
    model = hugging("ViTForImageClassification", id2label={label: f"kind {label}" for label in range(5)})
    model.classifier = nn.Linear(24, 3)  # by hand: the names belong to the classifier that was there before
    assert miaformer.adapt(model).label_names is None


@pytest.mark.parametrize("name", [name for name in MODELS if family(name) not in ("CLIP", "Siglip")])
def test_names_of_version_4_are_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files keep version 4's names in version 5 too."""
    from safetensors.torch import load_file

    model, images = hugging(name, gated=True), noise(2, 3, 16, 16)
    wanted = answer(model, images)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() != model.state_dict().keys()
    monkeypatch.setattr(model, "state_dict", lambda: state)
    assert relative(to_timm(model)(images), wanted) < 1e-5


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_towers_are_in_a_module_of_their_own_in_version_4(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = hugging(name), noise(2, 3, 16, 16)
    state = {f"vision_model.{key}": value for key, value in model.state_dict().items()}
    monkeypatch.setattr(model, "state_dict", lambda: state)
    assert relative(to_timm(model)(images), answer(model, images)) < 1e-5


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_the_tower_for_images_is_taken_out_of_a_model_of_two(name: str) -> None:
    kind = getattr(transformers, name)
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 9}
    config = kind.config_class(text_config=text, vision_config={**SMALL, **WIDTHS})
    tower, images = randomise(kind(config).vision_model, 0).eval(), noise(2, 3, 16, 16)
    assert relative(to_timm(tower)(images), answer(tower, images)) < 1e-5


@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "DINOv3ViTModel", "SiglipVisionModel"])
def test_precision_and_mode_are_kept(name: str) -> None:
    model = hugging(name).bfloat16()
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
    for name in ("DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel"):
        assert to_timm(hugging(name, attention_dropout=0.2)).blocks[-1].attn.attn_drop.p == 0.2
    assert to_timm(hugging("DINOv3ViTModel", drop_path_rate=0.3)).blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize(
    "augmentation",
    [
        {"pos_embed_shift": 0.5, "pos_embed_rescale": None},
        {"pos_embed_jitter": 2.0, "pos_embed_rescale": None},
        {"pos_embed_rescale": 4.0},
        {"pos_embed_shift": 0.3, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0},
    ],
)
def test_coordinates_of_dinov3_are_changed_alike_in_training(augmentation: dict[str, Any]) -> None:
    model, images = hugging("DINOv3ViTModel", **augmentation), noise(2, 3, 16, 16)
    still = answer(model, images)
    vit = to_timm(model.train())
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = answer(model, images)
        torch.manual_seed(seed)
        assert relative(vit(images), wanted) < 1e-5
        assert relative(wanted, still) > 1e-3


@pytest.mark.parametrize(
    ("biases", "form", "parameters"),
    [
        ({}, EvaAttention, {"q_bias", "v_bias"}),
        ({"query_bias": False}, EvaAttention, {"q_bias", "v_bias"}),
        ({"query_bias": False, "value_bias": False}, EvaAttention, set()),
        ({"key_bias": True}, AttentionRope, {"qkv.bias"}),
        ({"query_bias": False, "key_bias": True, "value_bias": False}, AttentionRope, {"qkv.bias"}),
    ],
)
def test_dinov3_has_a_key_bias_only_where_the_model_has_one(
    biases: dict[str, bool], form: type[nn.Module], parameters: set[str]
) -> None:
    model, images = hugging("DINOv3ViTModel", **biases), noise(2, 3, 16, 16)
    vit = to_timm(model)
    attn = vit.blocks[0].attn
    assert type(attn) is form
    assert {name for name, _ in attn.named_parameters()} == {"qkv.weight", "proj.weight", "proj.bias"} | parameters
    assert relative(vit(images), answer(model, images)) < 1e-5


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 20)])
def test_dinov3_takes_images_of_any_whole_number_of_patches(size: tuple[int, int]) -> None:
    model, images = hugging("DINOv3ViTModel", num_register_tokens=2, rope_theta=10.0), noise(2, 3, *size)
    adapted = miaformer.adapt(model, mlp_width="coupled").eval()
    assert relative(adapted(images), answer(model, images)) < 1e-5
    assert relative(adapted.run(images, execution="masked").logits, answer(model, images)) < 1e-5


def test_a_projection_becomes_a_head_without_a_bias() -> None:
    vit = to_timm(hugging("CLIPVisionModelWithProjection"))
    assert vit.head.weight.shape == (7, 24)
    assert not vit.head.bias.any()


# Pictures ------------------------------------------------------------------------------------------------------------


def sides(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


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
        ("DINOv3ViTImageProcessor", {"size": {"height": 16, "width": 16}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
        ("SiglipImageProcessor", {"size": {"height": 16, "width": 16}}),
    ],
)
def test_pictures_are_prepared_as_by_the_image_processor(processor: str, settings: dict[str, Any]) -> None:
    prepare = getattr(transformers, processor)(**settings)
    adapted = miaformer.adapt(hugging("ViTForImageClassification"), image_processor=prepare)
    found = build_transform(adapted.data_config())(photo())
    wanted = prepare(photo(), return_tensors="pt").pixel_values[0]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.03 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(24, 24), (12, 12), (12, 20), (18, 23)])  # the last: pixels that no patch covers
def test_an_image_processor_says_the_size_and_positions_are_interpolated_to_it(
    name: str, size: tuple[int, int]
) -> None:
    model, images = hugging(name), noise(2, 3, *size)
    processor = transformers.ViTImageProcessor(size=sides(*size))
    adapted = miaformer.adapt(model, image_processor=processor).eval()
    asked = {} if family(name).lower().startswith("dino") else {"interpolate_pos_encoding": True}
    assert adapted.image_size() == size
    assert relative(adapted(images), answer(model, images, **asked)) < 1e-5


def test_a_processor_of_texts_and_images_is_taken_for_its_image_processor() -> None:
    """What AutoProcessor gives for CLIP and SigLIP."""
    both = SimpleNamespace(image_processor=transformers.SiglipImageProcessor(size=sides(24, 24)))
    assert miaformer.adapt(hugging("SiglipVisionModel"), image_processor=both).image_size() == (24, 24)


@pytest.mark.parametrize(
    ("name", "processor", "settings"),
    [
        ("ViTForImageClassification", "ViTImageProcessor", {}),
        ("DINOv3ViTModel", "DINOv3ViTImageProcessor", {}),
        ("CLIPVisionModel", "CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": sides(16, 16)}),
        ("SiglipVisionModel", "SiglipImageProcessor", {}),
    ],
)
def test_without_an_image_processor_pictures_are_prepared_as_for_published_models(
    name: str, processor: str, settings: dict[str, Any]
) -> None:
    published = getattr(transformers, processor)(**{"size": sides(16, 16), **settings})
    found, wanted = (miaformer.adapt(hugging(name), image_processor=p).data_config() for p in (None, published))
    for told in ("input_size", "interpolation", "crop_mode", "crop_pct"):
        assert found[told] == wanted[told]
    for told in ("mean", "std"):
        assert found[told] == pytest.approx(wanted[told])


@pytest.mark.parametrize("name", ["DeiTModel", "Dinov2ForImageClassification"])
def test_published_deits_and_dinov2s_are_for_the_colours_of_imagenet(name: str) -> None:
    """Unlike the defaults of their image processors."""
    assert miaformer.adapt(hugging(name)).data_config()["mean"] == pytest.approx((0.485, 0.456, 0.406))


# The rest of the way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Dinov2WithRegistersForImageClassification", "DINOv3ViTModel", "CLIPVisionModel", "SiglipVisionModel"]
)
def test_a_converted_model_is_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from miaformer.export import export_onnx, open_session, run_session

    adapted = enliven(miaformer.adapt(hugging(name, num_hidden_layers=2))).eval()
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


def bare(name: str) -> Any:
    """A model of a class, and nothing else."""
    kind = getattr(transformers, name)
    return kind.__new__(kind)


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
            lambda: {"backbone": hugging("DINOv3ViTModel", hidden_act="relu")},
            ValueError,
            "hidden_act='relu' and use_gated_mlp=False; timm's Eva has 'gelu'",
        ),
        (
            lambda: {"backbone": hugging("DINOv3ViTModel", use_gated_mlp=True)},
            ValueError,
            "hidden_act='gelu' and use_gated_mlp=True; .* 'silu' in gated ones",
        ),
        (
            lambda: {"backbone": transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL))},
            TypeError,
            "does not know transformers' ViTForMaskedImageModeling; it takes ViTModel, ",
        ),
        (lambda: {"backbone": bare("CLIPModel")}, TypeError, "give the latter, model.vision_model, or load CLIPV"),
        (lambda: {"backbone": bare("SiglipModel")}, TypeError, "give the latter, model.vision_model"),
        (lambda: {"backbone": bare("Siglip2Model")}, TypeError, "NaFlex.*give its vision_model"),
        (lambda: {"backbone": bare("Siglip2VisionModel")}, TypeError, "NaFlex.*give its vision_model"),
        (lambda: {"backbone": bare("Siglip2ForImageClassification")}, TypeError, "NaFlex.*give its vision_model"),
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
