"""I6: saved and loaded, a model decides and answers the same. I7: bad input gets one clear error."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from vits import STRUCTURES, enliven, lively, pictures, relative, vit

import miaformer
from miaformer import MIAFormer
from miaformer.model.budget import Calibration
from miaformer.model.policy import Full

CALIBRATION = Calibration((0.1, 1.0, 10.0), (0.8, 0.5, 0.2), num_images=7, data="made up")


def calibrated(structure: str = "plain", seed: int = 0, **config: Any) -> MIAFormer:
    """A lively model in single precision, with a table."""
    model = lively(seed, STRUCTURES[structure], **config).float()
    model.calibration = CALIBRATION
    return model


# I6 --------------------------------------------------------------------------------------------------------------

AGAIN = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
import miaformer
for directory in map(Path, sys.argv[1:]):
    model = miaformer.MIAFormer.from_pretrained(directory)
    images = load_file(directory.with_suffix(".images"))["images"]
    output = model.run(images, budget=0.4)
    trace = {name: getattr(output.trace, name) for name in ("depth", "heads", "tokens", "macs")}
    default = model(images)
    save_file({"logits": output.logits, "default": default, **trace}, directory.with_suffix(".found"))
"""


def test_a_fresh_process_decides_and_answers_the_same(tmp_path: Path) -> None:
    made = {
        "nested": calibrated(mlp_width="coupled"),
        "subset": calibrated("swiglu_packed", 1, head_choice="subset", token_scope="per_block"),
        "pooled": calibrated("map_pool", 2, mlp_width="full", controller_rank=3, controller_hidden=9),
    }
    for name, model in made.items():
        model.set_price_scale(0.7, 0.2)
        model.save_pretrained(tmp_path / name)
        save_file({"images": pictures(model.backbone, 6)}, tmp_path / f"{name}.images")
    source = Path(miaformer.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", AGAIN, *(str(tmp_path / name) for name in made)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for name, model in made.items():
        images = pictures(model.backbone, 6)
        wanted, found = model.run(images, budget=0.4), load_file(tmp_path / f"{name}.found")
        for part in ("depth", "heads", "tokens", "macs"):
            assert torch.equal(found[part], getattr(wanted.trace, part)), (name, part)
        assert bool((wanted.trace.macs != wanted.trace.macs[0]).any())
        assert torch.equal(found["logits"], wanted.logits)
        assert torch.equal(found["default"], model(images))


def test_a_model_directory_holds_what_it_says_and_no_code(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "calibration.json", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "miaformer"
    assert config["adapt"]["mlp_width"] == "hidden"
    assert json.loads((tmp_path / "calibration.json").read_text())["data"] == "made up"


def test_saving_over_another_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    other = calibrated(mlp_width="coupled")
    other.calibration = None
    other.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(tmp_path)
    assert loaded.calibration is None
    assert loaded.adapt_config == other.adapt_config
    assert not (tmp_path / "calibration.json").exists()


def test_settings_and_table_survive_saving(tmp_path: Path) -> None:
    model = calibrated(mlp_width="full", head_choice="subset", token_scope="per_block", first_token_block=2)
    model.save_pretrained(tmp_path)
    loaded = MIAFormer.from_pretrained(str(tmp_path))
    assert loaded.adapt_config == model.adapt_config
    assert loaded.calibration == CALIBRATION
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "calibration.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tokens_are_decided_from_the_first_block_named_to_the_last() -> None:
    model = lively(0, {"depth": 5}, grains=("tokens",), first_token_block=1, last_token_block=2)
    assert [controller.rank > 0 for controller in model.controllers] == [False, True, True, False, False]
    with pytest.raises(ValueError, match="from block 2 on, up to last_token_block=1: nowhere"):
        miaformer.adapt(vit(0, depth=5), last_token_block=1)
    with pytest.raises(ValueError, match="from block 7 on, up to the last of 5 blocks: nowhere"):
        miaformer.adapt(vit(0, depth=5), first_token_block=7)
    tokens = model.run(pictures(model.backbone, 8), price=1.0).trace.tokens
    assert tokens[:, 0].all()
    assert not tokens[:, 2].all()
    assert torch.equal(tokens[:, 2:3].expand(-1, 3, -1), tokens[:, 2:])


def test_fine_tuned_weights_are_the_ones_saved(tmp_path: Path) -> None:
    model = calibrated()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images = pictures(model.backbone, 4)
    model.train()(images).square().mean().backward()
    optimiser.step()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(MIAFormer.from_pretrained(tmp_path)(images), model(images))
    assert torch.allclose(model.to_timm()(images), model(images), atol=1e-5)


# How it is called ------------------------------------------------------------------------------------------------


def test_a_budget_is_the_price_of_the_table() -> None:
    model = calibrated()
    images = pictures(model.backbone, 6)
    for budget, price in ((0.8, 0.1), (0.5, 1.0), (0.2, 10.0), (1.0, 0.1), (0.195, 10.0)):
        by_budget, by_price = model.run(images, budget=budget), model.run(images, price=price)
        assert torch.equal(by_budget.trace.macs, by_price.trace.macs)
        assert torch.equal(by_budget.logits, by_price.logits)
    assert model.price_of(0.65) == pytest.approx(10**-0.5)  # halfway between budgets is halfway between log-prices


def test_budgets_may_be_each_images_own() -> None:
    model = calibrated()
    images = pictures(model.backbone, 3)
    budgets = [0.2, 0.5, 0.8]
    wanted = [int(model.run(images[i : i + 1], budget=b).trace.macs) for i, b in enumerate(budgets)]
    for given in (budgets, tuple(budgets), torch.tensor(budgets), np.array(budgets)):
        assert model.run(images, budget=given).trace.macs.tolist() == wanted
    for one in (0.5, torch.tensor(0.5), np.float32(0.5), np.float64(0.5)):
        assert torch.equal(model(images, budget=one), model(images, price=1.0))


def test_without_a_budget_everything_is_executed() -> None:
    model = calibrated()
    images = pictures(model.backbone, 4)
    full = model.run(images, Full())
    assert full.trace.tokens.all()
    assert torch.equal(model.run(images).logits, full.logits)
    assert torch.equal(model.run(images).trace.macs, full.trace.macs)
    assert not torch.equal(model.run(images, budget=0.2).trace.macs, full.trace.macs)


def test_files_of_older_versions_may_leave_the_default_budget_open(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in (None, 0.4):
        config["adapt"]["default_budget"] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        if value is None:
            assert MIAFormer.from_pretrained(tmp_path).adapt_config == model.adapt_config
        else:
            with pytest.raises(ValueError, match=r"config\.json .*default_budget=0\.4 .*pass budget=0\.4"):
                MIAFormer.from_pretrained(tmp_path)


def test_an_uncalibrated_model_executes_everything() -> None:
    model = calibrated()
    model.calibration = None
    images = pictures(model.backbone, 4)
    assert model.run(images).trace.tokens.all()
    assert torch.equal(model(images), model.run(images, Full()).logits)


def test_in_training_mode_it_is_the_backbone() -> None:
    """So that any training loop can fine-tune it, with dropout; asked for a budget it is adaptive."""
    model = enliven(miaformer.adapt(vit(0, drop_path_rate=0.5, proj_drop_rate=0.5)))
    images = pictures(model.backbone, 4)
    found = []
    for forward in (model.train(), model.backbone.train()):
        torch.manual_seed(0)
        found.append(forward(images))
    assert torch.equal(*found)
    assert not torch.equal(model(images), found[0])
    found[0].sum().backward()
    assert model.backbone.blocks[0].attn.qkv.weight.grad is not None


def test_features_are_those_that_the_head_reads() -> None:
    for structure in ("plain", "distilled", "map_pool", "avgmax_include_prefix"):
        model = calibrated(structure, mlp_width="coupled").eval()
        images = pictures(model.backbone, 3)
        features = model.forward_features(images, price=1.0)
        cost = model.cost()
        assert features.shape == (3, cost.num_prefix_tokens + cost.num_patches, model.embed_dim)
        assert relative(model.forward_head(features), model(images, price=1.0)) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("through", ["model", "backbone"])
def test_another_classifier_is_saved_and_budgets_stay(name: str, through: str, tmp_path: Path) -> None:
    backbone = timm.create_model(name, img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    model = miaformer.adapt(backbone)
    model.label_names = list("abcde")
    model.calibration = CALIBRATION
    (model if through == "model" else model.backbone).reset_classifier(3)
    model = model.double().eval()
    images = torch.rand(2, 3, 32, 32).double()
    logits = model(images, budget=0.5)
    assert logits.shape == (2, 3)
    model.save_pretrained(tmp_path / "model")
    again = MIAFormer.from_pretrained(tmp_path / "model").double().eval()
    assert torch.allclose(again(images, budget=0.5), logits, atol=1e-6)
    assert again.num_classes == model.to_timm().num_classes == 3
    found = again.get_classifier()
    assert all(head.out_features == 3 for head in (found if isinstance(found, tuple) else (found,)))
    assert again.calibration == CALIBRATION
    assert again.label_names is model.label_names is None
    if through == "model":
        model.reset_classifier(0)
        assert model(images, budget=0.5).shape == (2, 32)


def test_a_classifier_that_cannot_be_is_named_and_changes_nothing() -> None:
    model = lively(1)
    before = model.get_classifier()
    with pytest.raises(ValueError, match="num_classes=-1 must be at least 0"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool='map'"):
        model.reset_classifier(3, "map")
    assert model.get_classifier() is before


def test_a_price_scale_changes_the_unit_of_prices_only() -> None:
    model = calibrated()
    images = pictures(model.backbone, 6)
    low, high = model.price_range()
    before = model.run(images, price=2.0).trace.macs
    model.set_price_scale(0.5, 0.3)
    in_new_units = math.exp((math.log(2.0) - 0.3) / 0.5)
    assert torch.equal(model.run(images, price=in_new_units).trace.macs, before)
    new_low, new_high = model.price_range()
    assert model.run(images, price=new_low).trace.macs.tolist() == model.run(images, price=0.0).trace.macs.tolist()
    assert (low, high) != (new_low, new_high)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"slope=.* must be positive"):
            model.set_price_scale(wrong, 0.0)


def test_the_static_sizes_are_timms() -> None:
    backbone = vit(0, reg_tokens=2)
    model = miaformer.adapt(backbone)
    for name in ("num_classes", "embed_dim", "num_features", "num_prefix_tokens"):
        assert getattr(model, name) == getattr(backbone, name)
    assert model.image_size() == (16, 16)


# I7 --------------------------------------------------------------------------------------------------------------


def with_value(images: torch.Tensor, value: float) -> torch.Tensor:
    images = images.clone()
    images[2, 1, 3, 3] = value
    return images


BAD_IMAGES: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "a list": (lambda x: x.tolist(), TypeError, "images must be a tensor.*got list"),
    "an array": (lambda x: x.numpy(), TypeError, "images must be a tensor.*got ndarray"),
    "nothing": (lambda x: None, TypeError, "images must be a tensor.*got NoneType"),
    "one image": (lambda x: x[0], ValueError, r"shape \(B, 3, H, W\), got \(3, 20, 20\)"),
    "grey images": (lambda x: x[:, :1], ValueError, r"shape \(B, 3, H, W\), got \(4, 1, 20, 20\)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), ValueError, r"shape \(B, 3, H, W\), got \(4, 20, 20, 3\)"),
    "another size": (lambda x: x[..., :16], ValueError, "images are 20 x 16, this backbone takes 20 x 20"),
    "bytes": (lambda x: x.byte(), TypeError, r"floating point, normalised .*, got torch\.uint8"),
    "integers": (lambda x: x.long(), TypeError, r"floating point.*, got torch\.int64"),
    "doubles": (lambda x: x.double(), TypeError, r"images are torch\.float64, the model's weights torch\.float32"),
    "halves": (lambda x: x.half(), TypeError, r"images are torch\.float16, the model's weights torch\.float32"),
    "NaN": (lambda x: with_value(x, float("nan")), ValueError, r"images \[2\] of the batch hold NaN or infinite"),
    "infinity": (lambda x: with_value(x, float("-inf")), ValueError, r"images \[2\] of the batch hold NaN or inf"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(name: str) -> None:
    model = calibrated()
    spoil, error, message = BAD_IMAGES[name]
    images = spoil(pictures(model.backbone, 4))
    for call in (model, model.run, model.forward_features, model.train()):
        with pytest.raises(error, match=message):
            call(images)


def test_images_that_patches_do_not_divide_are_named() -> None:
    model = miaformer.adapt(vit(0, dynamic_img_size=True)).eval()
    with pytest.raises(ValueError, match="images are 18 x 16, not a multiple of the patch size 4 x 4"):
        model(torch.zeros(1, 3, 18, 16))


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "budget and price": ({"budget": 0.5, "price": 1.0}, ValueError, "one of policy, budget and price, not budget and"),
    "policy and budget": ({"policy": Full(), "budget": 0.5}, ValueError, "not policy and budget"),
    "negative price": ({"price": -1.0}, ValueError, r"price=-1\.0 must be at least 0"),
    "NaN price": ({"price": float("nan")}, ValueError, "price=nan must be at least 0"),
    "one negative price": ({"price": [1.0, 1.0, -2.0, 1.0]}, ValueError, r"price=\[.*-2\.0.*\] must be at least 0"),
    "prices of others": (
        {"price": [1.0, 2.0]},
        ValueError,
        r"price=\[1\.0, 2\.0\] must be .* one for each of 4 images",
    ),
    "no price": ({"price": "dear"}, TypeError, "price='dear' must be"),
    "budget above one": ({"budget": 1.2}, ValueError, r"budget=1\.2 must be a fraction"),
    "budget of nothing": ({"budget": 0.0}, ValueError, r"budget=0\.0 must be a fraction"),
    "NaN budget": ({"budget": float("nan")}, ValueError, "budget=nan must be a fraction"),
    "one budget above one": ({"budget": [0.5, 0.5, 7.0, 0.5]}, ValueError, r"budget=7\.0 must be a fraction"),
    "budget below the table": (
        {"budget": 0.1},
        ValueError,
        r"budget=0\.100 is below 0\.200, the least that this model",
    ),
    "budgets of others": ({"budget": [0.5, 0.6]}, ValueError, r"budget=\[0\.5, 0\.6\] .* one for each of 4 images"),
    "no budget": ({"budget": "much"}, TypeError, "budget='much' must be"),
    "cap above one": ({"cap": 2.0}, ValueError, r"cap=2\.0 must be a fraction"),
    "cap of too little": ({"cap": 1e-6}, ValueError, "cap=.* is less than the .* give a larger cap"),
    "execution": ({"execution": "fast"}, ValueError, "execution='fast' must be 'sparse' or 'masked'"),
    "policy": ({"policy": "random"}, TypeError, "policy='random' is not a policy: .*Random"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_are_named(name: str) -> None:
    model = calibrated()
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        model.run(pictures(model.backbone, 4), **arguments)


def test_a_budget_without_calibration_is_named() -> None:
    model = calibrated()
    model.calibration = None
    with pytest.raises(ValueError, match=r"not calibrated, so it knows no budget.*pass price= or policy="):
        model(pictures(model.backbone, 1), budget=0.5)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"mlp_width": "half"}, ValueError, "mlp_width='half' must be one of coupled, hidden, full"),
        ({"token_scope": "once"}, ValueError, "token_scope='once' must be one of progressive, per_block"),
        ({"head_choice": None}, ValueError, "head_choice=None must be one of nested, subset"),
        ({"controller_hidden": 0}, ValueError, "controller_hidden=0 must be an integer of at least 1"),
        ({"controller_rank": 0}, ValueError, "controller_rank=0 must be an integer of at least 1"),
        ({"controller_hidden": 2.5}, ValueError, r"controller_hidden=2\.5 must be an integer"),
        ({"first_token_block": -1}, ValueError, "first_token_block=-1 must be an integer of at least 0"),
        ({"width": "full"}, TypeError, r"adapt\(\) does not know width; settings are grains, .*looks"),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        miaformer.adapt(vit(), **config)


NO_CALIBRATION_IMAGES = [torch.zeros(1, 3, 16), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 16, 16), torch.inf), "x"]


@pytest.mark.parametrize("images", NO_CALIBRATION_IMAGES)
def test_bad_calibration_images_are_named_and_change_nothing(images: Any) -> None:
    backbone = vit()
    before = backbone.blocks[0].attn.qkv.weight.clone()
    with pytest.raises((TypeError, ValueError), match=r"calibration_images (must|are|.*hold)"):
        miaformer.adapt(backbone, images)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, before)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def reweighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")

    return spoil


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def gone(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, "not a model directory: it should hold config.json and model.safetensors"),
    "no config": (gone("config.json"), "config.json is missing: .* is not a model directory"),
    "config of no JSON": (text("config.json", "{mlp_width: full"), "config.json cannot be read as JSON"),
    "an empty config": (text("config.json", ""), "config.json cannot be read as JSON"),
    "config of bytes": (
        lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00") and None,
        "config.json cannot be read",
    ),
    "config of a list": (text("config.json", "[]"), "config.json should hold a JSON object"),
    "another model's config": (text("config.json", '{"architecture": "resnet50"}'), "does not describe a MIA-Former"),
    "a later format": (edited(lambda c: c.update(format=2)), "does not describe a MIA-Former model of format 1"),
    "no backbone": (edited(lambda c: c.pop("backbone")), "config.json lacks 'backbone'"),
    "no settings": (edited(lambda c: c.pop("adapt")), "config.json lacks 'adapt'"),
    "a backbone of text": (edited(lambda c: c.update(backbone="deit")), "config.json .*backbone.* 'deit'"),
    "settings of text": (edited(lambda c: c.update(adapt="full")), "config.json"),
    "a backbone setting missing": (
        edited(lambda c: c["backbone"].pop("global_pool")),
        "config.json lacks 'global_pool'",
    ),
    "an unknown class": (edited(lambda c: c["backbone"].update({"class": "ResNet"})), "config.json .*ResNet"),
    "an unknown layer": (edited(lambda c: c["backbone"].update(act_layer="Elephant")), "config.json .*'Elephant'"),
    "an unknown MLP": (edited(lambda c: c["backbone"].update(mlp_layer="ConvMlp")), "config.json .*ConvMlp"),
    "an unknown backbone setting": (edited(lambda c: c["backbone"].update(colour=3)), "config.json .*colour"),
    "a setting unheard of": (edited(lambda c: c["adapt"].update(colour="red")), "config.json .*colour"),
    "a setting out of range": (edited(lambda c: c["adapt"].update(mlp_width="half")), "config.json .*mlp_width='half'"),
    "a pool that is none": (edited(lambda c: c["backbone"].update(global_pool="sum")), "config.json .*pool"),
    "no weights": (gone("model.safetensors"), "model.safetensors is missing or damaged"),
    "half of the weights": (truncated, "model.safetensors is missing or damaged .*copy or download it again"),
    "empty weights": (text("model.safetensors", ""), "model.safetensors is missing or damaged"),
    "a weight missing": (
        reweighted(lambda w: w.pop("backbone.pos_embed")),
        "model.safetensors does not fit config.json .*pos_embed",
    ),
    "a weight too many": (
        reweighted(lambda w: w.update(extra=torch.zeros(1))),
        "model.safetensors does not fit config.json .*extra",
    ),
    "another size": (
        edited(lambda c: c["backbone"].update(embed_dim=48)),
        "model.safetensors does not fit config.json",
    ),
    "a table of no JSON": (text("calibration.json", "prices"), "calibration.json cannot be read as JSON"),
    "no table": (text("calibration.json", "{}"), "calibration.json is not a calibration table"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    calibrated().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_directory_is_named(name: str, directory: Path, tmp_path: Path) -> None:
    spoil, message = DAMAGE[name]
    shutil.copytree(directory, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=f"(?s)^[^\n]*{message}"):
        MIAFormer.from_pretrained(tmp_path / "model")


def test_a_file_is_no_model_directory(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors is not a model directory"):
        MIAFormer.from_pretrained(directory / "model.safetensors")


def test_a_model_that_was_copied_is_its_own(lively_model: MIAFormer) -> None:
    images = pictures(lively_model.backbone, 3)
    twin = copy.deepcopy(lively_model)
    assert torch.equal(twin(images, price=1.0), lively_model(images, price=1.0))
    with torch.no_grad():
        twin.backbone.head.weight.zero_()
    assert not torch.equal(twin(images, price=1.0), lively_model(images, price=1.0))


@pytest.mark.parametrize("cap", [0.35, [0.3, 0.5, 0.7, 0.25], 0.01 + 0.2])
def test_a_cap_alone_is_spent_where_it_matters(cap: Any) -> None:
    """As a budget, not on the first blocks until it is gone."""
    model = calibrated().eval()
    images = pictures(model.backbone, 4).float()
    alone, both = model.run(images, cap=cap), model.run(images, budget=torch.tensor(cap).clamp(0.2, 0.8), cap=cap)
    assert torch.equal(alone.trace.tokens, both.trace.tokens)
    assert torch.equal(alone.logits, both.logits)
    with pytest.raises(ValueError, match="cap"):
        model.run(images, cap=-0.1)
    with pytest.raises(ValueError, match="cap"):
        model.run(images, cap=float("nan"))


def test_a_model_that_cannot_be_written_whole_leaves_the_one_that_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated().eval()
    images = pictures(model.backbone, 2).float()
    wanted = model(images, budget=0.5)
    model.save_pretrained(tmp_path)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    model.reset_classifier(3)
    model.calibration = None
    monkeypatch.setattr("miaformer.model.saved.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert torch.equal(MIAFormer.from_pretrained(tmp_path).eval()(images, budget=0.5), wanted)


def test_pictures_are_prepared_alike_whether_classes_have_names_or_not() -> None:
    model = miaformer.adapt(vit(0, img_size=224, patch_size=16))
    model.backbone.pretrained_cfg = {}  # built by hand
    before = model.data_config()
    model.label_names = list("abcde")
    assert model.data_config() == before
    assert before["crop_pct"] == 1.0
    assert before["input_size"] == (3, 224, 224)


def test_what_is_adapted_is_of_the_backbones_precision() -> None:
    model = miaformer.adapt(vit(0).bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.to_timm().parameters()} == {torch.bfloat16}


def test_features_in_training_are_the_backbones_with_what_it_drops() -> None:
    model = lively(0, {"drop_path_rate": 0.9}).train()
    images = pictures(model.backbone, 8)
    torch.manual_seed(0)
    found = model.forward_features(images)
    torch.manual_seed(0)
    assert torch.equal(model.forward_head(found), model(images))
    assert not torch.allclose(model.forward_features(images), found)
