"""Baselines that take no research cost what they say, are what they claim to be, and are timed on their best engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import load_script
from tiny_training import IMAGES, Quadrants, tiny_model
from torch import Tensor, nn
from vits import STRUCTURES, vit

from miaformer import MIAFormer, adapt
from miaformer.data import Batch, Batches, build_transform
from miaformer.engine.cost import count_macs
from miaformer.evaluation import calibrate
from miaformer.evaluation.intervals import resampled
from miaformer.export.engines import EngineUnavailableError
from miaformer.export.engines.onnx_runtime import OnnxModule
from miaformer.lab.comparison import METHODS, summarise
from miaformer.lab.comparison.engines import at_budgets, of_module
from miaformer.lab.comparison.equal_accuracy import at_equal_accuracy
from miaformer.lab.comparison.given import copy_backbone, is_copied
from miaformer.lab.comparison.method import Entry, Question
from miaformer.lab.comparison.resolution import Looked
from miaformer.lab.comparison.results import Difficulty, Point
from miaformer.lab.comparison.timing import BATCHES, mean_times, read_times, time_entries
from miaformer.model.early_exit import exit_blocks, macs_of_leaving
from miaformer.model.policy import EarlyExit, Full, Look, RandomSizes, TwoLooks
from miaformer.training.progress import DURATIONS, core_seconds

GRID = {"img_size": 32, "patch_size": 4}  # 8 x 8 patches, as 112 pixels in patches of 14 are


def images_of(model: MIAFormer, count: int) -> Tensor:
    shape = (count, 3, *model.image_size())
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def question_of(model: MIAFormer) -> Question:
    return Question((0.5,), list, model.cost().backbone, 0)


# lower resolution


@pytest.mark.parametrize("structure", ["plain", "registers", "layer_scale_qk_norm", "dynamic_size"])
def test_macs_of_every_size_are_those_counted(structure: str) -> None:
    model = adapt(vit(**{**STRUCTURES[structure], **GRID}), mlp_width="hidden").eval()
    entries = METHODS["resolution-free"].entries(model, question_of(model))
    images = images_of(model, 1)
    assert len(entries) == 5
    for entry in entries:
        small = entry.read(images)
        entry.classify(small)  # which counts what is fixed, once
        spent: list[Tensor] = []
        counted = count_macs(lambda e=entry, s=small, kept=spent: kept.append(e.classify(s)[1]))  # type: ignore[misc]
        assert float(spent[0]) * model.cost().backbone == pytest.approx(counted, rel=1e-6)
    onnx = entry.engines["onnx"]  # of the last
    assert torch.allclose(onnx(small), entry.run(small), atol=1e-4)


def test_two_looks_at_images_of_two_sizes_spend_their_budget(trained: MIAFormer) -> None:
    data, budgets = Quadrants("calibration"), (0.4, 0.6, 0.9)
    batches = Batches(data, build_transform(trained.data_config()), IMAGES, seed=0, shuffle=False, drop_last=False)
    question = Question(budgets, lambda: batches.epoch(0), trained.cost().backbone, 0)
    entries = METHODS["resolution-looks"].entries(adapt(trained.to_timm(), grains=("resolution",)).eval(), question)
    images = next(iter(batches.epoch(0))).images
    model = adapt(trained.to_timm(), grains=("resolution",)).eval()
    whole = model.cost().backbone
    macs = [model.cost(size).everything / whole for size in model.image_sizes()]
    leaving = [macs_of_leaving(model.cost(size), exit_blocks(model.cost().depth)) for size in model.image_sizes()]
    first = [*macs, *(one / whole for places in leaving for one in places)]
    possible = torch.tensor([*first, *(one + other for one in first for other in macs if other > one)])
    assert [entry.budget for entry in entries] == list(budgets)
    for entry in entries:
        logits, spent = entry.classify(entry.read(images))
        assert entry.sharing is not None
        assert torch.allclose(entry.sharing(images)[0], logits, atol=1e-4)
        assert logits.shape == (IMAGES, 4)
        assert ((spent[:, None] - possible).abs().amin(dim=1) < 1e-4).all()
        assert float(spent.mean()) <= (entry.budget or 0) + 1 / IMAGES


def test_sizes_run_once_for_all_budgets_give_what_running_gives(trained: MIAFormer) -> None:
    model = adapt(trained.to_timm(), grains=("resolution",)).eval()
    first, second = (Look(Full(), (size,)) for size in (model.image_sizes()[-1], model.image_sizes()[0]))
    looked = Looked(model)
    with torch.inference_mode():
        for images in (images_of(model, 9), images_of(model, 12)):
            middle = model.run(images, policy=first).logits.softmax(dim=1).amax(dim=1).median().reshape(1)
            leaves = replace(first, policy=EarlyExit(model.backbone, 0.9 * float(middle)))
            drawn = RandomSizes(Full(), (*first.sizes, *second.sizes), 0.5)
            twice = TwoLooks(first, second, middle), TwoLooks(leaves, second, 0.9 * middle)
            for policy in (first, second, leaves, drawn, *twice):
                wanted = model.run(images, policy=replace(policy))  # which starts from the seed, as the other
                logits, spent = looked.by(policy)(images)
                assert torch.allclose(logits, wanted.logits, atol=1e-5)
                assert torch.allclose(spent, wanted.trace.macs_fraction)


# smaller models


def test_twelve_blocks_become_four_six_and_eight() -> None:
    for name, kept in (("shallow-0.35", 4), ("shallow-0.5", 6), ("shallow-0.7", 8)):
        backbone = vit(depth=12)
        first = list(backbone.blocks)
        assert list(METHODS[name].reshape(backbone).blocks) == first[:kept]


# 8-bit integers


@pytest.fixture(scope="module")
def trained() -> MIAFormer:
    """Knows the bright quadrant of an image; wide enough that its weights are most of a file."""
    model = tiny_model({"embed_dim": 96}).train()
    data, transform = Quadrants("train"), build_transform(model.data_config())
    (batch,) = Batches(data, transform, IMAGES, seed=0, shuffle=False, drop_last=False).epoch(0)
    optimizer = torch.optim.AdamW(model.backbone.parameters(), lr=1e-3)
    for _ in range(30):
        loss = nn.functional.cross_entropy(model.backbone(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_int8_agrees_with_float32_and_is_smaller(
    trained: MIAFormer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from miaformer.export import dense

    sizes: list[int] = []
    quantize = dense.quantize_int8

    def weighed(source: Path, path: Path) -> None:
        quantize(source, path)
        sizes.extend((source.stat().st_size, path.stat().st_size))

    monkeypatch.setattr(dense, "quantize_int8", weighed)
    images = torch.stack([build_transform(trained.data_config())(image) for image, _ in Quadrants("test")])
    (entry,) = METHODS["int8"].entries(trained, question_of(trained))
    with torch.inference_mode():
        logits, spent = entry.classify(images)
        exact = trained.backbone(images)
    assert not torch.allclose(logits, exact, atol=1e-5)
    assert (logits.argmax(dim=1) == exact.argmax(dim=1)).double().mean() > 0.9
    assert len(exact.argmax(dim=1).unique()) > 1
    assert (spent == 1).all()
    assert entry.run(images[:1]).shape == (1, 4), "whatever the batch"
    assert sizes[1] < 0.5 * sizes[0]


# time


def test_each_is_timed_on_its_fastest_engine(trained: MIAFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real time here: an engine takes as long as its name says."""
    ms = {"timm": 8.0, "onnx": 6.0, "eager": 9.0, "quick": 3.0}
    said: list[str] = []

    def engine(name: str) -> Any:
        return lambda images: said.append(name) or trained.backbone(images)

    def only_one(images: Tensor) -> Any:
        if len(images) > 1:
            raise EngineUnavailableError("one image at a time")
        return engine("quick")(images)

    monkeypatch.setattr("miaformer.evaluation.timing._milliseconds", lambda call: (call(), ms[said[-1]])[1])
    both = {"timm": engine("timm"), "onnx": engine("onnx")}
    monkeypatch.setattr("miaformer.lab.comparison.timing.of_module", lambda module, shape: both)
    eager = engine("eager")
    others = {"quick": only_one, "wrong": lambda images: -trained.backbone(images)}
    entry = Entry("x", None, lambda images: (eager(images), torch.ones(len(images))), engines=others)
    (times,) = time_entries(trained.backbone, [entry], images_of(trained, 64))
    assert {size: (one["engine"], one["dense_engine"]) for size, one in times.items()} == {
        "1": ("quick", "onnx"),
        "32": ("eager", "onnx"),
    }
    assert (times["1"]["ms"], times["1"]["dense_ms"], times["1"]["fraction"]) == (3.0, 6.0, 0.5)
    assert times["1"]["batches"] == BATCHES[1]
    assert times["32"]["engines"] == {"eager": 9.0}
    assert times["32"]["left_out"] == {"quick": "one image at a time", "wrong": "it gives other logits"}
    assert list(time_entries(trained.backbone, [entry], images_of(trained, 8))[0]) == ["1"], "no full batch of 32"


def test_engines_answer_alike_or_say_why_not(trained: MIAFormer) -> None:
    pytest.importorskip("onnxruntime")
    images = images_of(trained, 3)
    with torch.inference_mode():
        for call in of_module(trained.backbone, (3, 16, 16)).values():
            torch.testing.assert_close(call(images), trained.backbone(images), atol=1e-4, rtol=1e-3)
    with pytest.raises(EngineUnavailableError, match="batches of 1"):
        OnnxModule(lambda path: None, batch=1)(images)
    with pytest.raises(EngineUnavailableError, match="cannot be written"):
        OnnxModule(_fails)(images)


def test_the_learned_policy_is_run_by_onnx_in_batches_too() -> None:
    pytest.importorskip("onnxruntime")
    model = adapt(vit(**GRID), grains=("resolution",)).eval()
    images = images_of(model, 6)
    labels = torch.zeros(6, dtype=torch.int64)
    calibrate(model, [Batch(images, labels, labels)])
    onnx = at_budgets(model)
    assert model.calibration is not None
    for budget in model.calibration.range:
        with torch.inference_mode():
            torch.testing.assert_close(onnx(budget)(images), model(images, budget=budget), atol=1e-4, rtol=1e-4)


def _fails(path: Path) -> None:
    raise RuntimeError("cannot be written")


def test_times_are_read_in_both_forms(tmp_path: Path) -> None:
    assert read_times(tmp_path, 2) == [{}, {}]
    old = {"times": [{"dense_ms": 8.0, "ms": 4.0, "fraction": 0.5}, None], "batch": 64}
    (tmp_path / "timed.json").write_text(json.dumps(old))
    first, second = read_times(tmp_path, 2)
    assert first["64"] == {"dense_ms": 8.0, "ms": 4.0, "fraction": 0.5, "engine": "eager", "dense_engine": "eager"}
    assert second == {}
    one = {"ms": 2.0, "dense_ms": 4.0, "fraction": 0.5, "engine": "onnx", "dense_engine": "timm", "engines": {}}
    (tmp_path / "timed.json").write_text(json.dumps({"times": [{"1": one, "32": one}]}))
    assert read_times(tmp_path, 1) == [{"1": one, "32": one}]
    mean = mean_times([{"1": one}, {"1": {**one, "fraction": 0.7}}, {}])
    assert mean["1"]["fraction"] == pytest.approx(0.6)
    assert mean["1"]["engine"] == "onnx"


# equal accuracy


def a_point(name: str, correct: np.ndarray, macs: float, budget: float | None = 0.5) -> Point:
    share = [float(correct.mean())]
    return Point(name, budget, correct.astype(float), np.full((1, len(correct)), macs), share, None)


def test_macs_at_one_point_below_dense_and_how_sure_they_are() -> None:
    """Dense is right on 900 of 1,000 images, ours on 880 at 0.4 of the MACs and on 900 at 0.6: a point below is 0.5."""
    rank = np.random.default_rng(0).permutation(1000)
    points = [
        a_point("dense", rank < 900, 1.0, None),
        a_point("learned", rank < 880, 0.4),
        a_point("learned", rank < 900, 0.6),
        a_point("resolution", rank < 850, 0.5, None),
        a_point("resolution", rank < 900, 0.75, None),
        a_point("static", rank < 899, 0.3),
        a_point("no-elastic", rank < 899, 0.2),
        a_point("int8", rank < 880, 1.0, None),
    ]
    found = at_equal_accuracy(points, resampled(1000), 0.01)
    ours = found["methods"]["learned"]
    assert ours["macs_fraction"] == pytest.approx(0.5)
    # The gap of 20 images that decides is a count of 20 draws: its standard deviation is 4.5.
    assert 0.4 <= ours["interval"][0] < 0.47 < 0.52 < ours["interval"][1] < 0.56
    assert ours["reached"] == 1.0
    assert "int8" not in found["methods"], "it saves no MACs and is less accurate"
    best = found["best_baseline"]
    assert best["name"] == "resolution", "neither the same weights without images to decide by, nor an ablation"
    assert best["ratio"] == pytest.approx(0.5 / 0.7)
    low, high = best["ratio_interval"]
    assert low < best["ratio"] < high < 1
    assert best["difference"] == pytest.approx(-0.2)
    table = summarise(points, Difficulty(rank.astype(float), -rank.astype(float)))
    assert table.one_point_below == found
    assert at_equal_accuracy(points[1:], resampled(1000), 0.01) == {}
    worse = [a_point("dense", rank < 860, 1.0, None), *points[1:]]  # than the backbone that it was trained on from
    assert at_equal_accuracy([*worse, a_point("backbone", rank < 900, 1.0, None)], resampled(1000), 0.01)["methods"][
        "learned"
    ]["macs_fraction"] == pytest.approx(0.5)


def test_the_table_of_baselines_says_what_one_point_buys() -> None:
    rank = np.arange(1000)
    time = {"ms": 5.0, "dense_ms": 10.0, "fraction": 0.5, "engine": "onnx", "dense_engine": "onnx"}
    points = [
        a_point("dense", rank < 900, 0.88, None),
        replace(a_point("learned", rank < 895, 0.5), times={"1": time, "32": {**time, "engine": "eager"}}),
        a_point("resolution", rank < 850, 0.39, None),
        replace(a_point("resolution", rank < 899, 0.75, None), times={"1": {**time, "fraction": 0.7}}),
    ]
    found = summarise(points, Difficulty(rank.astype(float), -rank.astype(float)))
    report = {
        **found.__dict__,
        "environment": {"command": "miaformer compare"},
        "adaptation": {"learned": {"minutes": 12.0, "share_of_backbone": 0.25}},
    }
    tables = load_script("benchmarks/tables.py")
    made = {line.split(" | ")[0]: line for line in tables.TABLES["baselines"](report, "x.json").splitlines()}
    assert "| 89.5 |" in made["| **ours**"]
    assert "5.0 (0.50, onnx) | 5.0 (0.50, eager) | 12 |" in made["| **ours**"]
    lower = made["| lower input resolution, fine-tuned"]
    assert "| 85.0 (at 0.39) |" in lower
    assert "5.0 (0.70, onnx)" in lower


# a backbone trained elsewhere


def test_a_given_backbone_is_copied_and_no_other_takes_its_place(tmp_path: Path) -> None:
    given, to = tmp_path / "run" / "model", tmp_path / "out" / "backbone" / "model"
    tiny_model().save_pretrained(given)
    row = {"step": 1, "stage": "backbone", "seconds": 90.0, "processes": 2}
    (given.parent / DURATIONS).write_text(json.dumps(row) + "\n")
    data = Quadrants("train")
    with pytest.raises(ValueError, match="no model directory"):
        is_copied(tmp_path / "nothing", to)
    assert not is_copied(given, to)
    copy_backbone(given, to, data)
    assert is_copied(given, to)
    assert core_seconds(to.parent) == 180.0
    weights = MIAFormer.from_pretrained(to).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in tiny_model().state_dict().items())
    other = tmp_path / "other"
    tiny_model({"depth": 2}).save_pretrained(other)
    with pytest.raises(ValueError, match="holds another backbone"):
        is_copied(other, to)
    named = tiny_model()
    named.label_names = list("badc")
    named.save_pretrained(other)
    copy_backbone(other, tmp_path / "renamed", data)  # classes are matched by name
    data.classes = list("abc")
    with pytest.raises(ValueError, match="the model has 4 classes, quadrants/train has 3"):
        copy_backbone(given, tmp_path / "else", data)
