"""A comparison trains what is missing, measures it once, and says what it found with honest intervals."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import tiny_model
from vits import vit

from miaformer.cli import build_parser, main
from miaformer.cli.compare import comparison_table
from miaformer.lab.comparison import ABLATIONS, BASELINES, METHODS, Comparison
from miaformer.lab.comparison.harness import Run, runs
from miaformer.lab.comparison.measuring import margin
from miaformer.lab.comparison.method import Question, adaptation_epochs
from miaformer.lab.comparison.report import comparison_report
from miaformer.lab.comparison.results import Difficulty, Point, read_points, summarise
from miaformer.model.adapt import adapt
from miaformer.model.model import MIAFormer
from miaformer.reports.comparison_plot import plot_comparison
from miaformer.training import RECIPES, Recipe, get_recipe, new_backbone
from miaformer.training.progress import DURATIONS, Duration, core_seconds

BUDGETS = (0.6,)
ALL = ["learned", *BASELINES, "coupled-mlp"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = get_recipe("digits").scaled(0.01)
    args = {**tiny.model_args, "embed_dim": 32, "depth": 4}
    return replace(tiny, name="tiny", model_args=args)


@pytest.fixture(scope="module")
def comparison(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """With baselines and some ablations trained for a few steps and measured."""
    out = tmp_path_factory.mktemp("comparison")
    made = Comparison(recipe, "digits", out, BUDGETS, test_images=128)
    made.train_backbone("cpu")
    for run in runs(ALL, [0]):
        if not made.is_trained(run):
            made.train(run, "cpu")
        made.measure(run, torch.device("cpu"))
    return made


def command(out: Path) -> list[str]:
    return ["compare", "--recipe", "tiny", "--data", "digits", "--out", str(out)]


def test_every_method_is_trained_for_the_same_epochs(recipe: Recipe) -> None:
    adapting = adaptation_epochs(recipe)
    for method in METHODS.values():
        if method.recipe is None:
            continue
        epochs = sum(stage.epochs for stage in method.recipe(recipe).stages)
        assert epochs == pytest.approx(adapting), method.name


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_trained_by_the_recipe_for_pretrained_models(name: str) -> None:
    recipe = METHODS[name].recipe
    if recipe is not None:
        trained = recipe(get_recipe("finetune"))
        early = {stage.early_weight for stage in trained.stages if stage.kind == "resolution"}
        assert early <= {0.4}, "as the recipe itself"
        assert all(stage.early_weight == 0 for stage in trained.stages if stage.kind != "resolution")


def test_a_recipe_without_a_backbone_stage_takes_its_backbone_as_it_comes(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe, stages=recipe.stages[1:]))
    ask = [*command(tmp_path), "--test-images", "64", "--processes", "1"]
    assert main([*ask, "--methods", "merging-free", "--budgets", "0.7"]) == 0
    assert "Fetching the shared backbone" in capsys.readouterr().err
    measured = tmp_path / "merging-free" / "seed0"
    (measured / "timed.json").unlink()
    assert main([*ask, "--methods", "merging-free", "--budgets", "0.7", "--no-times"]) == 0
    assert "Timing" not in capsys.readouterr().err
    assert not (measured / "timed.json").exists()
    assert (tmp_path / "backbone" / "model" / "model.safetensors").exists()


def test_a_given_backbone_is_everybodys(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    static = new_backbone(recipe, 10, seed=5)
    adapt(static).save_pretrained(tmp_path / "given")
    out, report = tmp_path / "out", tmp_path / "report.json"
    given = ["--backbone", str(tmp_path / "given")]
    ask = [*command(out), *given, "--test-images", "64", "--processes", "1", "--device", "cpu"]
    ask += ["--methods", "resolution-free"]
    assert main([*ask, "--no-times", "--json", str(report)]) == 0
    said = capsys.readouterr().err
    assert "Fetching the shared backbone" in said
    assert "Training" not in said
    rows = json.loads(report.read_text())["rows"]
    as_it_was = next(row for row in rows if row["name"] == "backbone")
    rows = [row for row in rows if row["name"] == "resolution-free"]
    sizes = adapt(static, grains=("resolution",)).image_sizes()
    assert len(rows) == len({row["macs_fraction"] for row in rows}) == len(sizes) > 1
    assert {row["budget"] for row in rows} == {None}
    full = max(rows, key=lambda row: row["macs_fraction"])
    comparison = Comparison(recipe, "digits", out, (0.25, 0.35, 0.5, 0.7), 64, tmp_path / "given")
    (batch,) = comparison.batches("test")
    right = (static.eval()(batch.images).argmax(dim=1) == batch.labels).double().mean()
    assert full["accuracy"] == as_it_was["accuracy"] == pytest.approx(float(right))

    timed: list[str] = []
    monkeypatch.setattr(Comparison, "time", lambda self, run, device: timed.append(run.method.name))
    assert main([*ask, "dense", "--only-times"]) == 0
    assert timed == ["resolution-free"], "and nothing is trained that is not there"
    assert main([*ask, "--only-times", "--no-times"]) == 2


def test_what_is_measured_is_not_measured_again(comparison: Comparison) -> None:
    for run in runs(ALL, [0]):
        assert comparison.is_trained(run)
        assert comparison.is_measured(run)
        assert not replace(comparison, budgets=(0.4,)).is_measured(run)


def test_what_is_measured_is_kept_without_its_model(
    comparison: Comparison, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    kept = replace(comparison, out=tmp_path)
    shutil.copytree(comparison.backbone, kept.backbone)
    shutil.copy(comparison.backbone.parent / "recipe.json", kept.backbone.parent)
    run = Run(METHODS["dense"], 0)
    kept.directory(run).mkdir(parents=True)
    for name in ("recipe.json", "measured.json", "measured.npz"):
        shutil.copy(comparison.directory(run) / name, kept.directory(run))
    ask = [*command(tmp_path), "--budgets", "0.6", "--test-images", "128", "--processes", "1", "--device", "cpu"]
    assert main([*ask, "--methods", "dense", "--no-times"]) == 0
    assert "Training" not in capsys.readouterr().err
    assert not (kept.directory(run) / "model").exists()
    monkeypatch.setitem(RECIPES, "tiny", recipe.scaled(2))
    assert main([*ask, "--methods", "dense", "--no-times"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_training_is_timed_over_stops(comparison: Comparison, tmp_path: Path) -> None:
    runs = [comparison.directory(Run(METHODS[name], 0)) for name in ("dense", "merging-free")]
    report = comparison_report(runs, comparison.backbone.parent)
    found = report["core_seconds"]
    assert report["adaptation"] == {
        "dense": {"minutes": found["dense"] / 60, "share_of_backbone": found["dense"] / found["backbone"]}
    }
    assert found.keys() == {"backbone", "dense"}
    assert min(found.values()) > 0
    for rows in (1, 2):
        duration = Duration(tmp_path / DURATIONS, "elastic", processes=3)
        time.sleep(0.05)
        duration.write(step=rows)
        assert 0.15 * rows <= (core_seconds(tmp_path) or 0) < 0.15 * rows + 3
    assert core_seconds(tmp_path / "nowhere") is None


def test_shallow_models_are_the_first_blocks_of_the_backbone(comparison: Comparison) -> None:
    backbone = comparison._static()
    images = torch.rand(3, 3, *backbone.patch_embed.img_size)
    untrained = comparison._untrained(Run(METHODS["shallow-0.5"], 0)).backbone
    assert len(untrained.blocks) == 2
    assert len(backbone.blocks) == 4
    x = backbone._pos_embed(backbone.patch_embed(images))
    expected = backbone.forward_head(backbone.norm(backbone.blocks[1](backbone.blocks[0](x))))
    torch.testing.assert_close(untrained.eval()(images), expected)


@pytest.mark.parametrize("name", ["all-grains", "no-reinforce", "only-tokens", "subset-heads"])
def test_controllers_get_the_epochs_and_rates_of_a_recipe_that_chooses_resolutions(name: str) -> None:
    base, method = get_recipe("finetune"), METHODS[name]
    assert method.recipe is not None
    recipe = method.recipe(base)
    (own,) = (stage for stage in base.stages if stage.kind == "resolution")
    stages = [stage for stage in recipe.stages if stage.kind not in ("probe", "backbone")]
    assert sum(stage.epochs for stage in stages) == pytest.approx(own.epochs)
    assert ("reinforce" in {stage.kind for stage in stages}) == (name != "no-reinforce")
    assert {stage.layer_decay for stage in stages} == {own.layer_decay}
    assert next(stage.lr for stage in stages if stage.kind == "supervised") == pytest.approx(own.lr)
    assert not recipe.chooses_resolution
    model = adapt(vit(), **recipe.adapt)
    assert len(model.controllers) == len(model.backbone.blocks)


def test_an_ablation_for_one_budget_is_asked_for_no_other(recipe: Recipe) -> None:
    made = METHODS["only-0.5"]
    assert made.recipe is not None
    assert made.recipe(recipe).budgets == pytest.approx((0.49, 0.51))
    asked = Question((0.35, 0.7), list, 1, 0)
    assert made.entries(tiny_model(), asked) == []


def test_whatever_is_trained_comes_to_rest(recipe: Recipe) -> None:
    """Nobody's learning rate ends amid its schedule."""
    stages = tuple(replace(s, anneal=1.0 if s.kind in ("backbone", "reinforce") else 0.7) for s in recipe.stages)
    for method in METHODS.values():
        if method.recipe is not None:
            assert method.recipe(replace(recipe, stages=stages)).stages[-1].anneal == 1.0, method.name


def test_reinforce_alone_learns_at_the_rates_of_what_it_stands_for(recipe: Recipe) -> None:
    made = METHODS["only-reinforce"].recipe
    assert made is not None
    (stage,) = made(recipe).stages
    supervised = next(s for s in recipe.stages if s.kind == "supervised")
    assert stage.kind == "reinforce"
    for name in ("lr", "controller_lr", "temperature"):
        assert getattr(stage, name) == getattr(supervised, name)


def test_no_two_ablations_are_the_same(recipe: Recipe) -> None:
    names: dict[str, str] = {}
    for name in ("learned", *ABLATIONS):
        made = METHODS[name].recipe
        assert made is not None
        same = names.setdefault(json.dumps(made(recipe).to_json(), sort_keys=True), name)
        assert same == name


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_builds_what_it_trains(comparison: Comparison, name: str) -> None:
    model = comparison._untrained(Run(METHODS[name], 0)).eval()
    images = torch.rand(2, 3, *model.backbone.patch_embed.img_size)
    with torch.inference_mode():
        out = model.run(images, price=1.0)
    assert torch.isfinite(out.logits).all()
    assert (out.trace.macs_fraction <= 1).all()


def test_seeds_draw_other_controllers(comparison: Comparison) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(5)
        return comparison._untrained(Run(METHODS["learned"], seed)).controllers[0].pooled.weight

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_methods_meet_the_budgets_they_are_asked_for(comparison: Comparison) -> None:
    points, difficulty = read_points([comparison.directory(run) for run in runs(ALL, [0])])
    assert len(difficulty.loss) == len(difficulty.margin) == 128
    names = {point.name for point in points}
    baselines = {name.split("-0")[0] for name in BASELINES}
    assert {"learned", "static", "random"} | baselines | (set(ALL) & set(ABLATIONS)) == names
    for point in points:
        assert point.correct.shape == point.macs_fraction.shape == (128,)
        if point.name == "resolution-looks":  # whole sizes
            assert point.macs_fraction.mean() < point.budget + 0.08
        elif point.budget is not None and point.name not in ("exits", "even-exits", *ABLATIONS):  # of 25 tokens
            assert abs(point.macs_fraction.mean() - point.budget) < 0.08, (point.name, point.budget)


def test_times_are_kept_apart_and_go_with_what_was_measured(comparison: Comparison) -> None:
    run = Run(METHODS["merging"], 0)
    comparison.time(run, torch.device("cpu"))
    assert comparison.is_timed(run)
    timed = comparison.directory(run) / "timed.json"
    times = [time["32"]["fraction"] for time in json.loads(timed.read_text())["times"]]
    points, _ = read_points([comparison.directory(run)])
    assert [point.time_fraction for point in points] == times
    assert times
    assert min(times) > 0
    comparison.measure(run, torch.device("cpu"))  # anew, so what was timed was another
    assert not comparison.is_timed(run)
    assert [point.time_fraction for point in read_points([comparison.directory(run)])[0]] == [None]


def test_a_baseline_is_what_it_was_when_it_is_read_again(comparison: Comparison) -> None:
    run = Run(METHODS["top-tokens"], 0)
    first, second = comparison.model(run), comparison.model(run)
    trained = first.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in second.state_dict().items())
    untrained = comparison._untrained(run).state_dict()
    changed = {name.split(".")[0] for name, value in untrained.items() if not torch.equal(value, trained[name])}
    assert changed == {"backbone", "scorers"}, (
        "what it has of its own learns, and controllers that it does not ask do not"
    )


def test_the_command_shows_what_is_there_and_writes_it(
    comparison: Comparison, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    report, plot, pictures = (tmp_path / name for name in ("report.json", "plot.png", "pictures.png"))
    ask = [*command(comparison.out), "--budgets", "0.6"]
    options = [
        "--test-images",
        "128",
        "--seeds",
        "0",
        "1",
        "--only-measured",
        "--json",
        str(report),
        "--plot",
        str(plot),
        "--pictures",
        str(pictures),
    ]
    assert main([*ask, *options, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "not measured: learned, seed 1" in shown
    written = json.loads(report.read_text())
    assert {row["name"] for row in written["rows"]} >= {"learned", "dense", "merging"}
    assert written["num_images"] == 128
    assert plot.stat().st_size > 10_000
    assert pictures.stat().st_size > 10_000
    assert main([*ask, "--methods", "nothing", "--device", "cpu"]) == 2
    assert "unknown method nothing" in capsys.readouterr().err


def hard(loss: np.ndarray) -> Difficulty:
    return Difficulty(loss, -loss)


def point(name: str, correct: np.ndarray, fraction: float, budget: float | None = 0.5) -> Point:
    return Point(
        name, budget, correct.astype(float), np.full((1, len(correct)), fraction), [float(correct.mean())], None
    )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 100 samples of a known accuracy nine tenths and more are within their interval of 95 %."""
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        correct = rng.random(300) < 0.8
        row = summarise([point("learned", correct, 0.5)], hard(rng.random(300)), seed=trial).rows[0]
        low, high = row["accuracy_interval"]
        inside += low <= 0.8 <= high
    assert 88 <= inside < 100


def test_differences_are_paired() -> None:
    """Two methods that fail on the same images differ by less than two that fail on others."""
    rng = np.random.default_rng(1)
    ours = rng.random(1000) < 0.8
    same, other = ours.copy(), rng.random(1000) < 0.8
    same[np.flatnonzero(ours)[:20]] = False
    table = summarise(
        [point("learned", ours, 0.5), point("static", same, 0.5), point("random", other, 0.5)], hard(rng.random(1000))
    )
    width = {d["over"]: d["interval"][1] - d["interval"][0] for d in table.differences}
    assert width["static"] < 0.4 * width["random"]
    assert next(d for d in table.differences if d["over"] == "static")["difference"] == pytest.approx(0.02)


def test_a_static_model_stands_against_ours_at_no_more_macs() -> None:
    correct = np.arange(1000) < 800
    ours = [point("learned", correct, spent, spent) for spent in (0.35, 0.5, 0.7)]
    shallow = point("shallow", np.arange(1000) < 790, 0.6, None)
    table = summarise([*ours, shallow], hard(np.arange(1000.0)))
    gap = next(one for one in table.differences if one["over"] == "shallow")
    assert gap["our_budget"] == 0.5
    assert gap["difference"] == pytest.approx(0.01)


def test_the_hardest_are_those_with_the_greatest_loss() -> None:
    loss = np.arange(100.0)
    correct = loss < 95  # wrong on the five hardest
    row = summarise([point("learned", correct, 0.5)], hard(loss)).rows[0]
    assert row["accuracy_hardest"] == pytest.approx(0.5)


def test_macs_at_equal_accuracy_lie_between_points() -> None:
    def accuracy(share: float) -> np.ndarray:
        return np.arange(1000) < round(1000 * share)

    table = summarise(
        [
            point("dense", accuracy(0.9), 1.0, None),
            point("learned", accuracy(0.85), 0.35, 0.35),
            point("learned", accuracy(0.9), 0.55, 0.5),
            point("random", accuracy(0.6), 0.35, 0.35),
            point("random", accuracy(0.7), 0.5, 0.5),
        ],
        hard(np.arange(1000.0)),
    )
    assert table.at_equal_accuracy["learned"] == pytest.approx(0.35 + 0.2 * 0.9)
    assert table.at_equal_accuracy["random"] == pytest.approx(0.5 + 0.5 * (0.895 - 0.7) / 0.2)


def test_a_method_that_never_falls_so_low_takes_its_least() -> None:
    dense, merging = np.arange(1000) < 900, np.arange(1000) < 898
    table = summarise([point("dense", dense, 1.0, None), point("merging", merging, 0.5)], hard(np.arange(1000.0)))
    assert table.at_equal_accuracy == {"merging": 0.5}


def test_a_method_between_others_images_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    learned = comparison.directory(Run(METHODS["learned"], 0))
    other = tmp_path / "seed0"
    other.mkdir()
    (other / "measured.json").write_text((learned / "measured.json").read_text())
    with np.load(learned / "measured.npz") as arrays:
        np.savez(other / "measured.npz", **{**arrays, "dense_loss": arrays["dense_loss"][::-1]})
    with pytest.raises(ValueError, match="measured on other images"):
        read_points([learned, other])


def test_the_saved_learned_model_is_an_ordinary_one(comparison: Comparison) -> None:
    saved = comparison.directory(Run(METHODS["learned"], 0)) / "model"
    assert MIAFormer.from_pretrained(saved).calibration is not None


def test_rank_correlations_say_whether_the_harder_images_get_more() -> None:
    loss = np.arange(100.0)
    correct = np.ones(100, dtype=bool)
    follows = Point("learned", 0.5, correct.astype(float), loss[None] / 100, [1.0], None)
    found = summarise([follows], Difficulty(loss, np.flip(loss))).adaptivity[0]
    assert found["loss"] == pytest.approx(1.0)
    assert found["margin"] == pytest.approx(1.0)
    seeds = np.stack([loss, loss[::-1]]) / 100  # whose mean is the same for all images
    row = Point("learned", 0.5, correct.astype(float), seeds, [1.0, 1.0], None)
    table = summarise([row], Difficulty(loss, np.flip(loss)))
    assert table.adaptivity[0]["loss"] == pytest.approx(0.0)
    assert table.rows[0]["macs_fraction_std"] == pytest.approx(loss.std() / 100)


def test_a_margin_is_the_lead_of_the_right_class() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


def test_what_another_recipe_trained_is_not_taken_for_this_one(comparison: Comparison, recipe: Recipe) -> None:
    longer = replace(comparison, recipe=recipe.scaled(2))
    with pytest.raises(ValueError, match=r"holds another run, different in recipe\.stages"):
        longer.backbone_is_trained()
    with pytest.raises(ValueError, match=r"holds another run, different in recipe\.stages"):
        longer.is_trained(Run(METHODS["learned"], 0))


def test_one_backbone_serves_however_it_is_adapted(comparison: Comparison, recipe: Recipe) -> None:
    other = replace(comparison, recipe=replace(recipe, adapt={"grains": ("depth",)}))
    assert other.backbone_is_trained()


def test_an_interrupted_measurement_is_made_again(comparison: Comparison) -> None:
    run = Run(METHODS["merging-free"], 0)
    report = comparison.directory(run) / "measured.json"
    report.unlink()
    assert not comparison.is_measured(run)
    comparison.measure(run, torch.device("cpu"))
    assert comparison.is_measured(run)
    assert not list(report.parent.glob("*.partial"))


def test_static_models_of_one_name_keep_their_own_differences() -> None:
    """Two sizes of `shallow` know no budget: what tells them apart are their MACs."""
    correct = np.arange(1000) < 800
    ours = [point("learned", correct, spent, spent) for spent in (0.2, 0.5)]
    small, large = (point("shallow", np.arange(1000) < right, spent, None) for right, spent in ((600, 0.3), (790, 0.6)))
    table = summarise([*ours, small, large], hard(np.arange(1000.0)))
    shown = comparison_table(asdict(table))
    cells = dict(zip(shown.columns[2]._cells, shown.columns[6]._cells, strict=True))
    assert cells["0.300"].startswith("+20.00")
    assert cells["0.600"].startswith("+1.00")


def test_the_help_names_every_method() -> None:
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    said = commands.choices["compare"].format_help().replace(",", " ").split()
    assert [name for name in METHODS if name not in said] == []


def test_the_legend_names_methods_that_were_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"name": name, "macs_fraction": 0.5, "accuracy": 0.9, "accuracy_interval": (0.88, 0.92), "time_fraction": time}
        for name, time in (("learned", 0.6), ("merging", None), ("backbone", None))
    ]
    drawn: list[Any] = []
    monkeypatch.setattr("miaformer.reports.comparison_plot.save", lambda figure, path: drawn.append(figure))
    plot_comparison(rows, tmp_path / "plot.png", "three methods")
    (legend,) = [axes.get_legend() for axes in drawn[0].axes if axes.get_legend() is not None]
    assert [text.get_text() for text in legend.get_texts()] == ["learned", "merging", "backbone"]


def test_a_report_names_the_recipes_model_only_where_that_was_trained() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    for name, model in (("cifar10-small", "vit_tiny_patch16_224"), ("imagenette-dinov2s", None)):
        report = comparison_report([results / name / "learned" / "seed0"], results / name / "backbone")
        assert report["model"] == model
