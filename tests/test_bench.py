"""The benchmark times what it says, on decisions that differ between images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vits import pictures, vit

import miaformer
from miaformer.cli import main
from miaformer.cli.bench import bench_notes
from miaformer.evaluation import bench_data
from miaformer.evaluation.bench import _Cell, bench
from miaformer.evaluation.calibration import price_table
from miaformer.evaluation.drawn import draw_controllers, drawn_models, mixed_by_confidence
from miaformer.evaluation.timing import Race


def drawn(grains: Any, seed: int = 0) -> Any:
    model = miaformer.adapt(vit(seed, depth=4, img_size=24)).eval()
    images = pictures(model.backbone, 24, seed=1)
    draw_controllers(model, images, seed, grains)
    with torch.inference_mode():
        model.calibration = price_table(
            lambda price: model.run(images, price=price).trace.macs_fraction.mean().item(), 24, coarse=9, most=16
        )
    return model, images


@pytest.mark.parametrize("grains", ["all", "depth", "heads", "tokens"])
def test_drawn_controllers_decide_their_grains_image_by_image(grains: str) -> None:
    model, images = drawn(grains)
    with torch.inference_mode():
        trace = model.run(images, budget=0.6).trace
    assert trace.macs_fraction.std() > 0.02
    executed = trace.depth
    varies = {
        "depth": not bool(trace.depth.all()),
        "heads": not bool(trace.heads[executed].all()),
        "tokens": not bool(trace.tokens[executed].all()),
    }
    for name, does in varies.items():
        assert does == (grains in ("all", name)), name


def test_the_first_few_images_spend_the_budget_too() -> None:
    """A slow machine times eight of them."""
    given = miaformer.adapt(vit(0, depth=4, img_size=32)).eval()
    images = pictures(given.backbone, 64, seed=1)
    model = drawn_models(given, images[:2], images, grains=("resolution",))["resolution"]
    order = mixed_by_confidence(model, images)
    assert sorted(order.tolist()) == list(range(64))
    with torch.inference_mode():
        trace = model.run(images[order], budget=0.5).trace
    assert len(trace.looks.unique()) == 2
    for few in (8, 13, 21, 40):
        assert float(trace.macs_fraction[:few].mean()) == pytest.approx(0.5, abs=0.1)


def test_drawn_looks_are_second_ones_for_as_many_images_as_the_budget_allows() -> None:
    given = miaformer.adapt(vit(0, depth=4, img_size=32)).eval()
    images = pictures(given.backbone, 60, seed=1)
    model = drawn_models(given, images[:2], images, grains=("resolution",))["resolution"]
    with torch.inference_mode():
        for budget in (0.4, 0.5, 0.6):
            trace = model.run(images, budget=budget).trace
            assert float(trace.macs_fraction.mean()) == pytest.approx(budget, abs=0.03)
            assert set(trace.looks.tolist()) == {1, 2}
        torch.testing.assert_close(model(images, budget=1.0), given.backbone(images), atol=1e-4, rtol=1e-4)


def test_a_report_has_a_row_for_every_budget_and_its_numbers_agree() -> None:
    model, images = drawn("all")
    report = bench({"all": model}, images, ["eager"], batch_sizes=[1, 4], budgets=[0.5, 0.7], repeats=3)
    assert [(row["batch"], row["budget"]) for row in report.rows] == [(b, x) for b in (1, 4) for x in (0.5, 0.7, 1.0)]
    for row in report.rows:
        assert row["efficiency"] == pytest.approx(row["macs_fraction"] / row["time_fraction"])
        assert row["best_dense_engine"] == "eager"
        assert row["time_fraction"] == pytest.approx(row["best_time_fraction"])
        assert (row["macs_fraction_std"] > 0.01) == (row["budget"] < 1)
    assert not report.left_out


def test_a_race_compares_each_round_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 10.0, 5.0, 3.0, 1.5])  # two calls, three sweeps: the machine slows down in the second
    monkeypatch.setattr("miaformer.evaluation.timing._milliseconds", lambda call: next(times))
    race = Race([lambda _: None, lambda _: None], [None])
    for _ in range(3):
        race.sweep()
    assert race.ms(0) == 3.0
    assert race.fraction(1, 0) == 0.5  # the median of 2, 0.5 and 0.5


def test_variation_is_relative_to_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([8.0, 10.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr("miaformer.evaluation.timing._milliseconds", lambda call: next(times))
    race = Race([lambda _: None], [None])
    race.sweep()
    assert race.variation(0) == 0, "of a single time nothing is known"
    for _ in range(4):
        race.sweep()
    assert race.variation(0) == 0.4  # from 10 to 14, of 10


def test_eight_pictures_are_timed_however_long_they_take() -> None:
    model, images = drawn("all")
    shown: list[list[int]] = []
    report = bench(
        {"all": model},
        images,
        ["eager"],
        batch_sizes=[1, 4, 16],
        budgets=[],
        repeats=5,
        seconds=1e-9,
        on_cell=lambda report: shown.append([row["batch"] for row in report.rows]),
    )
    assert [(row["batch"], row["images"], row["repeats"]) for row in report.rows] == [(1, 8, 1), (4, 8, 1), (16, 16, 1)]
    assert shown == [[1], [1, 4], [1, 4, 16]], "what there is, as it comes"


def test_notes_warn_of_a_busy_machine_and_of_drawn_controllers() -> None:
    model, images = drawn("all")
    found = bench({"all": model}, images, ["eager"], batch_sizes=[1], budgets=[], repeats=1).to_json()
    environment = {"threads": 1, "device": "cpu", "versions": {"torch": "2"}}
    report: dict[str, Any] = {"model": "m", "data": "d", "environment": environment, "drawn": False, **found}
    for variation, warns in ((0.19, False), (0.21, True)):
        report["dense"][0]["variation"] = variation
        assert ("Warning: the dense time of eager, float32, batch 1" in " ".join(bench_notes(report))) == warns
    assert "drawn at random" not in " ".join(bench_notes(report))
    assert "drawn at random" in " ".join(bench_notes({**report, "drawn": True}))


def test_what_was_measured_is_kept_whatever_stops_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = drawn("all")
    model.save_pretrained(tmp_path / "model")
    prepare = _Cell.prepare

    def killed(cell: _Cell, *rest: Any) -> None:
        if cell.batch > 1:
            raise SystemExit(143)
        prepare(cell, *rest)

    monkeypatch.setattr(_Cell, "prepare", killed)
    arguments = ["bench", str(tmp_path / "model"), "--data", "digits", "--engines", "eager", "--batch-sizes", "1", "2"]
    with pytest.raises(SystemExit):
        main([*arguments, "--budgets", "0.6", "--repeats", "1", "--seconds", "2", "--json", str(tmp_path / "b.json")])
    report = json.loads((tmp_path / "b.json").read_text())
    assert [(row["batch"], row["budget"]) for row in report["rows"]] == [(1, 0.6), (1, 1.0)]
    assert report["interrupted"]
    assert report["environment"]["threads"] == torch.get_num_threads()
    said = capsys.readouterr()
    assert "2 tables to time, about 2 s each: 4 s" in said.out
    assert "1 of 2 tables timed, about" in said.err


def test_the_command_writes_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = drawn("all")
    model.save_pretrained(tmp_path / "model")
    arguments = ["bench", str(tmp_path / "model"), "--data", "digits", "--engines", "eager", "--batch-sizes", "2"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert main([*arguments, "--budgets", "0.6", "--repeats", "2", "--seconds", "2", *files]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert {row["budget"] for row in report["rows"]} == {0.6, 1.0}
    assert report["environment"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "b.png").stat().st_size > 5000
    assert "efficiency" in capsys.readouterr().out


def test_of_a_data_set_each_grain_is_drawn_calibrated_and_timed(data: Path) -> None:
    model = miaformer.adapt(vit(depth=4, img_size=24)).eval()
    settings: dict[str, Any] = {"batch_sizes": [2], "budgets": [0.6], "repeats": 2, "seconds": 1.0}
    report = bench_data(model, data, ["eager"], grains=("depth", "tokens"), calibration_images=8, **settings)
    assert [row["grains"] for row in report["rows"] if row["budget"] == 0.6] == ["depth", "tokens"]
    assert {grains: found["num_images"] for grains, found in report["calibration"].items()} == {"depth": 8, "tokens": 8}
    assert model.calibration is None  # the model itself is as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "digits", "--grains", "heads"], "--grains draws decisions for timm:NAME"),
        (["--data", "digits", "--batch-sizes", "0"], "--batch-sizes 0 must be at least 1"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err
