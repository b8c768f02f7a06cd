"""Folders of parquet files as Hugging Face `datasets` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miaformer.data.extras import require
from miaformer.data.source import ImageData
from miaformer.data.splits import UNSPLIT, canonical_part
from miaformer.images import ImageError, open_image

MAX_RESIDENT_BYTES = 4 << 30  # encoded images are held in memory, shared by forked workers

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


class ParquetImages(ImageData):
    """The rows of some parquet files; their encoded images are held in memory and decoded when asked for."""

    def __init__(self, name: str, files: list[Path], root: Path) -> None:
        self.name = name
        self._root = root
        size = sum(file.stat().st_size for file in files)
        if size > MAX_RESIDENT_BYTES:
            raise ValueError(
                f"{name}: {size / 2**30:.1f} GiB of parquet files are more than the "
                f"{MAX_RESIDENT_BYTES / 2**30:.0f} GiB that are held in memory; open it as "
                f"'hfds/{root.resolve()}', which maps its files into memory"
            )
        self.classes, self.labels = [], np.empty(0, dtype=np.int64)
        self._image_column, label_column, names = _columns(files[0])
        self._tables: list[Any] = [_read_columns(file, [self._image_column, label_column]) for file in files]
        self._files = files
        self._first_row = np.cumsum([0] + [table.num_rows for table in self._tables])
        self.labels = self._checked_labels(label_column, names)
        self.classes = names or [str(label) for label in range(int(self.labels.max()) + 1)]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: no row {index}, it has {len(self)}")
        label = int(self.labels[index])
        table, row = self._locate(index % len(self))
        stored = stored_picture(self._tables[table].column(self._image_column)[row].as_py(), self._root)
        where = f"{self._files[table]}, row {row}"
        if stored is None:
            raise ImageError(f"{where}: it has no image: neither bytes nor a path")
        return open_image(stored, name=where if isinstance(stored, bytes) else f"{where} ({stored})"), label

    def _locate(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return table, index - int(self._first_row[table])

    def _checked_labels(self, column: str, names: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        labels = np.concatenate([table.column(column).to_numpy() for table in self._tables])
        integral = np.issubdtype(labels.dtype, np.integer)
        if not len(labels):
            raise ValueError(f"{self.name}: its parquet files have no rows")
        bad = np.flatnonzero((labels < 0) | (labels >= (len(names) or np.inf))) if integral else np.arange(1)
        if len(bad):
            table, row = self._locate(int(bad[0]))
            found = labels.tolist()[bad[0]]
            expected = f"a whole number from 0 to {len(names) - 1}" if names else "a whole number from 0"
            raise ValueError(f"{self._files[table]}, row {row}: {column} is {found!r}, not {expected}")
        return labels.astype(np.int64)


class ParquetFolder:
    """A folder with parquet files in it, in `data/`, or in folders named for a split; or one such file.

    `train.parquet`, `train-00000-of-00003.parquet`, `data/test-00000-of-00001.parquet`, `train/0000.parquet`.
    The image column holds {bytes, path} or bytes, the label column (`label`, `labels` or `fine_label`) whole
    numbers. Class names come from the `datasets` metadata, else they are the numbers.
    """

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self._root = root if root.is_dir() else root.parent
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
        return ParquetImages(name, self._files[part], self._root)


def parquet_files(root: Path) -> list[Path]:
    """The parquet files of a data set, sorted; `root` itself if it is one."""
    if root.is_file():
        return [root] if root.suffix.lower() == ".parquet" else []
    folders = [root] + [path for path in root.iterdir() if path.name == "data" or canonical_part(path.name)]
    return sorted(file for folder in folders for file in folder.glob("*.parquet") if not file.name.startswith("."))


def image_column(schema: Any) -> str | None:
    """The column of a parquet file's Arrow schema that holds pictures, as {bytes, path} or bytes; None: there is none.

    The `datasets` metadata says; else its name does, else its type.
    """
    types = require("pyarrow").types
    images = _declared(schema, "Image")
    images += [name for name in _IMAGE_COLUMNS if name in schema.names]
    images += [field.name for field in schema if types.is_struct(field.type) or types.is_binary(field.type)]
    return images[0] if images else None


def stored_picture(value: Any, root: Path) -> bytes | Path | None:
    """A picture as a row of a parquet file holds it: encoded, or in a file named from `root` on; None: neither."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    return root / path if isinstance(path, str) else None


def open_parquet(file: Path, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile`; options are its own. Raises ValueError, naming it, where it cannot be read."""
    try:
        return require("pyarrow.parquet").ParquetFile(file, **options)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def _features(schema: Any) -> dict[str, Any]:
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = described.get("info", {}).get("features", {})
    return features


def _declared(schema: Any, kind: str) -> list[str]:
    """The columns that the `datasets` metadata declares to be of a kind: `Image`, `ClassLabel`."""
    features = _features(schema)
    of_kind = {name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind}
    return [name for name in schema.names if name in of_kind]


def _columns(file: Path) -> tuple[str, str, list[str]]:
    """The image column, the label column and the class names ([] if it does not say) of a parquet file."""
    schema = open_parquet(file).schema_arrow
    image = image_column(schema)
    labels = [name for name in _LABEL_COLUMNS if name in schema.names] + _declared(schema, "ClassLabel")
    if image is None or not labels:
        what = "image" if image is None else "label"
        raise ValueError(
            f"{file}: no {what} column among {', '.join(schema.names)}; expected an image column of "
            f"{{bytes, path}} or bytes, and a label column called {', '.join(_LABEL_COLUMNS)}"
        )
    names = _features(schema).get(labels[0], {}).get("names") or []
    return image, labels[0], [str(name) for name in names]


def _read_columns(file: Path, columns: list[str]) -> Any:
    opened = open_parquet(file)
    missing = set(columns) - set(opened.schema_arrow.names)
    if missing:
        raise ValueError(f"{file}: no column {sorted(missing)[0]!r}, which the other files have")
    try:
        return opened.read(columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged parquet file: {error}") from error
