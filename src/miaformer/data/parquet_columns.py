"""Which columns of a parquet file hold pictures and labels: found by what is declared, named, and in them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from miaformer.data.extras import require
from miaformer.data.images import picture_suffixes, readable_formats

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
_BYTES = {"binary", "large_binary", "binary_view", "fixed_size_binary"}  # types, as pyarrow writes them
_TEXT = {"string", "large_string", "string_view"}
_LOOKED_AT = 64  # rows of a file, the first ones


class NoColumnError(ValueError):
    """A parquet file that holds no pictures, or no labels."""


def open_parquet(file: Path, **options: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile`; options are its own. Raises ValueError, naming it, where it cannot be read."""
    try:
        return require("pyarrow.parquet").ParquetFile(file, **options)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def image_column(opened: Any, file: str, roots: Sequence[Path], named: str | None = None) -> str:
    """The column of a parquet file that holds pictures: encoded, {bytes, path}, or paths from one of the roots on.

    What is declared in the `datasets` metadata goes first, then what is called `image` or `img`, then the only one
    whose first values are pictures. Raises NoColumnError where there is none, ValueError where there are several.
    """
    schema = _schema(opened, file)
    able = [field.name for field in schema if _kinds(field.type) & (_BYTES | _TEXT)]
    if named is not None:
        if named not in able:
            what = f"holds {schema.field(named).type}" if named in schema.names else "is not there"
            raise NoColumnError(
                f"{file}: column {named!r} {what}; pictures are bytes, {{bytes, path}} or paths, here in "
                + (", ".join(able) or "no column")
            )
        return named
    declared = _declared(schema, "Image")
    holding = [name for name in able if _holds_pictures(opened, name, roots)]
    if not holding:  # no rows, or the first ones are damaged or null
        text = [field.name for field in schema if str(field.type) in _TEXT]
        usual = [name for name in able if name.casefold() in _IMAGE_NAMES and name not in text]
        holding = [name for name in able if name in declared or name in usual]
    if not holding:
        raise NoColumnError(
            f"{file}: no column of pictures among {', '.join(schema.names)}; expected encoded pictures as bytes or "
            "{bytes, path}, or paths of pictures that are there; --image-column names it"
        )
    return _only(holding, declared, _IMAGE_NAMES, file, "pictures", "--image-column")


def label_column(opened: Any, file: str, named: str | None = None) -> tuple[str, list[str]]:
    """The column of labels, and the names of classes that the `datasets` metadata gives ([]: none).

    What is declared a `ClassLabel` goes first, then what is called `label`, `labels` or `fine_label`. Raises
    NoColumnError where there is none, ValueError where there are several.
    """
    schema = _schema(opened, file)
    declared = _declared(schema, "ClassLabel")
    if named is None:
        able = declared or [name for name in schema.names if name.casefold() in _LABEL_NAMES]
        if not able:
            raise NoColumnError(
                f"{file}: no label column among {', '.join(schema.names)}; call it one of "
                f"{', '.join(_LABEL_NAMES)}, or name it (--label-column)"
            )
        named = _only(able, declared, _LABEL_NAMES, file, "labels", "--label-column")
    elif named not in schema.names:
        raise NoColumnError(f"{file}: no column {named!r} among {', '.join(schema.names)}")
    feature = _features(schema).get(named)
    names = (feature.get("names") or []) if isinstance(feature, dict) else []
    return named, [str(name) for name in names]


def stored_picture(value: Any, roots: Sequence[Path]) -> bytes | Path | None:
    """A picture as a row of a parquet file holds it: encoded, or in a file named from one of the roots on; None:
    neither.
    """
    path = value
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(path, str) or not path or "\0" in path:
        return None
    places = [root / path for root in roots]
    return next((place for place in places if os.path.isfile(place)), places[0])  # False, too, for what is no path


def listed_files(opened: Any, column: str, roots: Sequence[Path]) -> list[Path]:
    """The files in which the pictures of the first rows lie; none where some are in the rows."""
    found = [stored_picture(value, roots) for value in _first_values(opened, column)]
    files = [one for one in found if isinstance(one, Path)]
    return files if len(files) == len(found) else []


def _first_values(opened: Any, column: str) -> list[Any]:
    """Those of the first rows that are not null."""
    batches = islice(opened.iter_batches(_LOOKED_AT, columns=[column]), 1)
    return [value for batch in batches for value in batch.column(0).to_pylist() if value is not None]


def _schema(opened: Any, file: str) -> Any:
    schema = opened.schema_arrow
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise ValueError(f"{file}: it has two columns {twice[0]!r}: rename one")
    return schema


def _only(able: list[str], declared: list[str], usual: Sequence[str], file: str, what: str, option: str) -> str:
    preferred = [name for name in declared if name in able] or able
    by_name = [name for one in usual for name in preferred if name.casefold() == one]
    if by_name:
        return by_name[0]
    if len(preferred) > 1:
        raise ValueError(f"{file}: columns {' and '.join(preferred)} both hold {what}: name one ({option})")
    return preferred[0]


def _kinds(kind: Any) -> set[str]:
    """The types of what a column of an Arrow type holds, of {bytes, path} those of its fields."""
    types = require("pyarrow").types
    if types.is_struct(kind):
        return {one for field in kind if field.name in ("bytes", "path") for one in _kinds(field.type)}
    if types.is_dictionary(kind):
        return _kinds(kind.value_type)
    return {str(kind).partition("[")[0]}


def _holds_pictures(opened: Any, column: str, roots: Sequence[Path]) -> bool:
    try:
        values = _first_values(opened, column)
    except (OSError, ValueError):  # damaged: told of when its rows are read
        return False
    return any(_is_picture(stored_picture(value, roots)) for value in values)


def _is_picture(stored: bytes | Path | None) -> bool:
    """By its first bytes, or by its name where it is a file."""
    if isinstance(stored, Path):
        return os.path.splitext(stored.name)[1].lower() in picture_suffixes() and os.path.isfile(stored)
    if not stored:
        return False
    try:
        with Image.open(io.BytesIO(stored), formats=readable_formats()):
            return True
    except Exception:  # of what is no picture a decoder may raise nearly anything
        return False


def _features(schema: Any) -> dict[str, Any]:
    """What the `datasets` metadata says of columns; {} where there is none, or none that is understood."""
    try:
        described: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    for key in ("info", "features"):
        described = described.get(key) if isinstance(described, dict) else None
    return described if isinstance(described, dict) else {}


def _declared(schema: Any, kind: str) -> list[str]:
    """The columns that the `datasets` metadata declares to be of a kind: `Image`, `ClassLabel`."""
    features = _features(schema)
    of_kind = {name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind}
    return [name for name in schema.names if name in of_kind]
