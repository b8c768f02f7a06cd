"""`miaformer report` shows a run as far as it has come, on a page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_training
import torch
from command_line import class_folders, run
from test_explain import Page

from miaformer import cli
from miaformer.evaluation import describe_environment
from miaformer.lab.comparison import Comparison
from miaformer.lab.comparison.harness import runs
from miaformer.reports.history import read_history
from miaformer.reports.measured import read_comparison
from miaformer.reports.page import Markup, join, tag

Report = Callable[..., Page]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    tiny_training.run(out)
    return out


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours and two others, measured."""
    root = tmp_path_factory.mktemp("comparison")
    data = class_folders(root / "data", each=24)
    sizes = {name: value for name, value in tiny_training.SIZES.items() if name != "num_classes"}
    stages = tuple(replace(stage, epochs=0.5) for stage in tiny_training.RECIPE.stages)
    recipe = replace(tiny_training.RECIPE, model_args=sizes, stages=stages)
    made = Comparison(recipe, str(data), root / "runs", (0.6,))
    made.train_backbone("cpu")
    for one in runs(["learned", "dense", "merging-free"], [0]):
        if not made.is_trained(one):
            made.train(one, "cpu")
        made.measure(one, torch.device("cpu"))
    return made.out


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Report:
    """The page of a run, and of what else is asked for."""

    def write(*arguments: object) -> Page:
        out = tmp_path / "new" / "report.html"
        status, said, err = run(capsys, "report", *arguments, "--out", out)
        assert (status, err) == (0, "")
        assert said == f"{out}: open it in a browser\n"
        page = Page(out)
        page.assert_stands_alone()
        return page

    return write


def curves(page: Page) -> list[str]:
    """The path of each curve."""
    names = "loss|accuracy|accuracy_full|macs_fraction|budget|lr"
    return re.findall(rf'<g id="(?:{names})">\s*<path d="([^"]+)"', page.source)


def points(page: Page) -> list[int]:
    """How many points each curve has."""
    return [path.count("L") + 1 for path in curves(page)]


# Training runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_shown_whole(report: Report, trained: Path) -> None:
    page = report(trained)
    assert "Training run: tiny" in page.text
    assert "Not finished" not in page.text
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * tiny_training.STEPS
    for stage in ("backbone", "elastic", "supervised", "reinforce"):
        assert stage in page.text
    per_metric = [sum(name in row for row in rows) for name in ("loss", "accuracy", "accuracy_full")]
    per_metric += [sum(name in row for row in rows) for name in ("macs_fraction", "budget", "lr")]
    assert sorted(points(page)) == sorted(per_metric)
    assert f"{rows[-1]['loss']:.3f}"[:3] in page.text
    assert "48 images of quadrants/train, seed 3" in page.text
    assert "label_smoothing" in page.text
    assert "controller_lr" in page.text


def test_the_same_run_gives_the_same_page(report: Report, trained: Path) -> None:
    assert report(trained).source == report(trained).source


@pytest.mark.parametrize("done", [0, 7, 16])
def test_an_unfinished_run_shows_what_there_is(report: Report, trained: Path, tmp_path: Path, done: int) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(trained / "recipe.json", run_dir)
    lines = (trained / "metrics.jsonl").read_text().splitlines()[:done]
    if done:
        (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "sta')  # killed while writing
    history = read_history(run_dir)
    assert (history.done, history.planned, history.is_finished) == (done, 16, False)
    page = report(run_dir)
    expected = {
        0: "it has not made its first step",
        7: "step 7 of 16, in elastic",
        16: "all 16 steps are made, and no model is saved yet",
    }
    assert f"Not finished: {expected[done]}" in page.text
    assert bool(points(page)) == bool(done)


def test_a_run_that_diverged_is_shown_up_to_there(report: Report, trained: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows[5:]:
        row["loss"] = float("nan")
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = report(run_dir)
    assert points(page)[0] == 5
    assert "nan" not in "".join(curves(page))


def test_evaluations_pictures_and_environment_are_shown(
    capsys: pytest.CaptureFixture[str], report: Report, trained: Path, tmp_path: Path
) -> None:
    data = class_folders(tmp_path / "data", classes=4, each=4)
    for folder in data.glob("*/class*"):
        folder.rename(folder.with_name("abcd"[int(folder.name[-1])]))  # as the model calls them
    written = tmp_path / "eval.json"
    asked = ("--data", data, "--budgets", 0.5, "--json", written)
    assert run(capsys, "eval", trained / "model", *asked)[0] == 0
    with_environment = tmp_path / "run"
    shutil.copytree(trained, with_environment)
    (with_environment / "environment.json").write_text(json.dumps(describe_environment("cpu", 3)))
    page = report(with_environment, "--eval", written, "--data", data)
    found = json.loads(written.read_text())
    for point in found["points"]:
        assert f"{100 * point['accuracy']:.2f}" in page.text
        assert f"{point['macs_fraction']:.3f}" in page.text
    assert found["environment"]["date"] in page.text
    assert "Where it was trained" in page.text
    assert "The cheapest and the most expensive images" in page.text
    assert "Of 16 test images of data" in page.text
    shares = [float(text) for text in re.findall(r"([\d.]+) of the MACs", page.text)]
    least, most = shares[:6], shares[6:]
    assert least == sorted(least)
    assert most == sorted(most, reverse=True)
    assert least[0] < most[0]
    assert len(page.all("image")) == 2 * len(shares)


# Comparisons ----------------------------------------------------------------------------------------------------------


def test_a_comparison_is_shown_with_what_is_missing(report: Report, comparison: Path, tmp_path: Path) -> None:
    directory = tmp_path / "comparison"
    shutil.copytree(comparison, directory)
    begun = directory / "exits" / "seed0"
    begun.mkdir(parents=True)
    shutil.copy(directory / "dense" / "seed0" / "recipe.json", begun)
    page = report(directory)
    assert "Comparison: tiny" in page.text
    assert re.search(r"Not measured yet: exits, seed 0 \(step 0 of \d+\)", page.text)
    for name in ("learned", "static", "random", "dense", "merging-free"):
        assert name in page.text
    measured = json.loads((directory / "learned" / "seed0" / "measured.json").read_text())
    assert measured["environment"]["date"] in page.text
    intervals = re.findall(r'<g id="LineCollection_\d+">\s*<path', page.source)
    assert len(intervals) == 2 * 5  # one each but dense, over MACs and over time


def test_a_comparisons_directory_and_its_json_say_the_same(
    capsys: pytest.CaptureFixture[str],
    report: Report,
    comparison: Path,
    tmp_path: Path,
) -> None:
    recipe = json.loads((comparison / "learned" / "seed0" / "recipe.json").read_text())["recipe"]
    stages = json.loads((comparison / "backbone" / "recipe.json").read_text())["recipe"]["stages"]
    found, missing = read_comparison(comparison)
    assert found is not None
    assert not missing
    assert found["recipe"] == {**recipe, "stages": stages + recipe["stages"]}
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(found))
    from_file, from_directory = report(path), report(comparison)
    assert from_file.text.replace("compare, ", "runs, ") == from_directory.text


# What is no run -------------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_told_in_one_line(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("no run")
    for name, content in (("other", {"a": 1}), ("rows", {"rows": [{}], "differences": []}), ("list", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "points.json").write_text(json.dumps({"points": [{}], "dense": {}}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.json").write_text('{"recipe": {}}')
    out = tmp_path / "report.html"
    for source, *more, reason in (
        (tmp_path / "empty", "is empty: give a directory of `miaformer train` (it holds recipe.json"),
        (tmp_path / "full", "holds no run"),
        (tmp_path / "gone", "no such file or directory"),
        (tmp_path / "other.json", "no report of a comparison or an evaluation"),
        (tmp_path / "rows.json", "rows.json is not what `miaformer compare --json` writes"),
        (tmp_path / "list.json", "should hold a JSON object"),
        (tmp_path / "points.json", "points.json is not what `miaformer eval --json` writes"),
        (tmp_path / "broken", "not what `miaformer train` writes"),
        (trained, "--eval", tmp_path / "gone.json", "gone.json: no such file"),
        (trained, "--eval", tmp_path / "other.json", "other.json is not what `miaformer eval --json` writes"),
        (trained, "--eval", tmp_path / "points.json", "points.json is not what `miaformer eval --json` writes"),
        (trained, "--data", tmp_path / "gone", "unknown data"),
    ):
        status, said, err = run(capsys, "report", source, *more, "--out", out)
        assert (status, said, err.count("\n")) == (2, "", 1), err
        assert reason in err
    assert run(capsys, "report", trained, "--out", tmp_path)[0] == 2
    assert not out.exists()


# Parts ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_escaped_once() -> None:
    assert tag("p", "a < b & c", title='"') == '<p title="&quot;">a &lt; b &amp; c</p>'
    assert tag("div", tag("br"), None, 3) == "<div><br>3</div>"
    assert isinstance(join(("<", tag("i"))), Markup)
    assert join(("<", tag("i"))) == "&lt;<i></i>"


def test_help_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    assert "miaformer compare --json" in capsys.readouterr().out
