"""Latency tables add up what was measured, fit one model and machine, and turn milliseconds into prices."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vits import lively, pictures

from miaformer import Decisions, MIAFormer, cli
from miaformer.data import Batch
from miaformer.evaluation import (
    Latency,
    LatencyCalibration,
    LatencyTable,
    calibrate_latency,
    check_latency,
    measure_latency,
    read_latency,
)
from miaformer.evaluation.latency import ModelShape
from miaformer.evaluation.profiling import grid_heads, grid_rows

ROWS, HEADS = (1, 9, 26), (1, 3)


def table_of(model: MIAFormer, seed: int = 0) -> LatencyTable:
    """A table for this model on this machine, with drawn numbers that differ in every part."""
    draw = np.random.default_rng(seed)

    def numbers(*shape: int) -> Any:
        return draw.uniform(1, 2, shape).tolist()

    parameter = next(model.parameters())
    rows = tuple(number for number in ROWS if number <= model.cost().num_patches + model.num_prefix_tokens)
    content = {
        "shape": json.loads(json.dumps(ModelShape.of(model).__dict__)),
        "device": measured_here(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "engine": "eager",
        "batch_size": 1,
        "rows": list(rows),
        "heads": list(HEADS),
        "block_ms": numbers(len(rows), len(HEADS)),
        "last_block_ms": numbers(len(rows), len(HEADS)),
        "skipped_ms": 0.0625,
        "decide_ms": numbers(len(rows)),
        "score_ms": numbers(len(rows)),
        "fixed_ms": 3.5,
        "versions": {"torch": torch.__version__},
    }
    return LatencyTable.from_json(content)


def measured_here() -> str:
    from miaformer.evaluation.environment import device_name

    return device_name(torch.device("cpu"))


def decisions(model: MIAFormer, rows: int, heads: int, executed: list[int]) -> Decisions:
    """The same rows and heads in the blocks executed, for one image."""
    cost = model.cost()
    depth = torch.zeros(1, cost.depth, dtype=torch.bool)
    depth[0, executed] = True
    kept_heads = (torch.arange(cost.num_heads) < heads) & depth[:, :, None]
    kept_tokens = (torch.arange(cost.num_patches) < rows - cost.num_prefix_tokens) & depth[:, :, None]
    return Decisions(depth, kept_heads, kept_tokens)


# The table ------------------------------------------------------------------------------------------------------------


def test_at_points_of_the_grid_a_prediction_is_the_sum_of_measured_parts(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    assert lively_model.cost().depth == 4
    for row, rows in enumerate(table.rows):
        for column, heads in enumerate(table.heads):
            one = decisions(lively_model, rows, heads, [1])
            wanted = table.fixed_ms + table.block_ms[row][column] + 3 * table.skipped_ms
            assert table.predict(one, learned=False).item() == pytest.approx(wanted, rel=1e-12)
            one = decisions(lively_model, rows, heads, [3])
            wanted = table.fixed_ms + table.last_block_ms[row][column] + 3 * table.skipped_ms
            assert table.predict(one, learned=False).item() == pytest.approx(wanted, rel=1e-12)


def test_between_points_it_is_bilinear(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    corners = np.array(table.block_ms)[:2]
    found = table.predict(decisions(lively_model, 3, 2, [0]), learned=False).item()
    wanted = (0.75 * corners[0] + 0.25 * corners[1]).mean()  # 3 of 1 to 9 rows, 2 of 1 to 3 heads
    assert found == pytest.approx(table.fixed_ms + 3 * table.skipped_ms + wanted, rel=1e-12)


def test_beyond_the_grid_it_goes_on_straight(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    part = replace(
        table,
        rows=table.rows[:2],
        block_ms=table.block_ms[:2],
        last_block_ms=table.last_block_ms[:2],
        decide_ms=table.decide_ms[:2],
        score_ms=table.score_ms[:2],
    )
    found = part.predict(decisions(lively_model, 17, 1, [0]), learned=False).item()
    wanted = 2 * table.block_ms[1][0] - table.block_ms[0][0]
    assert found == pytest.approx(table.fixed_ms + 3 * table.skipped_ms + wanted, rel=1e-12)


@pytest.mark.parametrize("scope", ["progressive", "per_block"])
def test_deciding_is_paid_for_what_is_active(scope: Any) -> None:
    """Blocks 0 and 2 are executed on 9 rows: in progressive scope controllers then see 9, else all 26."""
    model = lively(token_scope=scope)
    table = table_of(model)
    ranks = [controller.rank > 0 for controller in model.controllers]
    assert ranks == [False, True, True, True]
    one = decisions(model, 9, 3, [0, 2])
    later = 1 if scope == "progressive" else 2  # places among the rows of the grid: 9, and 26
    wanted = table.decide_ms[2] + 3 * table.decide_ms[later] + table.score_ms[later]
    found = (table.predict(one) - table.predict(one, learned=False)).item()
    assert found == pytest.approx(wanted, rel=1e-12)


def test_each_image_is_predicted_for_itself(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    with torch.inference_mode():
        trace = lively_model.run(pictures(lively_model.backbone, 12), price=1.0).trace
    together = table.predict(trace)
    assert together.shape == (12,)
    assert len(set(together.tolist())) > 6
    alone = torch.cat([table.predict(trace[[image]]) for image in range(12)])
    assert torch.equal(together, alone)


def test_a_table_survives_json(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    calibration = LatencyCalibration((0.5, 1.0, 4.0), (20.0, 10.0, 5.0), (1.0, 0.5, 0.2), 8, "some")
    both = Latency(table, calibration)
    assert Latency.from_json(json.loads(json.dumps(both.to_json()))) == both


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fixed_ms": None}, "fixed_ms"),
        ({"fixed_ms": float("nan")}, "fixed_ms"),
        ({"skipped_ms": -1.0}, "skipped_ms"),
        ({"rows": [1, 9, 9]}, "rows"),
        ({"heads": []}, "heads"),
        ({"block_ms": [[1.0, 2.0]]}, "block_ms"),
        ({"decide_ms": [1.0, 2.0]}, "decide_ms"),
        ({"block_ms": [[1.0], [1.0, 2.0], [1.0, 2.0]]}, "not a latency table"),
        ({"shape": {"depth": 3}}, "not a latency table"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_a_damaged_table_is_refused(lively_model: MIAFormer, change: dict[str, Any], named: str) -> None:
    content = json.loads(json.dumps(table_of(lively_model).to_json()))
    content.update(change)
    with pytest.raises(ValueError, match=re.escape(named)):
        LatencyTable.from_json(content)
    del content["rows"]
    with pytest.raises(ValueError, match=r"lacks 'rows'|not a latency table"):
        LatencyTable.from_json(content)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    for name, text in (("gone.json", None), ("text.json", "no json"), ("other.json", '{"format": 2}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_latency(tmp_path / name)


def test_a_table_fits_one_model_and_the_machine_it_was_measured_on(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    table.check_fits(lively_model)
    table.check_fits(lively(seed=5))  # weights do not matter
    others = {
        "embed_dim 24": lively(settings={"embed_dim": 48}),
        "token_scope progressive": lively(token_scope="per_block"),
        "image_size": lively(settings={"img_size": 24}),
        "controller_hidden 32": lively(controller_hidden=16),
        "dtype float64": lively().float(),
    }
    for named, model in others.items():
        with pytest.raises(ValueError, match=re.escape(named)):
            table.check_fits(model)
    for change, named in (
        ({"threads": table.threads + 1}, f"threads {table.threads + 1} "),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            replace(table, **change).check_fits(lively_model)


def test_decisions_of_another_model_are_refused(lively_model: MIAFormer) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        table_of(lively_model).predict(Decisions.full(1, 3, 3, 25))


# Measuring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "batch"),
    [
        ({}, {}, 1),
        ({"head_choice": "subset", "mlp_width": "coupled", "token_scope": "per_block"}, {}, 3),
        ({"token_multiple": 4}, {"class_token": False, "global_pool": "avg"}, 2),
        ({}, {"num_heads": 1, "depth": 1}, 1),
    ],
)
def test_measuring_covers_the_grid(config: dict[str, Any], settings: dict[str, Any], batch: int) -> None:
    model = lively(settings=settings, **config).train()
    rounds: list[int] = []
    table = measure_latency(model, batch, repeats=2, on_progress=lambda _, done: rounds.append(done))
    assert rounds == [1, 2, 3]
    assert model.training
    table.check_fits(model)
    shape = table.shape
    assert table.rows[0] == max(shape.num_prefix_tokens, 1)
    assert table.rows[-1] == shape.num_prefix_tokens + shape.num_patches
    assert (table.heads[0], table.heads[-1]) == (1, shape.num_heads)
    assert np.array(table.block_ms).shape == (len(table.rows), len(table.heads))
    assert np.array(table.block_ms).min() >= 0  # 0 where a busy machine drowns what a small block takes
    assert table.fixed_ms > 0
    assert table.batch_size == batch
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    with torch.inference_mode():
        trace = model.eval().run(pictures(model.backbone, 4), price=1.0).trace
    assert (table.predict(trace) >= table.fixed_ms).all()


def test_the_grid_is_what_the_learned_policy_keeps() -> None:
    shape = ModelShape.of(lively(settings={"img_size": 64}, token_multiple=8))
    rows = grid_rows(shape)
    assert (rows[0], rows[-2], rows[-1]) == (1, 256, 257)
    assert all(number % 8 == 0 for number in rows[1:-1])
    assert grid_heads(replace(shape, num_heads=16)) == (1, 4, 7, 10, 13, 15, 16)
    assert grid_heads(replace(shape, num_heads=1)) == (1,)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"repeats": 0}])
def test_measuring_nothing_is_refused(lively_model: MIAFormer, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        measure_latency(lively_model, **wrong)


# Budgets --------------------------------------------------------------------------------------------------------------


def batches_of(model: MIAFormer, count: int) -> list[Batch]:
    images = pictures(model.backbone, count)
    return [
        Batch(part, torch.zeros(len(part), dtype=torch.int64), torch.arange(len(part))) for part in images.split(20)
    ]


def test_a_budget_in_ms_is_met_on_the_calibration_images(lively_model: MIAFormer) -> None:
    table, batches = table_of(lively_model), batches_of(lively_model, 60)
    calibration = calibrate_latency(lively_model, batches, table, "drawn", tolerance=0.02)
    assert (calibration.num_images, calibration.data) == (60, "drawn")
    least, most = calibration.range
    assert least < 0.7 * most
    for share in (0.0, 0.3, 0.5, 0.8, 1.0):
        asked = least + share * (most - least)
        price = calibration.price(asked)
        with torch.inference_mode():
            traces = [lively_model.run(batch.images, price=price).trace for batch in batches]
        spent = torch.cat([table.predict(trace) for trace in traces]).mean().item()
        assert spent == pytest.approx(asked, abs=0.02 * most)
        fraction = torch.cat([trace.macs_fraction for trace in traces]).mean().item()
        assert calibration.macs_fraction(price) == pytest.approx(fraction, abs=0.03)


def test_a_budget_out_of_reach_names_the_range() -> None:
    calibration = LatencyCalibration((0.5, 1.0, 4.0), (20.0, 10.0, 5.0), (1.0, 0.5, 0.2), 8)
    assert [calibration.price(ms) for ms in (5.0, 10.0, 20.0, 1000.0)] == pytest.approx([4.0, 1.0, 0.5, 0.5])
    assert calibration.price(7.5) == pytest.approx(2.0)  # half way, in log-price
    with pytest.raises(ValueError, match=r"budget_ms=4\.9 is out of reach: .* takes 5 to 20 ms"):
        calibration.price(4.9)
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "12"):
        with pytest.raises(ValueError, match="positive number of milliseconds"):
            calibration.price(wrong)  # type: ignore[arg-type]


def test_calibrating_needs_images_and_the_models_own_table(lively_model: MIAFormer) -> None:
    with pytest.raises(ValueError, match="no images"):
        calibrate_latency(lively_model, [], table_of(lively_model))
    with pytest.raises(ValueError, match="embed_dim"):
        calibrate_latency(lively(settings={"embed_dim": 48}), batches_of(lively_model, 4), table_of(lively_model))


def test_a_check_holds_predictions_and_what_was_measured(lively_model: MIAFormer) -> None:
    table = table_of(lively_model)
    images = list(pictures(lively_model.backbone, 5).split(1))
    rows = check_latency(lively_model, images, [0.5, 2.0], table, repeats=1)
    assert [row["price"] for row in rows] == [0.5, 2.0]
    for row in rows:
        with torch.inference_mode():
            predicted = [table.predict(lively_model.run(one, price=row["price"]).trace).item() for one in images]
        assert row["predicted_ms"] == pytest.approx(predicted)
        assert all(ms > 0 for ms in row["measured_ms"])
        ratios = [p / m - 1 for p, m in zip(row["predicted_ms"], row["measured_ms"], strict=True)]
        assert row["error"] == pytest.approx(np.abs(ratios).mean())
    with pytest.raises(ValueError, match="batches of 1 images"):
        check_latency(lively_model, [torch.cat(images)], [1.0], table)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = lively(settings={"num_classes": 3, "img_size": 16, "depth": 3}).float()
    names = [f"class{label}" for label in range(3)]
    model.backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "label_names": names}
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for split in ("train", "val"):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(6):
                pixels = draw.uniform(0, 1 + 250 * draw.random(), (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def profiled(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "latency.json"
    argv = ["profile", model_dir, "--data", data, "--out", out, "--repeats", 2, "--device", "cpu"]
    assert cli.main([str(part) for part in [*argv, "--plot", out.with_suffix(".png")]]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main([*map(str, argv), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_profile_writes_table_calibration_and_check(profiled: Path, model_dir: Path) -> None:
    found = read_latency(profiled)
    found.table.check_fits(MIAFormer.from_pretrained(model_dir))
    assert found.calibration is not None
    content = json.loads(profiled.read_text())
    least, most = found.calibration.range
    assert [row["budget_ms"] for row in content["check"]] == pytest.approx(
        [least + share * (most - least) for share in (0.25, 0.5, 0.75)]
    )
    assert all(row["error"] >= 0 and len(row["measured_ms"]) == 18 for row in content["check"])
    assert content["environment"]["threads"] == found.table.threads
    with Image.open(profiled.with_suffix(".png")) as image:
        assert image.format == "PNG"


def test_profile_without_data_measures_the_table_alone(
    capsys: pytest.CaptureFixture[str], model_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "alone.json"
    status, printed, err = run(capsys, "profile", model_dir, "--out", out, "--repeats", 1, "--batch-size", 2)
    assert (status, err) == (0, "")
    table = read_latency(out).table
    for rows, of_rows in zip(table.rows, table.block_ms, strict=True):
        assert f"{rows} " in printed
        assert all(f"{ms:.3f}" in printed for ms in of_rows)
    status, _, err = run(capsys, "predict", model_dir, data, "--out", tmp_path / "a.csv", "--latency", out,
                         "--budget-ms", 5, "--batch-size", 2)  # fmt: skip
    assert status == 2
    assert "--data" in err


def test_predict_spends_what_was_asked_in_ms(
    capsys: pytest.CaptureFixture[str], model_dir: Path, data: Path, profiled: Path, tmp_path: Path
) -> None:
    found = read_latency(profiled)
    assert found.calibration is not None
    asked = sum(found.calibration.range) / 2
    out = tmp_path / "rows.csv"
    options = ["--latency", profiled, "--budget-ms", asked, "--batch-size", 1]
    status, printed, err = run(capsys, "predict", model_dir, data / "val", "--out", out, *options)
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 18
    from miaformer.data import build_transform
    from miaformer.data.images import open_image

    model = MIAFormer.from_pretrained(model_dir)
    transform, price = build_transform(model.data_config()), found.calibration.price(asked)
    for row in rows:
        with torch.inference_mode():
            trace = model.run(transform(open_image(row["path"]))[None], price=price).trace
        assert float(row["macs_fraction"]) == pytest.approx(trace.macs_fraction.item())
        assert float(row["predicted_ms"]) == pytest.approx(found.table.predict(trace).item())
        assert float(row["ms"]) > 0
    mean = np.mean([float(row["predicted_ms"]) for row in rows])
    assert f"asked {asked:g} ms a picture, predicted {mean:.4g}, measured " in printed


def test_eval_spends_what_was_asked_in_ms(
    capsys: pytest.CaptureFixture[str], model_dir: Path, data: Path, profiled: Path, tmp_path: Path
) -> None:
    found = read_latency(profiled)
    assert found.calibration is not None
    least, most = found.calibration.range
    asked = [0.3 * least + 0.7 * most, 0.7 * least + 0.3 * most]
    out = tmp_path / "report.json"
    options = ["--latency", profiled, "--budget-ms", *asked, "--json", out]
    status, printed, err = run(capsys, "eval", model_dir, "--data", data, *options)
    assert (status, err) == (0, "")
    report = json.loads(out.read_text())
    assert [point["policy"] for point in report["points"]] == ["learned", "learned"]
    rows = report["latency"]
    assert [row["budget_ms"] for row in rows] == pytest.approx(sorted(asked))
    assert [row["price"] for row in rows] == [point["price"] for point in report["points"]]
    assert [row["price"] for row in rows] == pytest.approx([found.calibration.price(ms) for ms in sorted(asked)])
    for row in rows:
        assert f"Asked {row['budget_ms']:g} ms an image: predicted {row['predicted_ms']:.4g} ms" in printed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget-ms", "5"], "--latency"),
        (["--budget-ms", "0.0001", "--latency", "FILE"], "out of reach"),
        (["--budget-ms", "5", "--latency", "no.json"], "no.json"),
        (["--budget-ms", "5", "--latency", "FILE", "--dtype", "bfloat16"], "dtype float32 (here bfloat16)"),
        (["--budget-ms", "5", "--latency", "FILE", "--batch-size", "2"], "--batch-size 1"),
        (["--budget-ms", "5", "--latency", "FILE", "--budget", "0.5"], "one of --budget and --budget-ms"),
    ],
    ids=str,
)
def test_budgets_in_ms_that_cannot_be_are_one_line(
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,
    data: Path,
    profiled: Path,
    tmp_path: Path,
    options: list[str],
    named: str,
) -> None:
    options = [str(profiled) if part == "FILE" else part for part in options]
    out = tmp_path / "rows.csv"
    status, printed, err = run(capsys, "predict", model_dir, data, "--out", out, "--batch-size", 1, *options)
    assert (status, printed) == (2, "")
    assert err.startswith("miaformer: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not out.exists()
