"""The command explains itself, fails in one line that says what was wrong, and reports what the library reports."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import batches_of, classifier, run
from PIL import Image
from rich.console import Console
from rich.table import Table
from vits import pictures

import miaformer
from miaformer import MIAFormer, cli
from miaformer.cli import demo, output
from miaformer.cli import eval as eval_command
from miaformer.data import open_data
from miaformer.evaluation import POLICIES, evaluate, evaluate_data

# Help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_documents_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: miaformer {command} ")
    assert f"examples:\n  miaformer {command}" in out


def test_the_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert f"\n    {command} " in out
    assert "examples:\n  miaformer demo" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"miaformer {miaformer.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("train", "--recipe", "digits", "--out", "x", "--seed", -1), "--seed: -1 must be a whole number"),
        (("attack", "x", "--data", "x", "--seed", 2**63), "less than 2**63 (see miaformer attack --help)"),
        (("compare", "--seeds", 0, 1.5), "--seeds: 1.5 must be a whole number"),
        (("export", "x", "x.onnx", "--budget", 0.5), "arguments: --budget 0.5 (see miaformer export --help)"),
    ],
)
def test_wrong_usage_is_said_in_a_line(capsys: pytest.CaptureFixture[str], argv: tuple[object, ...], said: str) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_home_is_found_where_no_shell_looked_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "cifar10-small", "~/nothing", "--out=~/here.csv"]) == 2
    assert cli.main(["train", "--recipe", "digits", "--data=~/photos", "--out=~/run"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/photos" in said
    assert not (tmp_path / "~").exists()


def test_help_and_wrong_usage_wait_for_no_heavy_import() -> None:
    script = (
        "import sys; from miaformer.cli import main\n"
        "assert main(['eval', '--help']) == 0\n"
        "assert main(['eval']) == 2\n"
        "heavy = {'torch', 'timm', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env={"PYTHONPATH": path})


def test_the_package_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "miaformer", "--version"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, f"miaformer {miaformer.__version__}\n")


def test_policies_that_help_names_are_those_there_are() -> None:
    assert eval_command.POLICIES == POLICIES
    for name in POLICIES:
        assert f"\n  {name} " in eval_command.DESCRIPTION


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["evaluate"], "evaluate"),
        (["eval", "MODEL"], "--data"),
        (["eval", "MODEL", "--data", "digits", "--budgets", "half"], "half"),
        (["eval", "MODEL", "--data", "digits", "--policy", "best"], "best"),
        (["eval", "no/such/model", "--data", "DATA"], "no model 'no/such/model'"),
        (["eval", "./nowhere", "--data", "DATA"], "no model './nowhere'"),
        (["eval", "timm:vit_huge_patch0", "--data", "DATA"], "vit_huge_patch0"),
        (["eval", "timm:resnet18", "--data", "DATA"], "ResNet"),
        (["eval", "MODEL", "--data", "no-such-data"], "no-such-data"),
        (["eval", "MODEL", "--data", "DATA", "--device", "cuda:99"], "cuda:99"),
        (["eval", "MODEL", "--data", "DATA", "--device", "gpu"], "gpu"),
        (["eval", "MODEL", "--data", "DATA", "--threads", "0"], "--threads 0"),
        (["eval", "MODEL", "--data", "DATA", "--budgets", "1.5"], "1.5"),
        (["eval", "MODEL", "--data", "DATA", "--budgets", "0.001"], "budget=0.001"),
        (["eval", "MODEL", "--data", "DATA", "--cap", "-1"], "cap=-1.0"),
        (["eval", "MODEL", "--data", "DATA", "--batch-size", "0"], "batch_size=0"),
        (["eval", "UNCALIBRATED", "--data", "DATA"], "--calibrate"),
        (["eval", "DATA", "--data", "DATA"], "config.json"),
        (["eval", "MODEL", "--data", "digits"], "3 classes, digits/test has 10"),
        (["predict", "MODEL", "DATA", "--out", "rows.txt"], "rows.txt"),
        (["predict", "MODEL", "DATA", "--out", "DATA/x.csv", "--top-k", "0"], "--top-k 0"),
        (["predict", "MODEL", "DATA", "--out", "DATA/x.csv", "--budget", "2"], "budget=2.0"),
        (["predict", "UNCALIBRATED", "DATA", "--out", "DATA/x.csv", "--budget", "0.5"], "not calibrated"),
        (["predict", "MODEL", "DATA/nothing", "--out", "DATA/x.csv"], "nothing"),
        (["demo", "--recipe", "finetune", "--out", "DATA/demo", "--processes", "1"], "finetune"),
        (["demo", "--recipe", "cooking", "--out", "DATA/demo", "--processes", "1"], "cooking"),
        (["train", "--recipe", "cooking", "--out", "DATA/train"], "cooking"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_that_names_what_was_wrong(
    capsys: pytest.CaptureFixture[str], calibrated: Path, uncalibrated: Path, data: Path, argv: list[str], named: str
) -> None:
    places = {"MODEL": calibrated, "UNCALIBRATED": uncalibrated, "DATA": data}
    if argv[-2:] == ["--data", "digits"]:
        pytest.importorskip("sklearn")
    for name, path in places.items():
        argv = [str(path) + part.removeprefix(name) if part.startswith(name) else part for part in argv]
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("miaformer: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not (data / "x.csv").exists()  # nothing is written before everything is known to be right


def test_a_model_that_the_hub_does_not_give_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(MIAFormer, "from_pretrained", offline)
    status, _, err = run(capsys, "eval", "someone/model", "--data", data)
    assert status == 2
    assert err.startswith("miaformer: error: no model 'someone/model'")
    assert err.endswith("no route to the hub\n")


def test_a_debugged_error_shows_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch, calibrated: Path, data: Path
) -> None:
    monkeypatch.setenv("MIAFORMER_DEBUG", "1")
    with pytest.raises(ValueError, match=r"budget=1\.5"):
        cli.main(["eval", str(calibrated), "--data", str(data), "--budgets", "1.5"])


def test_ctrl_c_ends_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_command, "open_device", interrupted)
    assert run(capsys, "eval", "model", "--data", "digits") == (130, "", "miaformer: interrupted\n")


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "miaformer.cli.output", None)
    monkeypatch.delitem(sys.modules, "miaformer.cli.output")
    monkeypatch.delattr(cli, "output", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("rich"), *sys.meta_path])
    status, _, err = run(capsys, "eval", "model", "--data", "digits")
    assert status == 2
    assert err == "miaformer: error: this needs rich, which is not installed: pip install 'miaformer[cli]'\n"


class _Without:
    """An import system in which a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *args: Any) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# Eval -----------------------------------------------------------------------------------------------------------------


def test_eval_reports_what_the_library_reports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, calibrated: Path, data: Path
) -> None:
    found_at = tmp_path / "new" / "report.json"
    argv = ["--budgets", 0.5, 0.3, "--seed", 4, "--batch-size", 4, "--device", "cpu"]
    status, out, err = run(capsys, "eval", calibrated, "--data", data, *argv, "--json", found_at)
    assert (status, err) == (0, "")
    report = json.loads(found_at.read_text())
    model = MIAFormer.from_pretrained(calibrated)
    test, held_out = (batches_of(model, data, split).epoch(0) for split in ("test", "calibration"))
    wanted = evaluate(model, test, [0.3, 0.5], calibration=held_out, seed=4)
    sets = {split: open_data(data, split) for split in ("test", "calibration")}
    found = evaluate_data(model, sets["test"], [0.5, 0.3], held_out=sets["calibration"], batch_size=4, seed=4)
    assert {name for name in report if report[name] != found.get(name)} <= {"model", "environment"}
    for name in ("dense", "points", "adaptivity", "left_out", "controllers", "num_images", "cap", "dtype"):
        assert report[name] == wanted[name]
    assert report["model"] == str(calibrated)
    assert report["calibration"]["data"] == "folders"
    assert report["environment"]["seed"] == 4
    for point in wanted["points"]:
        assert f"{point['policy']} " in out
        assert f" {point['macs_fraction']:.3f} " in out
    assert "Controllers take at most" in out
    assert str(found_at) in out
    assert not list(found_at.parent.glob("*.partial"))


def test_eval_by_onnx_reports_what_it_reports_by_pytorch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, calibrated: Path, data: Path
) -> None:
    pytest.importorskip("onnxruntime")
    found_at, reports = tmp_path / "report.json", {}
    argv = ["--data", data, "--budgets", 0.5, "--cap", 0.9, "--policy", "learned", "random", "--json", found_at]
    for engine in ("eager", "onnx"):
        assert run(capsys, "eval", calibrated, *argv, "--device", "cpu", "--engine", engine)[0] == 0
        reports[engine] = json.loads(found_at.read_text())
    assert [report["engine"] for report in reports.values()] == ["eager", "onnx"]
    for point, wanted in zip(reports["onnx"]["points"], reports["eager"]["points"], strict=True):
        assert point == pytest.approx(wanted)
    assert reports["onnx"]["dense"] == reports["eager"]["dense"]


def test_eval_calibrates_where_asked_and_leaves_the_model_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, uncalibrated: Path, data: Path
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in uncalibrated.iterdir())
    picture = tmp_path / "report.png"
    argv = ["--calibrate", "--budgets", 0.4, "--policy", "learned", "full", "--plot", picture]
    status, out, _ = run(capsys, "eval", uncalibrated, "--data", data, *argv)
    assert status == 0
    assert "Calibrated for this evaluation" in out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in uncalibrated.iterdir()) == before
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_eval_says_that_a_model_is_not_calibrated(
    capsys: pytest.CaptureFixture[str], uncalibrated: Path, data: Path
) -> None:
    status, out, _ = run(capsys, "eval", uncalibrated, "--data", data, "--policy", "full", "random", "--budgets", 0.4)
    assert status == 0
    assert "not calibrated" in out
    assert "random" in out
    assert "│ learned" not in out


def test_eval_of_a_timm_name_is_its_backbone_under_random_decisions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    found_at = tmp_path / "report.json"
    argv = ["--budgets", 0.5, "--json", found_at, "--dtype", "bfloat16"]
    status, _, _ = run(capsys, "eval", "timm:test_vit", "--data", data, *argv)
    assert status == 0
    report = json.loads(found_at.read_text())
    assert [(p["policy"], p["budget"]) for p in report["points"]] == [("full", 1.0), ("random", 0.5)]
    assert report["calibration"] is None
    assert report["dtype"] == "bfloat16"


def test_progress_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    progress = output.LiveProgress({"evaluate": 10})
    with progress as on_progress:
        on_progress("evaluate", 4)
        on_progress("calibrate", 2)
        on_progress("evaluate", 7)
    tasks = {task.description: (task.completed, task.total) for task in progress._progress.tasks}
    assert tasks == {"evaluate": (7, 10), "calibrate": (2, None)}
    assert capsys.readouterr().err == ""  # no terminal, no bar


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    output.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


# Demo -----------------------------------------------------------------------------------------------------------------


def test_demo_trains_evaluates_times_and_draws(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real one, trained for a few steps; a second time it has nothing to train."""
    monkeypatch.setattr(demo, "TIMED_MODEL", "test_vit")
    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.1)
    out_dir = tmp_path / "demo"
    command = ("demo", "--out", out_dir, "--seed", 2, "--epochs-scale", 0.005, "--device", "cpu", "--processes", 1)
    command = (*command, "--engine", "eager")
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "")
    report = json.loads((out_dir / "report.json").read_text())
    points = [(point["policy"], point["budget"]) for point in report["points"]]
    assert points == [(name, budget) for budget in demo.BUDGETS for name in ("learned", "static", "random")]
    assert [(row["engine"], row["budget"], row["batch"]) for row in report["timing"]["rows"]] == [
        ("eager", demo.TIMED_BUDGET, 1),
        ("eager", 1.0, 1),
    ]
    assert "test_vit on cpu" in out
    assert "an image at a time: dense" in out
    for name in ("tradeoff.png", "digits.png"):
        with Image.open(out_dir / name) as image:
            image.load()
        assert str(out_dir / name) in out

    def no_training(*args: Any, **options: Any) -> None:
        raise AssertionError("the model is there")

    monkeypatch.setattr("miaformer.training.train_recipe", no_training)
    assert run(capsys, *command)[0] == 0
    again = json.loads((out_dir / "report.json").read_text())
    assert again["points"] == report["points"]
    status, _, err = run(capsys, *command, "--seed", 3)
    assert status == 2
    assert "different in seed" in err


def test_pictures_of_the_tests_differ() -> None:
    """What the tests above rest on: decisions of the small model are not the same for all images."""
    model = classifier()
    with torch.inference_mode():
        macs = model.run(pictures(model.backbone, 16), price=1.0).trace.macs
    assert len(set(macs.tolist())) > 3


@pytest.mark.parametrize("width", [120, 80, 66, 40])
def test_no_terminal_is_too_narrow_for_a_table(width: int) -> None:
    values = [f"{place}.{'7' * 9}" for place in range(6)]
    table = Table(caption="some numbers")
    table.add_column("who", no_wrap=True)
    for place in range(6):
        table.add_column(f"number {place}", justify="right", no_wrap=True)
    table.add_row("one", *values, end_section=True)
    table.add_row("another", *values)
    shown = io.StringIO()
    terminal = Console(file=shown, width=width)
    output.print_table(table, terminal)
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if all(value in line for value in values)] == [
        line for line in lines if "7" in line
    ]  # nothing is cut, nothing wraps
    assert len([line for line in lines if "7" in line]) == 2
    assert max(map(len, lines)) <= max(width, len("another") + sum(1 + len(value) for value in values))
    assert terminal.width == width


def test_a_terminal_that_cannot_show_a_letter_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: Path
) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    Image.new("RGB", (20, 20)).save(tmp_path / "Käfer.png")
    assert cli.main(["predict", str(calibrated), str(tmp_path), "--out", str(tmp_path / "käfer.csv")]) == 0
    sys.stdout.flush()
    assert rb"k\xe4fer.csv" in said.getvalue().replace(b"\n", b"")
