"""A CSV or TSV file of paths and labels is read as it was meant, or one error names the file and the line."""

from __future__ import annotations

import csv
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from miaformer.data import open_data
from miaformer.data.label_files import LabelFile

NAMES = ("a.png", "sub/b.png", "comma, and.png", "semi;colon.png", 'quo"te.png', "über grün.png", "image", "label.png")
LABELS = st.one_of(st.sampled_from(["cat", "label", "10", "9"]), st.text(max_size=6).map(str.strip)).filter(
    lambda label: label and label.isprintable()
)
PARTS = {
    "train": "train",
    "Validation": "validation",
    "val": "validation",
    "TEST": "test",
    "calibration": "calibration",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    (root / "sub").mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (4, 4), (number, 0, 7)).save(root / name, "PNG")
    return root


def any_case(names: list[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(names).flatmap(lambda name: st.sampled_from([name, name.upper(), name.title(), f" {name}"]))


@st.composite
def listings(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, str, str]]]:
    """The suffix of a file, its text, and the (path, label, part) that it lists."""
    paths = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    with_header = draw(st.booleans())
    with_parts = with_header and draw(st.booleans())
    written = [(path, draw(LABELS), draw(st.sampled_from(sorted(PARTS)))) for path in paths]
    header = [
        draw(any_case(["path", "image", "file", "filename"])),
        draw(any_case(["label", "class", "category", "target"])),
        draw(any_case(["split", "part", "subset"])),
    ]
    rows = [list(row) if with_parts else list(row[:2]) for row in (header, *written)]
    if with_header:
        for row, more in zip(rows, ["width", *["7"] * len(written)], strict=True):
            row.append(more)
        order = draw(st.permutations(range(len(rows[0]))))
        rows = [[row[place] for place in order] for row in rows]
    else:
        del rows[0]
        assume(rows[0] != ["image", "label"])  # which is a header, whatever it was meant for
    suffix = draw(st.sampled_from([".csv", ".tsv", ".CSV"]))
    stream = io.StringIO()
    writer = csv.writer(
        stream,
        delimiter="\t" if suffix == ".tsv" else draw(st.sampled_from(",;\t|")),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
    )
    writer.writerows(rows)
    bom = draw(st.sampled_from(["", "\N{ZERO WIDTH NO-BREAK SPACE}"]))
    return suffix, bom + stream.getvalue(), [(p, c, PARTS[s] if with_parts else "all") for p, c, s in written]


@given(listings())
def test_what_is_written_is_what_is_read(pictures: Path, listing: tuple[str, str, list[tuple[str, str, str]]]) -> None:
    suffix, text, expected = listing
    file = pictures / f"labels{suffix}"
    file.write_bytes(text.encode())
    source = LabelFile(file)
    assert source.parts == {part for _, _, part in expected}
    for part in source.parts:
        wanted = [(path, label) for path, label, own in expected if own == part]
        named = {label for _, label, own in expected if own == ("train" if "train" in source.parts else part)}
        if {label for _, label in wanted} - named:
            with pytest.raises(ValueError, match=r"labels\.\w+, line \d+: class .* is not among"):
                source.read(part)
            continue
        data = source.read(part)
        assert [(data.paths[i], data.classes[label]) for i, label in enumerate(data.labels)] == [
            (pictures / path, label) for path, label in wanted
        ]
        assert data.classes == sorted(named, key=int if all(map(str.isdecimal, named)) else None)
        assert [data[i][0].getpixel((0, 0))[0] for i in range(len(data))] == [NAMES.index(p) for p, _ in wanted]


def listed(root: Path, count: int, text: str | None = None) -> Path:
    """labels.csv with `count` pictures of two classes beside it, or with this text."""
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 7)).save(root / f"{number}.png")
    rows = "".join(f"{number}.png,{'ab'[number % 2]}\n" for number in range(count))
    file = root / "labels.csv"
    file.write_text(f"path,label\n{rows}" if text is None else text)
    return file


def test_the_same_splits_are_made_as_of_folders(tmp_path: Path) -> None:
    file = listed(tmp_path, 40)
    (tmp_path / "folders").mkdir()
    for number in range(40):
        folder = tmp_path / "folders" / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        (tmp_path / f"{number}.png").rename(folder / f"{number:02}.png")
    file.write_text("".join(f"folders/{c}/{n:02}.png,{c}\n" for c in "ab" for n in range("ab".index(c), 40, 2)))
    for split in ("train", "calibration", "test"):
        ours, folders = open_data(file, split), open_data(tmp_path / "folders", split)  # type: ignore[arg-type]
        assert ours.classes == folders.classes == ["a", "b"]
        assert np.array_equal(ours.labels, folders.labels)
        for index in range(len(ours)):
            assert ours[index][0].tobytes() == folders[index][0].tobytes()


def test_paths_may_be_absolute_and_lie_outside(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    listed(tmp_path, 2)
    file = tmp_path / "lists" / "all.tsv"
    file.write_text(f"{tmp_path / '0.png'}\tx\n../1.png\ty\n")
    data = LabelFile(file).read("all")
    assert [data[i][0].getpixel((0, 0))[0] for i in range(2)] == [0, 1]
    assert pickle.loads(pickle.dumps(data)).paths == data.paths  # workers are sent it


def test_numbers_are_sorted_by_value_and_names_as_text(tmp_path: Path) -> None:
    numbers = listed(tmp_path, 3, "0.png,10\n1.png,9\n2.png,9\n")
    data = LabelFile(numbers).read("all")
    assert (data.classes, data.labels.tolist()) == (["9", "10"], [1, 0, 0])
    listed(tmp_path, 3, "0.png,10\n1.png,9\n2.png,x\n")
    assert LabelFile(numbers).read("all").classes == ["10", "9", "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n , \n", "the file is empty"),
        ("path,label\n", "no pictures are listed after the header"),
        ("path,species\n0.png,a\n", "line 1: no label column among path, species; call it one of label, class"),
        ("photo,label\n0.png,a\n", "line 1: no path column among photo, label; call it one of path, image"),
        ("photo,species\n0.png,a\n", r"line 1: no picture '.*photo'; a header would name its columns"),
        ("path,label\n0.png,a\n\n9.png,a\n", r"line 4: no picture '.*9\.png'$"),
        ("path,label\n0.png,a\n,a\n", "line 3: no picture"),
        ("path,label\n0.png,a\n.,a\n", "line 3: no picture"),
        ("path,label\n0.png,a\n1.png, \n", "line 3: no label for '1.png'"),
        ("path,label\n0.png,a,b\n", "line 2: 3 fields; the header has 2. Quote fields"),
        ("path,label\n0.png\n", "line 2: 1 field; the header has 2"),
        ("0.png,a,train\n1.png,b,val\n", "line 1: 3 fields; without a header"),
        ("path,label,split\n0.png,a,train\n1.png,b,dev\n", "line 3: split 'dev' is none of train, val, test"),
        ("path,label\n0.png,a\n1.png,b\n./0.png,b\n", "line 4: './0.png' is listed already, in line 2"),
        ('path,label\n0.png,"a\nb', "line 2: unexpected end of data"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    file = listed(tmp_path, 2, text)
    with pytest.raises(ValueError, match=rf"labels\.csv(, |: ){message}"):
        open_data(file, "train")


def test_what_is_not_utf_8_is_named(tmp_path: Path) -> None:
    file = listed(tmp_path, 2)
    file.write_bytes("0.png,Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: not UTF-8"):
        open_data(file, "train")


def test_a_folder_with_a_list_and_no_class_folders_points_to_the_list(tmp_path: Path) -> None:
    file = listed(tmp_path, 2)
    with pytest.raises(
        ValueError, match=r"no class folders.*If labels\.csv lists the pictures, give that file"
    ) as error:
        open_data(tmp_path, "train")
    assert str(file) in str(error.value)


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    file = listed(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    data: Any = LabelFile(file).read("all")
    assert data[2][1] == 0
    with pytest.raises(ValueError, match=r"1\.png"):
        data[1]
