"""Training without labels: features of a teacher as targets, and pictures of any folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import class_folders, run
from safetensors.torch import load_file
from test_resolution import GRID, batches
from vits import pictures, relative, vit

import miaformer
from miaformer import MIAFormer
from miaformer.data import open_data
from miaformer.evaluation import calibrate
from miaformer.model.looks import Looks
from miaformer.training.objective import Features, Step
from miaformer.training.policies import Draws
from miaformer.training.recipes import Recipe, Stage
from miaformer.training.stages import Elastic
from miaformer.training.trainer import frozen

SIZES = Recipe(
    "sizes",
    "",
    "",
    adapt={"grains": ("resolution",)},
    target="features",
    stages=(Stage("resolution", epochs=6, lr=3e-4),),
    batch_size=12,
)
TOKENS = replace(
    SIZES,
    name="tokens",
    adapt={"grains": ("depth", "tokens")},
    target="tokens",
    stages=(
        Stage("elastic", epochs=2, lr=3e-4),
        Stage("supervised", epochs=2, lr=3e-4, controller_lr=1e-2),
        Stage("reinforce", epochs=1, lr=3e-4, controller_lr=1e-3),
    ),
)


def embedding(seed: int = 0, **structure: Any) -> MIAFormer:
    """A model without a classifier that chooses resolutions, not calibrated."""
    return miaformer.adapt(vit(seed, **{**GRID, "num_classes": 0, **structure}), grains=("resolution",)).eval()


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 pictures, in a folder and in folders below it, without classes."""
    root = tmp_path_factory.mktemp("flat")
    labelled = class_folders(root / "labelled", each=12)
    for number, path in enumerate(sorted(labelled.rglob("*.png"))):
        folder = root / "flat" / ("deep/er" if number % 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number}.png")
    return root / "flat"


def trained(recipe: Recipe, data: Path, out: Path, **settings: Any) -> MIAFormer:
    backbone = vit(0, **{**GRID, "num_classes": 0})
    model = miaformer.adapt(backbone, **recipe.adapt)
    return miaformer.train(model, data, recipe, out, device="cpu", show_progress=False, **settings)


# Targets -------------------------------------------------------------------------------------------------------------


def test_features_are_compared_by_direction() -> None:
    torch.manual_seed(0)
    taught, given = torch.randn(4, 7), torch.randn(4, 7)
    targets = Features(taught)
    assert torch.allclose(targets.loss(3 * taught), torch.zeros(4), atol=1e-6)
    assert torch.allclose(targets.loss(-taught), torch.full((4,), 2.0))
    cosine = (F.normalize(taught, dim=1) * F.normalize(given, dim=1)).sum(dim=1)
    assert torch.allclose(targets.loss(given), 1 - cosine, atol=1e-6)
    assert torch.allclose(targets.score(given), cosine.clamp(0, 1), atol=1e-6)


def test_prefix_and_patch_tokens_weigh_the_same() -> None:
    torch.manual_seed(0)
    taught = torch.randn(2, 1 + 9, 5)
    given = taught.clone()
    given[:, 0] *= -1
    assert torch.allclose(Features(taught, 1).loss(given), torch.full((2,), 1.0))
    given = taught.clone()
    given[:, 1:] *= -1
    assert torch.allclose(Features(taught, 1).loss(given), torch.full((2,), 1.0))
    assert torch.allclose(Features(taught, 0).loss(given), torch.full((2,), 1.8))


# Models --------------------------------------------------------------------------------------------------------------


def test_without_a_classifier_looks_by_its_confidence_are_gone() -> None:
    model = miaformer.adapt(vit(0, **GRID), grains=("resolution",)).eval()
    calibrate(model, batches(model, 40))
    assert model.calibration is not None
    model.calibration = replace(model.calibration, looks=(Looks(0.5, 0.25, 1.0, 1.0),))
    images = pictures(model.backbone, 2)
    assert model.run(images, budget=0.5).trace.looks.tolist() == [2, 2]
    model.reset_classifier(0)
    output = model.run(images, budget=0.5)
    assert output.trace.looks.tolist() == [1, 1]
    assert output.logits.shape == (2, model.num_features)


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0])
def test_an_exported_file_gives_the_same_features(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    model = embedding()
    calibrate(model, batches(model, 8))
    images = pictures(model.backbone, 3)
    predictor = miaformer.Predictor(model, engine="onnx")
    eager = miaformer.Predictor(model).embed(images, budget=budget)
    monkeypatch.setattr(MIAFormer, "run", None)  # PyTorch has nothing to do with it
    onnx = predictor.embed(images, budget=budget)
    assert eager.features is not None
    assert onnx.features is not None
    assert relative(onnx.features, eager.features) < 1e-4
    for name in ("looks", "depth", "macs", "grid"):
        assert torch.equal(getattr(onnx.trace, name), getattr(eager.trace, name)), name


# Training ------------------------------------------------------------------------------------------------------------


def test_smaller_images_learn_the_features_of_whole_ones(flat: Path, tmp_path: Path) -> None:
    model = trained(SIZES, flat, tmp_path / "run")
    assert model.num_classes == 0
    assert model.label_names is None
    assert model.calibration is not None
    assert model.calibration.range[0] < 0.3
    dense, untrained = vit(0, **{**GRID, "num_classes": 0}).eval(), embedding()
    transform = miaformer.data.build_transform(model.data_config())
    images = torch.stack([transform(open_data(flat, "test", labelled=False)[i][0]) for i in range(7)])
    budget = model.calibration.fractions[-1]
    untrained.calibration = model.calibration
    with torch.inference_mode():
        wanted = dense(images)
        ours, before = (one.run(images, budget=budget).logits for one in (model, untrained))
    similar, had = (F.cosine_similarity(one, wanted, dim=1).mean() for one in (ours, before))
    assert similar > had + 0.1 * (1 - had)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["similarity"] > rows[0]["similarity"]
    assert "accuracy" not in rows[-1]


def test_of_tokens_all_rows_are_computed() -> None:
    """The last block's patch tokens too, which no class token's answer needs."""
    torch.manual_seed(0)
    model = miaformer.adapt(vit(0, **{**GRID, "num_classes": 0}), grains=("depth", "tokens")).float()
    objective = Elastic(model, Stage("elastic", epochs=1, full_share=1.0), TOKENS, frozen(model.backbone))
    cost = model.cost()
    assert cost.trims_last_block
    drawn = Draws.of_step(torch.Generator().manual_seed(0), 4, cost, 1.0, (0.3, 0.9), slice(0, 4))
    step = Step(drawn, drawn, torch.zeros(4), torch.zeros(4), (0.0, 1.0), 1.0)
    outcome = objective(pictures(model.backbone, 4), torch.zeros(4), step)
    assert float(outcome.loss.detach()) < 1e-5
    assert float(outcome.score.min()) > 1 - 1e-5


def test_labels_are_not_read(flat: Path, tmp_path: Path) -> None:
    """The same pictures by the same names, in other folders: the same weights."""
    other = tmp_path / "other"
    shutil.copytree(flat, other)
    short = replace(SIZES, stages=(replace(SIZES.stages[0], epochs=1),))
    data = [open_data(root, "train", labelled=False) for root in (flat, other)]
    data[1].labels = np.arange(len(data[1])) % 5
    data[1].classes = list("abcde")
    held = open_data(flat, "calibration", labelled=False)
    weights = []
    for number, images in enumerate(data):
        trained(short, images, tmp_path / str(number), calibration_data=held)  # type: ignore[arg-type]
        weights.append(load_file(tmp_path / str(number) / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_all_tokens_are_learned_under_controllers(flat: Path, tmp_path: Path) -> None:
    model = trained(TOKENS, flat, tmp_path / "run")
    assert model.calibration is not None
    images = pictures(model.backbone, 3)
    with torch.inference_mode():
        tokens = model.forward_features(images, budget=max(0.6, model.calibration.range[0]))
    assert tokens.shape == (3, model.num_prefix_tokens + 64, model.embed_dim)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"elastic", "supervised", "reinforce"}
    assert rows[-1]["similarity_full"] > 0.9, "executing everything stays what it was"


def test_a_model_with_a_classifier_learns_its_own_answers(flat: Path, tmp_path: Path) -> None:
    model = miaformer.adapt(vit(0, **GRID), grains=("resolution",))
    names = [f"class{number}" for number in range(model.num_classes)]
    model.label_names = names
    head = model.backbone.head.weight.clone()
    recipe = replace(SIZES, stages=(replace(SIZES.stages[0], epochs=1),))
    miaformer.train(model, flat, recipe, tmp_path / "run", device="cpu", show_progress=False)
    assert model.label_names == names, "the classifier stays"
    assert not torch.equal(model.backbone.head.weight, head), "and learns"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["agreement"] <= 1


def test_resumed_it_has_the_same_teacher(flat: Path, tmp_path: Path) -> None:
    two = replace(SIZES, stages=(replace(SIZES.stages[0], epochs=1), replace(SIZES.stages[0], epochs=1)))
    trained(two, flat, tmp_path / "whole")
    part = tmp_path / "part"
    trained(replace(two, checkpoint_every=2), flat, part)
    for checkpoint in sorted((part / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(part / "model")
    trained(replace(two, checkpoint_every=2), flat, part, resume=True)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (tmp_path / "whole", part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_needs_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="probe, mixup and cutmix are for target='labels'"):
        replace(SIZES, mixup=0.2)
    with pytest.raises(ValueError, match="probe, mixup and cutmix are for target='labels'"):
        replace(SIZES, stages=(Stage("probe", epochs=1), *SIZES.stages))
    with pytest.raises(ValueError, match="other tokens in each size"):
        replace(SIZES, target="tokens")
    with pytest.raises(ValueError, match="target='all' must be one of labels, features, tokens"):
        replace(SIZES, target="all")  # type: ignore[arg-type]


def test_from_the_command_line(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with a classifier gives a model without one; its pictures are embedded, not classified."""
    backbone = vit(0, img_size=32, patch_size=8)
    torch.save(backbone.state_dict(), tmp_path / "mine.pth")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0}
    start = ("--model", "vit_tiny_patch16_224", "--weights", tmp_path / "mine.pth", "--set", f"model_args={args}")
    quick = ("--set", "batch_size=12", "--epochs-scale", 0.4, "--device", "cpu")
    out = tmp_path / "run"
    status, said, failed = run(capsys, "train", "--recipe", "features", *start, "--data", flat, "--out", out, *quick)
    assert status == 0, failed
    assert "labels not read" in said
    assert "similarity" in said
    status, _, failed = run(capsys, "embed", out / "model", flat, "--budget", 0.5, "--out", tmp_path / "out.npz")
    assert status == 0, failed
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["embedding"].shape == (72, 24)
    status, _, failed = run(capsys, "predict", out / "model", flat, "--out", tmp_path / "out.csv")
    assert status == 2
    assert "no classifier" in failed


# Pictures without labels ---------------------------------------------------------------------------------------------


def test_any_folder_is_divided(flat: Path) -> None:
    with pytest.raises(ValueError, match="class folders"):
        open_data(flat / "deep" / "er", "train")
    parts = {split: open_data(flat, split, labelled=False) for split in ("train", "calibration", "test")}
    found = [data.whole.paths[index] for data in parts.values() for index in data.indices]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(flat.rglob("*.png"))
    assert [len(data) for data in parts.values()] == [58, 7, 7]


def test_what_has_labels_is_divided_as_with_them(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "photos", each=20) / "train"
    for split in ("train", "calibration", "test"):
        one, other = open_data(root, split), open_data(root, split, labelled=False)
        assert [one.whole.paths[i] for i in one.indices] == [other.whole.paths[i] for i in other.indices]  # type: ignore[attr-defined]


def test_folders_of_splits_need_no_classes(flat: Path, tmp_path: Path) -> None:
    shutil.copytree(flat, tmp_path / "data" / "train")
    shutil.copytree(flat / "deep", tmp_path / "data" / "val")
    assert len(open_data(tmp_path / "data", "test", labelled=False)) == 48
    assert len(open_data(tmp_path / "data", "train", labelled=False)) == 65


def test_a_table_needs_no_labels(flat: Path, tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(flat.rglob("*.png"))]
    pq.write_table(pa.table({"image": rows}), tmp_path / "pictures.parquet")
    with pytest.raises(ValueError, match="no label column"):
        open_data(tmp_path / "pictures.parquet", "train")
    data = open_data(tmp_path / "pictures.parquet", "train", labelled=False)
    assert len(data) == 58
    assert data[0][0].size == (20, 20)
