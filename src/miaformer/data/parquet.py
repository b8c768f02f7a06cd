"""Folders of parquet files as Hugging Face `datasets` writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miaformer.data.columns import Columns
from miaformer.data.images import ImageError, open_image
from miaformer.data.parquet_columns import (
    NoColumnError,
    image_column,
    label_column,
    listed_files,
    open_parquet,
    stored_picture,
)
from miaformer.data.source import ImageData
from miaformer.data.splits import UNSPLIT, canonical_part

MAX_RESIDENT_BYTES = 4 << 30  # encoded images are held in memory, shared by forked workers


class ParquetImages(ImageData):
    """The rows of some parquet files; their encoded images are held in memory and decoded when asked for.

    `naming`: the files whose labels, where they are text, are the classes. `labelled`: False lets labels be missing.
    """

    def __init__(
        self, name: str, files: list[Path], root: Path, columns: Columns, naming: list[Path], labelled: bool
    ) -> None:
        self.name = name
        self._root, self._named = root, columns
        size = sum(file.stat().st_size for file in files)
        if size > MAX_RESIDENT_BYTES:
            raise ValueError(
                f"{name}: {size / 2**30:.1f} GiB of parquet files are more than the "
                f"{MAX_RESIDENT_BYTES / 2**30:.0f} GiB that are held in memory; open it as "
                f"'hfds/{root.resolve()}', which maps its files into memory"
            )
        first = next((file for file in files if open_parquet(file).metadata.num_rows), files[0])
        opened = open_parquet(first)
        self._image_column = image_column(opened, str(first), (first.parent, root), columns.image)
        label, names = None, list[str]()
        try:
            label, names = label_column(opened, str(first), columns.label)
        except NoColumnError:
            if labelled or columns.label is not None:
                raise
        wanted = [self._image_column, *([] if label is None else [label])]
        self._tables: list[Any] = [_read_columns(file, wanted) for file in files]
        self._files = files
        self._first_row = np.cumsum([0] + [table.num_rows for table in self._tables])
        if label is None:
            self.labels, self.classes = np.zeros(int(self._first_row[-1]), dtype=np.int64), ["unlabelled"]
        else:
            self.labels, self.classes = self._read_labels(label, names, naming)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: no row {index}, it has {len(self)}")
        label = int(self.labels[index])
        table, row = self._locate(index % len(self))
        file = self._files[table]
        stored = stored_picture(self._tables[table].column(self._image_column)[row].as_py(), (file.parent, self._root))
        where = f"{file}, row {row}"
        if stored is None:
            raise ImageError(f"{where}: it has no image: column {self._image_column!r} holds neither bytes nor a path")
        return open_image(stored, name=where if isinstance(stored, bytes) else f"{where} ({stored})"), label

    def _locate(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return table, index - int(self._first_row[table])

    def _read_labels(
        self, column: str, names: list[str], naming: list[Path]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[str]]:
        """Labels, checked, and the classes they number."""
        found = [label for table in self._tables for label in table.column(column).to_pylist()]
        if not found:
            raise ValueError(f"{self.name}: its parquet files have no rows")
        expected = f"a whole number from 0 to {len(names) - 1}" if names else "a whole number from 0"
        if isinstance(next((label for label in found if label is not None), None), str) and not names:
            same = naming is self._files
            texts = found if same else [label for file in naming for label in self._labels_of(file)]
            classes = sorted({label for label in texts if isinstance(label, str) and label})
            number = {label: place for place, label in enumerate(classes)}
            found = [number.get(label, label) for label in found]
            expected = "one of the classes to train on" if not same else "text"
        else:
            classes = names
        most = len(classes) or np.inf
        for place, label in enumerate(found):
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < most:
                table, row = self._locate(place)
                shown = "null" if label is None else repr(label)
                raise ValueError(f"{self._files[table]}, row {row}: {column} is {shown}, not {expected}")
        labels = np.asarray(found, dtype=np.int64)
        return labels, classes or [str(label) for label in range(int(labels.max()) + 1)]

    def _labels_of(self, file: Path) -> list[Any]:
        column, _ = label_column(open_parquet(file), str(file), self._named.label)
        labels: list[Any] = _read_columns(file, [column]).column(0).to_pylist()
        return labels


class ParquetFolder:
    """A folder with parquet files in it, in `data/`, or in folders named for a split; or one such file.

    `train.parquet`, `train-00000-of-00003.parquet`, `data/test-00000-of-00001.parquet`, `train/0000.parquet`.
    The image column holds {bytes, path}, bytes, or paths from the file's folder on; the label column whole numbers,
    named by the `datasets` metadata or by themselves, or text: then classes are those of train, sorted. Which columns
    these are is found by looking (`parquet_columns`) where `columns` does not name them.
    """

    def __init__(self, root: Path, columns: Columns | None = None, labelled: bool = True) -> None:
        self.name, self._labelled = str(root), labelled
        self._root = root if root.is_dir() else root.parent
        self._columns = columns or Columns()
        self._files: dict[str, list[Path]] = {}
        for file in parquet_files(root):
            words = [
                *re.split(r"[^a-z]+", file.stem.lower()),
                file.parent.name if file.parent != self._root else "",
            ]
            part = next((part for word in words if (part := canonical_part(word))), UNSPLIT)
            self._files.setdefault(part, []).append(file)
        if UNSPLIT in self._files and len(self._files) > 1:
            raise ValueError(f"{self._files[UNSPLIT][0]}: its name says no split, but other files' names beside it do")

    @property
    def parts(self) -> set[str]:
        return set(self._files)

    def read(self, part: str) -> ParquetImages:
        name = self.name if part == UNSPLIT else f"{self.name} ({part})"
        files = self._files[part]
        naming = self._files.get("train", files)
        return ParquetImages(name, files, self._root, self._columns, naming, self._labelled)


def parquet_files(root: Path) -> list[Path]:
    """The parquet files of a data set, sorted; `root` itself if it is one."""
    if root.is_file():
        return [root] if root.suffix.lower() == ".parquet" else []
    folders = [root] + [path for path in root.iterdir() if path.name == "data" or canonical_part(path.name)]
    return sorted(file for folder in folders for file in folder.glob("*.parquet") if not file.name.startswith("."))


def holds_pictures(file: Path, root: Path) -> bool:
    """Whether a parquet file has a column of encoded pictures, or several, or cannot be read to tell: not where it
    lists files.
    """
    try:
        opened, roots = open_parquet(file), (file.parent, root)
        return not listed_files(opened, image_column(opened, str(file), roots), roots)
    except NoColumnError:
        return False
    except ValueError:
        return True


def _read_columns(file: Path, columns: list[str]) -> Any:
    opened = open_parquet(file)
    missing = set(columns) - set(opened.schema_arrow.names)
    if missing:
        raise ValueError(f"{file}: no column {sorted(missing)[0]!r}, which the other files have")
    try:
        return opened.read(columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged parquet file: {error}") from error
