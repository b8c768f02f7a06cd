"""The columns of a table that hold pictures and labels are found by looking, or named; each mistake names them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image

from miaformer.data import open_data
from miaformer.data.columns import Columns, split_columns, with_columns
from miaformer.data.images import ImageError
from miaformer.prediction.entries import SourceError, Unreadable
from miaformer.prediction.sources import find_inputs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
N = 20


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def open_pixels(encoded: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def distractors(rng: np.random.Generator) -> dict[str, Any]:
    """Columns as they lie beside pictures, none of which holds any."""
    return {
        "hash": pa.array([rng.bytes(16) for _ in range(N)], pa.binary()),
        "digest": pa.array([rng.bytes(8) for _ in range(N)], pa.binary(8)),
        "bbox": pa.array([{"x": 1.0, "y": 2.0}] * N),
        "exif": pa.array([{"bytes": b"Exif\0\0", "path": None}] * N, STRUCT),
        "caption": pa.array([f"a picture of {k}.png" for k in range(N)]),
        "url": pa.array([f"https://example.org/{k}.png" for k in range(N)]),
        "thumbnail": pa.array([None] * N, pa.binary()),
        "embedding": pa.array([[0.5, 1.5]] * N),
        "nothing": pa.nulls(N),
    }


def stored(kind: str, folder: Path, contents: list[bytes | None]) -> Any:
    if kind == "struct":
        return pa.array([None if one is None else {"bytes": one, "path": "x.png"} for one in contents], STRUCT)
    if kind in ("string", "large_string", "string_view", "struct of paths"):
        (folder / "deep").mkdir(exist_ok=True)
        paths: list[str | None] = []
        for k, one in enumerate(contents):
            if one is not None:
                (folder / "deep" / f"{k}.png").write_bytes(one)
            paths.append(None if one is None else f"deep/{k}.png")
        if kind == "struct of paths":
            return pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
        return pa.array(paths, getattr(pa, kind)())
    return pa.array(contents, getattr(pa, kind)())


KINDS = ["binary", "large_binary", "binary_view", "struct", "string", "large_string", "string_view", "struct of paths"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_found_among_any_columns(tmp_path: Path, kind: str, seed: int) -> None:
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    contents: list[bytes | None] = [png(k) for k in range(N)]
    for row in rng.choice(N, 2, replace=False):
        contents[row] = None
    columns = distractors(rng)
    name = str(rng.choice(["image", "img", "photo", "content", "file_name", "image.v2"]))
    if rng.random() < 0.5:  # the usual name, on something else
        columns["img" if name == "image" else "image"] = columns.pop("hash")
    columns[name] = stored(kind, tmp_path, contents)
    columns["label"] = pa.array([k % 2 for k in range(N)])
    order = rng.permutation(list(columns))
    path = tmp_path / "all.parquet"
    pq.write_table(pa.table({key: columns[key] for key in order}), path)

    found = [entry.content for _, entry in find_inputs([path]).entries()]
    read = [one.read_bytes() if isinstance(one, Path) else one for one in found]
    for got, expected in zip(read, contents, strict=True):
        if expected is None:
            assert isinstance(got, Unreadable)
            assert repr(name) in got.reason
        else:
            assert got == expected
    at = {open_pixels(one).tobytes(): k for k, one in enumerate(contents) if one is not None}
    seen, said = [], []
    for split in ("train", "calibration", "test"):
        data = open_data(path, split)
        for k, label in enumerate(data.labels):
            try:
                picture, _ = data[k]
            except ImageError as error:
                said.append(str(error))
                continue
            seen.append(at[np.asarray(picture).tobytes()])
            assert seen[-1] % 2 == label
    assert sorted(seen) == sorted(at.values())
    assert len(said) == 2
    assert all(f"column {name!r} holds neither" in one for one in said)


def test_two_columns_of_pictures_are_asked_about(tmp_path: Path) -> None:
    columns = {
        "before": pa.array([png(k) for k in range(20)], pa.binary()),
        "after": pa.array([png(100 + k) for k in range(20)], pa.binary()),
        "kind": pa.array(["cat", "dog"] * 10),
        "species": pa.array([0, 1] * 10),
    }
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(columns), path)
    (entry,) = (entry for _, entry in find_inputs([path]).entries())
    assert isinstance(entry.content, Unreadable)
    assert entry.content.reason == "columns before and after both hold pictures: name one (--image-column)"
    with pytest.raises(ValueError, match="before and after both hold pictures"):
        open_data(path, "test")
    assert next(entry.content for _, entry in find_inputs([path], "after").entries()) == png(100)
    with pytest.raises(ValueError, match=r"no label column among before, after, kind, species.*--label-column"):
        open_data(with_columns(str(path), "after", None), "test")
    named = open_data(with_columns(str(path), "after", "kind"), "train")
    assert named.classes == ["cat", "dog"]
    numbered = open_data(with_columns(str(path), "after", "species"), "train")
    assert numbered.classes == ["0", "1"]
    assert numbered.labels.tolist() == named.labels.tolist()
    for column, message in (("nose", "is not there"), ("species", "holds int64")):
        with pytest.raises(SourceError, match=f"column '{column}' {message}"):
            find_inputs([path], column)
        with pytest.raises(ValueError, match=f"column '{column}' {message}"):
            open_data(with_columns(str(path), column, "kind"), "train")


def test_names_say_which_of_several_columns_of_pictures(tmp_path: Path) -> None:
    columns = {
        "mask": pa.array([png(50 + k) for k in range(N)], pa.binary()),
        "image": pa.array([png(k) for k in range(N)], pa.binary()),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert next(entry.content for _, entry in find_inputs([path]).entries()) == png(0)
    described = {"info": {"features": {"mask": {"_type": "Image"}}}}
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(described)}), path)
    assert next(entry.content for _, entry in find_inputs([path]).entries()) == png(50)  # it says so itself


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": null}', '{"info": {"features": null}}', "null", '"x"'])
def test_metadata_that_says_nothing_is_none(tmp_path: Path, metadata: str) -> None:
    table = pa.table({"image": pa.array([png(k) for k in range(20)], pa.binary()), "label": [0, 1] * 10})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    assert open_data(tmp_path, "train").classes == ["0", "1"]


def test_a_null_label_is_told_by_its_row(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(k) for k in range(4)], pa.binary()), "label": [0, 1, None, 1]})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet, row 2: label is null"):
        open_data(tmp_path, "test")


def test_text_labels_are_the_classes_of_train(tmp_path: Path) -> None:
    for name, labels in (("train", ["dog", "cat", "ant"]), ("test", ["dog", "dog", "cat"])):
        table = pa.table({"image": pa.array([png(k) for k in range(3)], pa.binary()), "label": labels})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = open_data(tmp_path, "test")
    assert (data.classes, data.labels.tolist()) == (["ant", "cat", "dog"], [2, 2, 1])
    pq.write_table(table.set_column(1, "label", pa.array(["dog", "fox", "cat"])), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"row 1: label is 'fox', not one of the classes to train on"):
        open_data(tmp_path, "test")


def test_a_table_about_pictures_beside_them_adds_none(tmp_path: Path) -> None:
    for k in range(40):
        path = tmp_path / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(k))
    about = {"file_name": [f"{('cat', 'dog')[k % 2]}/{k}.png" for k in range(40)], "width": [8] * 40}
    pq.write_table(pa.table(about), tmp_path / "metadata.parquet")
    assert len(list(find_inputs([tmp_path]).entries())) == 40
    pq.write_table(pa.table({"width": [8] * 40}), tmp_path / "sizes.parquet")
    (tmp_path / "metadata.parquet").unlink()
    assert open_data(tmp_path, "train").classes == ["cat", "dog"]
    elsewhere = tmp_path / "dog"
    pq.write_table(pa.table({"photo": [f"../cat/{k}.png" for k in range(0, 40, 2)]}), elsewhere / "more.parquet")
    assert len(list(find_inputs([elsewhere]).entries())) == 40  # its own, and those that a table names elsewhere


def test_a_spec_names_columns(tmp_path: Path) -> None:
    for image, label in (("photo", None), (None, "kind"), ("a b", "c&d=?")):
        spec = with_columns("photos.parquet", image, label)
        assert split_columns(spec) == ("photos.parquet", Columns(image, label))
        assert with_columns(spec, None, None) == spec
    odd = tmp_path / "what?image=x"
    odd.mkdir()
    assert split_columns(str(odd)) == (str(odd), Columns())
    with pytest.raises(ValueError, match=r"\?image=COLUMN&label=COLUMN"):
        split_columns("photos.parquet?picture=a")
    with pytest.raises(ValueError, match="columns are named of a CSV"):
        open_data(f"{tmp_path}?label=a", "train")


def test_columns_of_a_csv_file_can_be_named(tmp_path: Path) -> None:
    lines = ["id,picture,kind,label"]
    for k in range(20):
        (tmp_path / f"{k}.png").write_bytes(png(k))
        lines.append(f"{k},{k}.png,{'cat' if k % 2 else 'dog'},{k}")
    file = tmp_path / "list.csv"
    file.write_text("\n".join(lines))
    assert open_data(with_columns(str(file), "picture", "kind"), "train").classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"list\.csv, line 1: no column 'nose' among id, picture, kind, label"):
        open_data(with_columns(str(file), "nose", "kind"), "train")


def test_commands_take_names_of_columns(tmp_path: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["class0", "class1", "class2"] * 10
    columns = {"a": [png(k) for k in range(30)], "b": [png(100 + k) for k in range(30)], "kind": kinds}
    data = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), data)
    evaluate = ("eval", calibrated, "--data", data, "--budgets", 0.7)
    status, _, said = run(capsys, *evaluate)
    assert status == 2
    assert "name one (--image-column)" in said
    status, printed, said = run(capsys, *evaluate, "--image-column", "a", "--label-column", "kind")
    assert status == 0, said
    assert "0.7" in printed
    out = tmp_path / "rows.csv"
    status, _, said = run(capsys, "predict", calibrated, data, "--out", out, "--image-column", "b")
    assert status == 0, said
    assert len(out.read_text().splitlines()) == 31
    status, _, said = run(capsys, "train", "--recipe", "finetune", "--label-column", "kind", "--out", tmp_path / "run")
    assert status == 2
    assert "--label-column needs --data" in said


def test_text_that_is_no_path_is_no_picture(tmp_path: Path) -> None:
    contents = [png(k) for k in range(20)]
    columns = {"image": pa.array(contents, pa.binary()), "label": [0, 1] * 10, "caption": ["a long text " * 40] * 20}
    columns["note"] = ["a\0b.png", "", "/", "..", "~/x.png", "x" * 300 + ".png"] + ["é"] * 14
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    assert len(open_data(tmp_path, "train")) == 16
    assert [entry.content for _, entry in find_inputs([tmp_path]).entries()] == contents
    table = tmp_path / "list.parquet"
    pq.write_table(pa.table({"photo": ["x" * 300 + ".png", None, "a.png", "b.png"]}), table)
    (tmp_path / "b.png").write_bytes(contents[0])
    assert len(list(find_inputs([table]).entries())) == 4
    file = tmp_path / "labels.csv"
    file.write_text(f"{'x' * 300},cat\n")
    with pytest.raises(ValueError, match="line 1: no picture"):
        open_data(file, "train")


def test_names_are_known_in_any_case(tmp_path: Path) -> None:
    columns = {"Mask": [png(k) for k in range(20)], "Image": [png(50 + k) for k in range(20)], "Label": ["a", "b"] * 10}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    assert open_data(tmp_path, "train").classes == ["a", "b"]
    assert next(entry.content for _, entry in find_inputs([tmp_path]).entries()) == png(50)
    twice = pa.table([pa.array([png(1)]), pa.array([png(2)])], names=["image", "image"])
    pq.write_table(twice, tmp_path / "all.parquet")
    with pytest.raises(ValueError, match="two columns 'image'"):
        open_data(tmp_path, "train")


def test_each_files_labels_have_their_own_column(tmp_path: Path) -> None:
    for name, column, labels in (("train", "label", [None, "dog", "cat"]), ("test", "labels", [None, "dog", "cat"])):
        table = pa.table({"image": [png(k) for k in range(3)], column: labels})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet, row 0: labels is null, not one of the classes to train on"):
        open_data(tmp_path, "test")
    pq.write_table(table.set_column(1, "labels", pa.array(["dog", "cat", "dog"])), tmp_path / "test.parquet")
    data = open_data(tmp_path, "test")
    assert (data.classes, data.labels.tolist()) == (["cat", "dog"], [1, 0, 1])


def test_a_pattern_takes_each_picture_once_too(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    about = tmp_path / "about.parquet"
    pq.write_table(pa.table({"file_name": [f"{k}.png" for k in range(3)], "label": [0, 1, 0]}), about)
    assert len(list(find_inputs([f"{tmp_path}/*"]).entries())) == 3
    assert len(list(find_inputs([f"{tmp_path}/*.parquet"]).entries())) == 3
    assert len(list(find_inputs([about]).entries())) == 3
    far = tmp_path.parent / f"{tmp_path.name}-far"
    far.mkdir()
    (far / "link").symlink_to(tmp_path)
    (far / "4.png").write_bytes(png(4))
    pq.write_table(pa.table({"file_name": ["4.png", "link/0.png"]}), far / "more.parquet")
    assert len(list(find_inputs([far]).entries())) == 4
    with pytest.raises(SourceError, match="no parquet file here has a column 'phto'"):
        find_inputs([tmp_path], "phto")


def test_class_folders_go_before_a_table_that_lists_their_pictures(tmp_path: Path) -> None:
    for k in range(40):
        path = tmp_path / ("cat", "dog")[k % 2] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(k))
    names = [f"cat/{k}.png" for k in range(0, 40, 2)]
    for columns in ({"file_name": names, "width": [8] * 20}, {"file_name": names, "label": [0] * 20}):
        pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
        assert open_data(tmp_path, "train").classes == ["cat", "dog"]


def test_digits_are_no_table() -> None:
    with pytest.raises(ValueError, match="digits: it is no table"):
        open_data("digits?label=a", "train")
