"""What fine-tuning a pretrained backbone adds to training: a probe, rates that decay by layer, blocks that stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from test_training import interrupt_at, metrics
from tiny_training import RECIPE, SIZES, STEPS, Quadrants, run, tiny_model
from torch import nn

from miaformer import adapt
from miaformer.cli import build_parser
from miaformer.data import Batches, build_transform
from miaformer.lab.comparison import Comparison
from miaformer.lab.comparison.method import adaptation_epochs
from miaformer.training import Interrupted, Stage, get_recipe
from miaformer.training.optimizer import stage_optimizer
from miaformer.training.probe import PENALTY, classifiers, fit

PROBE = Stage("probe", epochs=1)
BACKBONE = Stage("backbone", epochs=STEPS / 3, lr=1e-3)


def test_a_fit_is_the_minimum_of_the_penalised_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    features = 3 + 5 * torch.randn(200, 6, generator=generator)
    labels = (features[:, 0] + torch.randn(200, generator=generator) > 3).long() + 2 * (features[:, 1] > 3).long()
    layer = nn.Linear(6, 4)
    loss, accuracy = fit(layer, features, labels)
    assert accuracy == pytest.approx(float((layer(features).argmax(dim=1) == labels).float().mean()))
    std = features.std(dim=0, correction=0)
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    value = nn.functional.cross_entropy(features @ weight.T + bias, labels) + PENALTY * (weight * std).square().sum()
    assert float(value.detach()) == pytest.approx(loss, rel=1e-4)
    value.backward()
    assert weight.grad is not None
    assert float((weight.grad / std).abs().max()) < 1e-3


def test_a_probe_changes_the_classifier_alone_and_beats_chance(tmp_path: Path) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    after = run(tmp_path / "run", replace(RECIPE, stages=(PROBE,)), model).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.head.weight", "backbone.head.bias"}
    row = metrics(tmp_path / "run")[-1]
    assert row["stage"] == "probe"
    assert row["accuracy"] > 0.7


def test_a_probe_fits_both_classifiers_of_a_distilled_vit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapt(timm.create_model("deit_tiny_distilled_patch16_224", **SIZES))
    run(tmp_path / "run", replace(RECIPE, stages=(PROBE,)), model)
    data = Quadrants("train")
    transform = build_transform(model.data_config())
    batch = next(iter(Batches(data, transform, 48, seed=0, shuffle=False, drop_last=False).epoch(0)))
    with torch.no_grad():
        x = model.backbone.forward_features(batch.images)
        for token, head in ((0, model.backbone.head), (1, model.backbone.head_dist)):
            assert (head(x[:, token]).argmax(dim=1) == batch.labels).float().mean() > 0.7


def test_a_backbone_without_classes_cannot_be_probed() -> None:
    with pytest.raises(ValueError, match=r"classifier is a Identity.*linear"):
        classifiers(tiny_model({"num_classes": 0}).backbone)


def test_resumed_after_a_probe_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, stages=(PROBE, BACKBONE))
    whole = run(tmp_path / "whole", recipe)
    with monkeypatch.context() as patched:
        interrupt_at(3 + 2, patched)  # three steps of the probe
        with pytest.raises(Interrupted, match="step 5"):
            run(tmp_path / "parts", recipe)
    parts = run(tmp_path / "parts", recipe, resume=True)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_ctrl_c_in_a_probe_leaves_a_run_to_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, stages=(PROBE, BACKBONE))
    whole = run(tmp_path / "whole", recipe)
    with monkeypatch.context() as patched:
        interrupt_at(2, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", recipe)
    parts = run(tmp_path / "parts", recipe, resume=True)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())


def test_learning_rates_decay_from_the_classifier_down() -> None:
    model, stage = tiny_model(), replace(BACKBONE, layer_decay=0.5)
    rates = {}
    for group in stage_optimizer(model, stage, RECIPE, deciders=()).param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"] * group["lr_scale"]
    backbone = model.backbone
    assert rates[id(backbone.head.weight)] == stage.lr
    by_block = [rates[id(block.mlp.fc1.weight)] for block in backbone.blocks]
    assert by_block == [stage.lr * 0.5**layers for layers in (3, 2, 1)]
    assert rates[id(backbone.patch_embed.proj.weight)] == stage.lr * 0.5**4
    assert len(rates) == sum(1 for _ in backbone.parameters())


def test_what_its_owner_froze_stays_frozen(tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.blocks[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    after = run(tmp_path / "run", replace(RECIPE, stages=(BACKBONE,)), model).state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "backbone.blocks.0.mlp.fc1.weight" in changed
    assert not [name for name in changed if name.startswith("backbone.blocks.1.")]


def test_a_decay_that_would_let_nothing_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_decay=0"):
        Stage("backbone", epochs=1, lr=1e-3, layer_decay=0)


def test_a_comparison_trains_its_shared_backbone_with_the_probe(tmp_path: Path) -> None:
    comparison = Comparison(get_recipe("finetune"), "data", tmp_path, (0.5,))
    assert [stage.kind for stage in comparison._backbone_recipe.stages] == ["probe", "backbone"]
    assert adaptation_epochs(comparison.recipe) == pytest.approx(2.4)


def test_the_command_line_takes_every_stage_of_the_recipe() -> None:
    for stage in get_recipe("finetune").stages:
        build_parser().parse_args(["train", "--recipe", "finetune", "--out", "x", "--stages", stage.kind])
