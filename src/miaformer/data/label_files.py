"""Pictures listed in a CSV or TSV file: a path and a label a line, and optionally the part it belongs to."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from miaformer.data.columns import Columns
from miaformer.data.source import PictureFiles
from miaformer.data.splits import UNSPLIT, canonical_part

SUFFIXES = (".csv", ".tsv")

# Names of columns, in any case. Of several that a header has, the first in this order counts.
_PATH = ("path", "image", "file", "filename", "file_name")
_LABEL = ("label", "class", "category", "target")
_PART = ("split", "part", "subset")

_DELIMITERS = ",;\t|"  # of a .csv; spreadsheets write the one that their language has free
_SNIFFED_ROWS = 100


@dataclass(frozen=True)
class Entry:
    """One picture of a label file, and the line that lists it."""

    path: Path
    label: str
    part: str
    line: int


class LabelFile:
    """A CSV or TSV file with a path, a label and optionally a split in each row.

    Paths are relative to the file. A header names the columns; without one, a row is a path and a label. Classes are
    the labels of the train part, sorted as text as class folders are, or by value where all of them are whole numbers.
    Everything wrong in the file, missing pictures included, is a ValueError that names the file and the line.
    """

    def __init__(self, file: Path, columns: Columns | None = None) -> None:
        self.name = str(file)
        self._entries = _read(file, columns or Columns())

    @property
    def parts(self) -> set[str]:
        return {entry.part for entry in self._entries}

    def read(self, part: str) -> PictureFiles:
        named = "train" if "train" in self.parts else part
        labels = {entry.label for entry in self._entries if entry.part == named}
        are_numbers = all(label.isdecimal() for label in labels)
        classes = sorted(labels, key=lambda label: (int(label) if are_numbers else 0, label))
        number = {label: place for place, label in enumerate(classes)}
        entries = [entry for entry in self._entries if entry.part == part]
        for entry in entries:
            if entry.label not in number:
                raise ValueError(
                    f"{self.name}, line {entry.line}: class {entry.label!r} is not among the {len(classes)} classes "
                    "to train on"
                )
        name = self.name if part == UNSPLIT else f"{self.name} ({part})"
        return PictureFiles(name, [e.path for e in entries], [number[e.label] for e in entries], classes)


def label_files(folder: Path) -> list[Path]:
    """The files in a folder that could list its pictures."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _read(file: Path, named: Columns) -> list[Entry]:
    rows = _rows(file)
    if not rows:
        raise ValueError(f"{file}: the file is empty; expected a path and a label in each line")
    columns = _header(rows[0][1], file, named)
    if columns is None:
        width, path, label, part = 2, 0, 1, None
        shape = "without a header, a line is a path and a label"
    else:
        width, (path, label, part) = len(rows.pop(0)[1]), columns
        shape = f"the header has {width}"
    if not rows:
        raise ValueError(f"{file}: no pictures are listed after the header")
    entries: dict[Path, Entry] = {}
    for line, row in rows:
        where = f"{file}, line {line}"
        if len(row) != width:
            raise ValueError(f"{where}: {len(row)} field{'s' * (len(row) != 1)}; {shape}. Quote fields with delimiters")
        entry = Entry(file.parent / row[path], row[label], UNSPLIT if part is None else _part(row[part], where), line)
        if not row[label]:
            raise ValueError(f"{where}: no label for {row[path]!r}")
        if not row[path] or not os.path.isfile(entry.path):
            hint = f"; a header would name its columns, such as {_PATH[0]},{_LABEL[0]}" if columns is None else ""
            raise ValueError(f"{where}: no picture {str(entry.path)!r}{hint}")
        if entry.path in entries:
            raise ValueError(f"{where}: {row[path]!r} is listed already, in line {entries[entry.path].line}")
        entries[entry.path] = entry
    return list(entries.values())


def _part(value: str, where: str) -> str:
    part = canonical_part(value)
    if part is None:
        raise ValueError(f"{where}: split {value!r} is none of train, val, test, calibration")
    return part


def _header(row: list[str], file: Path, named: Columns) -> tuple[int, int, int | None] | None:
    """The places of path, label and split, if the first row is a header; None where it is a picture already."""
    for name in (named.image, named.label):
        if name is not None and name not in row:
            raise ValueError(f"{file}, line 1: no column {name!r} among {', '.join(row)}")
    path, label = (
        _place(row, names) if name is None else row.index(name)
        for names, name in ((_PATH, named.image), (_LABEL, named.label))
    )
    part = _place(row, _PART)
    if path is not None and label is not None:
        return path, label, part
    if (path is None and label is None) or os.path.isfile(file.parent / row[0]):  # a class may be called "target"
        return None
    missing, names = ("path", _PATH) if path is None else ("label", _LABEL)
    raise ValueError(f"{file}, line 1: no {missing} column among {', '.join(row)}; call it one of {', '.join(names)}")


def _place(row: list[str], names: tuple[str, ...]) -> int | None:
    """Where the first of these names stands in a row."""
    found = [field.casefold() for field in row]
    return next((found.index(name) for name in names if name in found), None)


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """The rows that say something, each with the line in which it begins."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}): save it as UTF-8") from None
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(_DELIMITERS, key=lambda d: _fit(file, text, d))
    return list(_parsed(file, text, delimiter))


def _parsed(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: {error}") from None


def _fit(file: Path, text: str, delimiter: str) -> tuple[bool, bool, bool]:
    """How well a delimiter suits the first rows: best where it makes a header of known names or the path of a picture,
    then several columns, then rows of equal length. (`csv.Sniffer` guesses by frequency, and finds letters in short
    paths.)
    """
    rows: list[list[str]] = []
    with suppress(ValueError):  # told of when the rows are read
        rows += (row for _, row in islice(_parsed(file, text, delimiter), _SNIFFED_ROWS))
    first = rows[0] if rows else [""]
    is_header = _place(first, _PATH) is not None and _place(first, _LABEL) is not None
    return is_header or os.path.isfile(file.parent / first[0]), len(first) > 1, len({len(row) for row in rows}) <= 1
