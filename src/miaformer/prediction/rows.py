"""What a row says, and the files that rows are written to: .csv, .jsonl and .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "path",
    "label",
    "class",
    "probability",
    "top_k",
    "macs_fraction",
    "depth_kept",
    "heads_kept",
    "tokens_kept",
    "error",
)

ROWS_IN_GROUP = 10_000  # of a parquet file


def write_rows(path: Path, rows: Iterator[Row]) -> None:
    """Write a file, whose suffix is one of `SUFFIXES`; a few rows at a time are in memory."""
    _WRITERS[path.suffix](path, rows)


def writable(name: str) -> str:
    """A name as all these files can hold it: bytes in it that are not UTF-8 are written out."""
    return name.encode(errors="backslashreplace").decode()


def _write_csv(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            top_k = " ".join(f"{guess['label']}:{guess['probability']:.6g}" for guess in row.get("top_k", ()))
            writer.writerow({**row, "top_k": top_k})


def _write_jsonl(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in COLUMNS if name in row}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterator[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    guess = pa.struct([("label", pa.int64()), ("class", pa.string()), ("probability", pa.float64())])
    types = {"label": pa.int64(), "top_k": pa.list_(guess)}
    types |= dict.fromkeys(("path", "class", "error"), pa.string())
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in COLUMNS])
    with pq.ParquetWriter(path, schema) as file:
        while group := list(islice(rows, ROWS_IN_GROUP)):
            file.write_table(pa.Table.from_pylist(group, schema))


_WRITERS: dict[str, Callable[[Path, Iterator[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
SUFFIXES = tuple(_WRITERS)
