"""`miaformer predict` classifies what can be read, names what cannot, and writes what the model says."""

from __future__ import annotations

import csv
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from vits import lively

from miaformer import MIAFormer, Output, cli
from miaformer.data import build_transform
from miaformer.data.images import open_image
from miaformer.model.budget import Calibration
from miaformer.model.fingerprint import fingerprint
from miaformer.prediction.classify import BatchClassifier
from miaformer.prediction.entries import Unreadable
from miaformer.prediction.predictor import Predictor

NAMES = ["ant", "bee, wild", "cat", "dog", 'the "eel"']
GOOD, BAD = 7, 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = lively(settings={"img_size": 16, "depth": 3}).float()
    model.backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "label_names": NAMES}
    with torch.inference_mode():
        images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        spent = [model.run(images, price=price).trace.macs_fraction.mean().item() for price in (0.1, 1.0, 10.0)]
    model.calibration = Calibration((0.1, 1.0, 10.0), tuple(spent), 64)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of several formats and sizes, and among them three that cannot be read."""
    generator = torch.Generator().manual_seed(2)
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    for number in range(GOOD):
        size = (12 + 5 * number, 40 - 3 * number, 3)
        spread = 1 + 250 * torch.rand((), generator=generator)
        image = Image.fromarray((torch.rand(size, generator=generator) * spread).to(torch.uint8).numpy())
        place = (root, root / "deep", root / "deep" / "er")[number % 3]
        image.save(place / f"{number}.{('png', 'jpg', 'webp')[number % 3]}")
    whole = (root / "deep" / "1.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "deep" / "text.jpg").write_text("not a picture")
    (root / "0-empty.png").write_bytes(b"")
    return root


def predict(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main(["predict", *map(str, argv), "--device", "cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def by_hand(model_dir: Path, path: str, **asked: float) -> Output:
    model = MIAFormer.from_pretrained(model_dir)
    with torch.inference_mode():
        return model.run(build_transform(model.data_config())(open_image(path))[None], **asked)


def check_row(row: dict, output: Output, top_k: int) -> None:
    """A row of numbers is what running its picture alone gives."""
    probabilities, labels = output.logits.softmax(dim=1)[0].topk(top_k)
    trace = output.trace
    assert row["label"] == labels[0].item()
    assert row["class"] == NAMES[row["label"]]
    assert row["probability"] == pytest.approx(probabilities[0].item(), abs=1e-5)
    assert [label for label, _ in row["top_k"]] == labels.tolist()
    assert [share for _, share in row["top_k"]] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert row["macs_fraction"] == pytest.approx(trace.macs_fraction.item(), abs=1e-6)
    assert row["depth_kept"] == pytest.approx(trace.depth.float().mean().item())
    if trace.depth.any():
        assert row["heads_kept"] == pytest.approx(trace.heads[trace.depth].float().mean().item())
        assert row["tokens_kept"] == pytest.approx(trace.tokens[trace.depth].float().mean().item())


def read_csv(path: Path) -> list[dict]:
    rows = []
    for row in csv.DictReader(path.read_text().splitlines()):
        if not row["error"]:
            pairs = [pair.split(":") for pair in row["top_k"].split()]
            row["top_k"] = [(int(label), float(share)) for label, share in pairs]
            row["label"] = int(row["label"])
            for name in ("probability", "macs_fraction", "depth_kept", "heads_kept", "tokens_kept"):
                row[name] = float(row[name])
        rows.append(row)
    return rows


def read_jsonl(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if "error" not in row:
            assert [entry["class"] for entry in row["top_k"]] == [NAMES[entry["label"]] for entry in row["top_k"]]
            row["top_k"] = [(entry["label"], entry["probability"]) for entry in row["top_k"]]
    return rows


def read_parquet(path: Path) -> list[dict]:
    rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    for row in rows:
        if row["error"] is None:
            row["top_k"] = [(entry["label"], entry["probability"]) for entry in row["top_k"]]
    return rows


@pytest.mark.parametrize(("suffix", "read"), [("csv", read_csv), ("jsonl", read_jsonl), ("parquet", read_parquet)])
def test_bad_pictures_stop_nothing_and_are_listed(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path, suffix: str, read
) -> None:
    out_path = tmp_path / "new" / f"rows.{suffix}"
    status, out, err = predict(
        capsys, model_dir, folder, "--out", out_path, "--budget", 0.5, "--top-k", 3, "--batch-size", 2
    )
    assert status == 1
    rows = read(out_path)
    assert [row["path"] for row in rows] == sorted(str(path) for path in folder.rglob("*.*"))
    good = [row for row in rows if not row.get("error")]
    assert len(good) == GOOD
    for row in good:
        check_row(row, by_hand(model_dir, row["path"], budget=0.5), top_k=3)
    assert len({row["macs_fraction"] for row in good}) > 1  # each by its own decisions
    bad = {Path(row["path"]).name: row["error"] for row in rows if row.get("error")}
    assert len(bad) == BAD
    assert "empty" in bad["0-empty.png"]
    assert "not a picture" in bad["text.jpg"]
    assert "truncated" in bad["truncated.jpg"]
    assert f"{GOOD} pictures" in out
    assert f"{BAD} failed" in err
    for name in bad:
        assert name in err


def test_a_folder_of_good_pictures_succeeds(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    for bad in ("truncated.jpg", "deep/text.jpg", "0-empty.png"):
        (folder / bad).unlink()
    out_path = tmp_path / "rows.csv"
    status, out, err = predict(capsys, model_dir, folder, "--out", out_path, "--cap", 0.4)
    assert (status, err) == (0, "")
    rows = read_csv(out_path)
    assert len(rows) == GOOD
    assert all(row["macs_fraction"] <= 0.4 for row in rows)
    for row in rows:
        check_row(row, by_hand(model_dir, row["path"], cap=0.4), top_k=5)
    assert "cap 0.4, which is the budget too" in out


def test_a_picture_named_twice_is_classified_once_and_a_missing_one_is_listed(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    out_path = tmp_path / "rows.jsonl"
    named = [folder / "0.png", folder / "deep" / "er", folder / "0.png", folder / "gone.png"]
    status, _, err = predict(capsys, model_dir, *named, "--out", out_path)
    assert status == 1
    rows = read_jsonl(out_path)
    assert [Path(row["path"]).name for row in rows] == ["0.png", "2.webp", "5.webp", "gone.png"]
    assert "gone.png" in err
    assert "no such file or folder" in err


def test_where_nothing_is_found_nothing_is_written(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    out_path = tmp_path / "rows.csv"
    status, out, err = predict(capsys, model_dir, tmp_path / "empty", tmp_path / "gone", "--out", out_path)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "no pictures in this folder" in err
    assert "no such file or folder" in err
    assert not out_path.exists()


def test_only_bad_pictures_is_a_failure_too(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    out_path = tmp_path / "rows.csv"
    status, out, err = predict(capsys, model_dir, folder / "truncated.jpg", "--out", out_path)
    assert (status, out) == (1, "")
    assert "1 failed" in err
    assert len(read_csv(out_path)) == 1


def test_class_names_come_from_a_file_before_the_model(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"Klasse {label} ü" for label in range(5)) + "\n", encoding="utf-8")
    out_path = tmp_path / "rows.jsonl"
    assert predict(capsys, model_dir, folder / "0.png", "--out", out_path, "--classes", names)[0] == 0
    row = json.loads(out_path.read_text())
    assert row["class"] == f"Klasse {row['label']} ü"
    names.write_text("one\ntwo\n")
    status, _, err = predict(capsys, model_dir, folder / "0.png", "--out", out_path, "--classes", names)
    assert status == 2
    assert "has 2 lines, the model 5 classes" in err


def test_markup_in_a_name_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "[bold]odd.jpg"
    odd.write_text("no")
    _, _, err = predict(capsys, model_dir, odd, "--out", tmp_path / "[red]rows.csv")
    assert "[bold]odd.jpg" in err.replace("\n", "")


def test_shards_and_files_mix_and_say_the_same_of_the_same_picture(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    with tarfile.open(tmp_path / "shard.tgz", "w:gz") as tar:
        for path in files:
            tar.add(path, path.name)
    column = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    table = pyarrow.table({"img": column})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "shard.parquet")
    out_path = tmp_path / "rows.jsonl"
    named = [tmp_path / "shard.tgz", f"{folder}/**/*.*", tmp_path / "shard.parquet"]
    status, _, err = predict(capsys, model_dir, *named, "--out", out_path, "--budget", 0.5, "--batch-size", 4)
    assert status == 1
    assert f"{3 * BAD} failed" in err
    rows = read_jsonl(out_path)
    thirds = [rows[: len(files)], rows[len(files) : 2 * len(files)], rows[2 * len(files) :]]
    assert [row["path"] for row in thirds[0]] == [str(tmp_path / "shard.tgz" / path.name) for path in files]
    assert [row["path"] for row in thirds[1]] == [str(path) for path in files]
    assert [row["path"] for row in thirds[2]] == [f"{tmp_path / 'shard.parquet'}/{row}" for row in range(len(files))]
    for same in zip(*thirds, strict=True):
        first = same[0]
        for row in same[1:]:
            assert row.get("error") == first.get("error")
            if "error" not in row:
                assert row["label"] == first["label"]
                assert row["probability"] == pytest.approx(first["probability"], abs=1e-5)
                assert row["macs_fraction"] == pytest.approx(first["macs_fraction"], abs=1e-6)


def test_of_many_failures_the_first_are_listed_and_the_rest_counted(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    for number in range(25):
        (tmp_path / f"bad{number:02}.png").write_text("no")
    out_path = tmp_path / "rows.csv"
    status, out, err = predict(capsys, model_dir, tmp_path, "--out", out_path)
    assert (status, out) == (1, "")
    assert "25 failed" in err
    assert "bad19.png" in err
    assert "bad20.png" not in err
    assert "... and 5 more: see the error column" in err
    assert len(read_csv(out_path)) == 25


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_name_that_is_no_text_is_written_out(
    capsys: pytest.CaptureFixture[str], model_dir: Path, folder: Path, tmp_path: Path, suffix: str
) -> None:
    odd = os.fsencode(folder / "caf") + b"\xe9.png"
    os.rename(folder / "0.png", odd)
    (folder / os.fsdecode(b"br\xf6ken.png")).write_text("no")
    out_path = tmp_path / f"rows.{suffix}"
    status, _, err = predict(capsys, model_dir, folder, "--out", out_path)
    assert status == 1
    rows = {"csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}[suffix](out_path)
    names = [Path(row["path"]).name for row in rows]
    assert "caf\\udce9.png" in names
    assert "br\\udcf6ken.png" in names
    assert "br\\udcf6ken.png" in err.replace("\n", "")


def test_a_batch_is_classified_without_the_command(model_dir: Path, folder: Path) -> None:
    """As a worker elsewhere does: names with bytes or paths in, rows out."""
    classify = BatchClassifier(Predictor(MIAFormer.from_pretrained(model_dir)), top_k=2, budget=0.5)
    picture = folder / "0.png"
    rows = classify([("a", picture.read_bytes()), ("b", b"no"), ("c", picture), ("d", Unreadable("gone"))])
    assert [row["path"] for row in rows] == ["a", "b", "c", "d"]
    assert "not a picture" in rows[1]["error"]
    assert rows[3] == {"path": "d", "error": "gone"}
    assert {**rows[0], "path": "c"} == rows[2]
    assert len(rows[0]["top_k"]) == 2
    assert rows[0]["macs_fraction"] == pytest.approx(
        by_hand(model_dir, str(picture), budget=0.5).trace.macs_fraction.item(), abs=1e-6
    )
    with pytest.raises(ValueError, match="budget"):
        BatchClassifier(classify.predictor, budget=2.0)


def test_a_fingerprint_tells_models_apart(model_dir: Path) -> None:
    model = MIAFormer.from_pretrained(model_dir)
    first = fingerprint(model)
    assert fingerprint(MIAFormer.from_pretrained(model_dir)) == first
    model.label_names = [*NAMES[:-1], "fox"]
    other = fingerprint(model)
    assert other != first
    model.calibration = None
    assert fingerprint(model) not in (first, other)
    model = MIAFormer.from_pretrained(model_dir)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != first
