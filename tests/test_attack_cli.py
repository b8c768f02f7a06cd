"""`miaformer attack` says what was lost, keeps what it did, and names what cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import class_folders, run

from miaformer import load
from miaformer.cli.arguments import radius
from miaformer.cli.attack import DEFAULT_ATTACKS, DESCRIPTION
from miaformer.data import open_data, spread
from miaformer.lab.attacks import Ball, Climb, attack, needs_held_out
from miaformer.lab.attacks import run as run_of_attacks
from miaformer.lab.attacks.methods import ATTACKS

CONTRACT = {"attack", "eps", "target", "clean", "robust", "macs_fraction_clean", "macs_fraction_attacked"}
QUICK = ("--steps", 2, "--patch-steps", 2, "--images", 8, "--no-masking-check")


def test_a_report_of_every_target_and_kind_of_attack(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    targets = ("backbone", "adaptive", "sampled", "static", "random", "cls-attention")
    command = (
        "attack", calibrated, "--data", data, "--targets", *targets, "--attacks", "fgsm", "transfer", "macs", "patch",
        "--eps", "2/255", "0.03", "--cap", 0.7, *QUICK, "--out", tmp_path / "kept", "--json", tmp_path / "a.json",
        "--plot", tmp_path / "a.png",
    )  # fmt: skip
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "")
    assert "cls-attention" in out
    report = json.loads((tmp_path / "a.json").read_text())
    rows = report["rows"]
    assert all(row.keys() >= CONTRACT for row in rows)
    assert {row["target"] for row in rows} == set(targets)
    assert {row["eps"] for row in rows} == {2 / 255, 0.03, None}
    adaptive = [row for row in rows if row["target"] != "backbone"]
    assert max(row["macs_fraction_max"] for row in adaptive if row["attack"] != "worst") <= 0.7
    assert {row["attack"] for row in adaptive} == {"fgsm", "transfer", "macs", "worst", "patch"}
    assert {row["attack"] for row in rows if row["target"] == "backbone"} == {"fgsm"}  # the one that it can suffer
    assert report["budget"] is not None
    assert (tmp_path / "a.png").exists()
    assert run(capsys, *command)[1] == out  # found, not done again

    status, _, err = run(capsys, *command, "--seed", 1)
    assert status == 2
    assert "holds attacks with another seed" in err


def test_python_and_the_command_report_the_same(
    capsys: pytest.CaptureFixture[str], calibrated: Path, data: Path, tmp_path: Path
) -> None:
    names = ("fgsm", "macs", "patch")
    targets = ("backbone", "adaptive", "random")
    command = ("attack", calibrated, "--data", data, "--attacks", *names, "--targets", *targets, "--eps", "4/255")
    assert run(capsys, *command, *QUICK, "--json", tmp_path / "a.json")[0] == 0
    written = json.loads((tmp_path / "a.json").read_text())
    images, held_out = spread(open_data(data, "test"), 8), open_data(data, "calibration")
    found = attack(
        load(calibrated), images, [Ball(4 / 255)], names, targets, held_out=held_out, climb=Climb(steps=2),
        patch_steps=2, masking=False,
    )  # fmt: skip
    assert {name for name in written if written[name] != found.get(name)} <= {"model", "environment"}
    assert len(found["rows"]) == 1 + 3 + 3


def test_without_the_calibration_split_nothing_is_made_on_it(calibrated: Path, data: Path) -> None:
    assert needs_held_out(["patch"], ["adaptive"])
    assert needs_held_out(["fgsm"], ["static"])
    assert not needs_held_out(["fgsm", "macs"], ["backbone", "adaptive", "sampled"])
    with pytest.raises(ValueError, match="made on the calibration split: give held_out"):
        attack(load(calibrated), open_data(data, "test"), attacks=["patch"], masking=False)


@pytest.mark.usefixtures("short_auto_attack")
def test_signs_of_masking_are_reported(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    command = ("attack", calibrated, "--data", data, "--attacks", "fgsm", "--targets", "backbone", "--steps", 3)
    status, out, _ = run(capsys, *command, "--images", 4, "--eps", "16/255", "--json", tmp_path / "a.json")
    assert status == 0
    signs = json.loads((tmp_path / "a.json").read_text())["masking"]
    assert len(signs) == 5
    assert all(sign.keys() == {"target", "check", "value", "wanted", "passed"} for sign in signs)
    failed = [sign for sign in signs if not sign["passed"]]
    assert ("Gradient masking? backbone" in out) == bool(failed)
    assert ("No sign of gradient masking" in out) == (not failed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--attacks", "ddos"), "unknown attack ddos: use some of fgsm"),
        (("--targets", "moon"), "unknown target moon: use some of backbone"),
        (("--eps", "4/0"), "--eps 4/0: give a radius such as 4/255"),
        (("--eps", "-1"), "must be positive"),
        (("--eps", "4"), "--eps 4: pixels go from 0 to 1, and so do radii: 4/255, say"),
        (("--images", "0"), "--images 0 must be at least 1"),
        (("--steps", "0"), "steps=0 must be at least 1"),
        (("--budget", "7"), "budget=7.0 must be a fraction"),
        (("--attacks", "patch", "--patch-area", "0"), "patch area 0.0 must be a share"),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    data: Path,
    wrong: tuple[str, ...],
    message: str,
) -> None:
    status, _, err = run(capsys, "attack", calibrated, "--data", data, *QUICK, *wrong)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_an_uncalibrated_model_has_a_backbone_to_attack_and_no_budget(
    capsys: pytest.CaptureFixture[str],
    uncalibrated: Path,
    data: Path,
) -> None:
    command = ("attack", uncalibrated, "--data", data, "--attacks", "fgsm", *QUICK)
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command, "--targets", "adaptive")
    assert status == 2
    assert "is not calibrated, so it knows no budget: attack its backbone alone" in err


def test_help_names_the_attacks_and_targets_that_there_are() -> None:
    assert DEFAULT_ATTACKS == run_of_attacks.DEFAULT_ATTACKS
    for name in (*ATTACKS, *run_of_attacks.TARGETS):
        assert name in DESCRIPTION


@pytest.mark.parametrize(("text", "value"), [("4/255", 4 / 255), ("0.5", 0.5), ("1/4", 0.25)])
def test_radii_are_read_as_people_write_them(text: str, value: float) -> None:
    assert radius("--eps", text) == value


def test_a_missing_library_is_named_before_anything_is_attacked(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    command = ("attack", calibrated, "--data", data, "--targets", "backbone", "--images", 4, "--steps", 1)
    status, out, err = run(capsys, *command)
    assert (status, out) == (2, "")
    assert "pip install 'miaformer[attack]'" in err
    assert run(capsys, *command, "--no-masking-check")[0] == 0


@pytest.mark.parametrize("attack", ["macs", "patch", "transfer"])
def test_what_a_static_backbone_cannot_suffer_is_named(
    capsys: pytest.CaptureFixture[str], calibrated: Path, data: Path, attack: str
) -> None:
    command = ("attack", calibrated, "--data", data, "--targets", "backbone", "--attacks", attack, *QUICK)
    status, out, err = run(capsys, *command)
    assert (status, out) == (2, "")
    assert f"nothing to attack: {attack} on backbone" in err


def test_a_broken_picture_is_named(capsys: pytest.CaptureFixture[str], calibrated: Path, tmp_path: Path) -> None:
    broken = class_folders(tmp_path) / "val" / "class1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    command = ("attack", calibrated, "--data", tmp_path, "--attacks", "fgsm", "--images", 99, "--no-masking-check")
    status, _, err = run(capsys, *command)
    assert status == 2
    assert str(broken) in err
