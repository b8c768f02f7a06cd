"""What people do to models around ours: quantise, freeze, transform, make them in inference mode, train in half."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import RECIPE, Quadrants, tiny_model
from torch import nn
from vits import lively, pictures, relative, vit

import miaformer
from miaformer.training import Recipe, Stage, train


def learn(model: miaformer.MIAFormer, recipe: Recipe, out: Path) -> miaformer.MIAFormer:
    return train(model, Quadrants("train"), recipe, out=out, calibration_data=Quadrants("calibration"))


def test_a_quantised_model_runs_or_says_what_it_cannot() -> None:
    adapted = lively(grains=("depth", "tokens")).float().eval()
    images = pictures(adapted.backbone, 4).float()
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(adapted), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        sparse, masked = (quantised.run(images, price=1.0, execution=how) for how in ("sparse", "masked"))
        assert sparse.trace.macs.tolist() == masked.trace.macs.tolist()
        assert relative(sparse.logits, masked.logits) < 0.05  # scales of activations are of the rows that there are
        assert relative(quantised(images), adapted(images)) < 0.2
    with pytest.warns(DeprecationWarning, match="quantization"):
        backbone = torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"no tensor but a .*: adapt it first, quantise then"):
        miaformer.adapt(backbone)


def test_of_a_frozen_backbone_controllers_alone_learn(tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learn(model, RECIPE, tmp_path / "run")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not {name for name in changed if name.startswith("backbone.")}
    assert (tmp_path / "run" / "model" / "calibration.json").exists()
    alone = Recipe(name="alone", data="", model="vit_tiny_patch16_224", stages=(Stage("backbone", epochs=1),))
    with pytest.raises(ValueError, match=r"recipe 'alone' has nothing to train: all its parameters are frozen"):
        learn(model, alone, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_of_a_backbone_frozen_in_part_the_rest_learns(tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.requires_grad_(False)
    model.backbone.head.requires_grad_(True)
    before = copy.deepcopy(model.backbone.state_dict())
    learn(model, RECIPE, tmp_path / "run")
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_what_is_frozen_stays_and_stays_frozen(tmp_path: Path) -> None:
    probed = replace(RECIPE, stages=(Stage("probe", epochs=1), *RECIPE.stages))
    for number, frozen in enumerate(("backbone.head", "controllers", "controllers.1")):
        model = tiny_model()
        part = model.get_submodule(frozen)
        part.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        learn(model, probed, tmp_path / str(number))
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert not {name for name in changed if name.startswith(f"{frozen}.")}
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert next(model.controllers[0].parameters()).requires_grad is (frozen != "controllers")
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="has nothing to train: all its parameters are frozen"):
        learn(model, probed, tmp_path / "none")


def test_what_could_not_be_saved_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    model = tiny_model(grains=("tokens",))
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    model.backbone.blocks[1].mlp.fc2 = nn.Sequential(model.backbone.blocks[1].mlp.fc2)
    for made, named, kind in (
        (model, "fc2 of block 1", "container.Sequential"),
        (quantised, "qkv of block 0", "quantized"),
    ):
        with pytest.raises(ValueError, match=f"{named} cannot be saved or restored: it is .*{kind}.* Merge adapters"):
            learn(made, RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_training_wants_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"is {dtype}: train in float32, model\.float\(\)"):
        learn(tiny_model().to(dtype), RECIPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_made_or_loaded_in_inference_mode_learns(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with torch.inference_mode():
        adapted, loaded = miaformer.adapt(vit()), miaformer.load(tmp_path)
        moved = tiny_model().double().float()
    for model in (adapted, loaded):
        model.train()
        images = pictures(model.backbone, 2).to(next(model.parameters()).dtype)
        model(images).sum().backward()
        assert model.backbone.blocks[0].attn.qkv.weight.grad is not None
    with pytest.raises(ValueError, match=r"inference_mode\(\), and cannot learn: make the model outside"):
        learn(moved, RECIPE, tmp_path / "run")


@pytest.mark.parametrize("how", ["grad of parameters", "grad of images", "vmap", "jvp"])
def test_transforms_of_functions_are_refused_where_decisions_are_made(how: str) -> None:
    model = lively().eval()
    images = pictures(model.backbone, 2)
    parameters = dict(model.named_parameters())

    def loss(state: Any) -> Any:
        return torch.func.functional_call(model, state, (images,)).sum()

    calls = {
        "grad of parameters": lambda: torch.func.grad(loss)(parameters),
        "grad of images": lambda: torch.func.grad(lambda x: model(x, price=1.0).sum())(images),
        "vmap": lambda: torch.func.vmap(lambda x: model(x[None]))(images),
        "jvp": lambda: torch.func.jvp(lambda x: model(x), (images,), (images,)),
    }
    with pytest.raises(ValueError, match=r"torch\.func transforms .* transform model\.backbone"):
        calls[how]()
    assert torch.isfinite(loss(parameters))  # a call with other parameters alone is none
    model.train()  # where nothing is asked for, the backbone, and no decision
    gradients = torch.func.grad(loss)(parameters)
    assert gradients["backbone.head.weight"].abs().sum() > 0


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of more than 60 kB cannot be written, as where a disk is full."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"checkpoint .*step_00000004 cannot be written"):
        learn(tiny_model(), replace(RECIPE, checkpoint_every=4), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written"):
        tiny_model().save_pretrained(tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
