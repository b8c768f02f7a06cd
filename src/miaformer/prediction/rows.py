"""What a row says, and the files that rows are written to.

Predictions go to .csv, .jsonl and .parquet, embeddings to .npz and .parquet.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Row = dict[str, Any]
Write = Callable[[Path, Iterator[Row]], None]

SPENT = ("macs_fraction", "depth_kept", "heads_kept", "tokens_kept")
COLUMNS = ("path", "label", "class", "probability", "top_k", *SPENT, "error")
EMBEDDING_COLUMNS = ("path", "embedding", *SPENT, "error")

ROWS_IN_GROUP = 10_000  # of a parquet file


@dataclass(frozen=True)
class Table:
    """A kind of file for rows of a kind, by its suffix."""

    writers: Mapping[str, Write]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.writers)

    def write(self, path: Path, rows: Iterator[Row]) -> None:
        """Write a file of one of the suffixes; a few rows at a time are in memory."""
        self.writers[path.suffix](path, rows)


def writable(name: str) -> str:
    """A name as all these files can hold it: bytes in it that are not UTF-8 are written out."""
    return name.encode(errors="backslashreplace").decode()


def encoded(embedding: NDArray[np.float32]) -> str:
    """As a row holds it: little-endian float32 in base64, a third of the length of decimal numbers."""
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def decoded(embedding: str) -> NDArray[np.float32]:
    """(C,)"""
    import numpy as np

    return np.frombuffer(base64.b64decode(embedding), "<f4")


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

    guess = pa.struct([("label", pa.int64()), ("class", pa.string()), ("probability", pa.float64())])
    types = {"label": pa.int64(), "top_k": pa.list_(guess), "class": pa.string()}
    _write_groups(path, rows, COLUMNS, types)


def _write_parquet_of_embeddings(path: Path, rows: Iterator[Row]) -> None:
    import pyarrow as pa

    numbers = ({**row, "embedding": decoded(row["embedding"])} if "embedding" in row else row for row in rows)
    _write_groups(path, numbers, EMBEDDING_COLUMNS, {"embedding": pa.list_(pa.float32())})


def _write_groups(path: Path, rows: Iterator[Row], columns: tuple[str, ...], types: dict[str, Any]) -> None:
    """types: of the columns that are neither numbers nor the path or the error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"path": pa.string(), "error": pa.string(), **types}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
    with pq.ParquetWriter(path, schema) as file:
        while group := list(islice(rows, ROWS_IN_GROUP)):
            file.write_table(pa.Table.from_pylist(group, schema))


def _write_npz(path: Path, rows: Iterator[Row]) -> None:
    """`path` (n,), `embedding` (n, C) and what was spent, (n,) each, of the pictures that could be read; `failed` and
    `error` (m,) of the others. Embeddings go to the disk as they come.
    """
    import numpy as np

    numbers = path.with_name("embedding.raw")
    good: dict[str, list[Any]] = {name: [] for name in ("path", *SPENT)}
    bad: dict[str, list[str]] = {"failed": [], "error": []}
    with numbers.open("wb") as file:
        for row in rows:
            if "error" in row:
                bad["failed"].append(row["path"])
                bad["error"].append(row["error"])
                continue
            file.write(base64.b64decode(row["embedding"]))
            for name, values in good.items():
                values.append(row[name])
    count = len(good["path"])
    shape = (count, numbers.stat().st_size // (4 * count)) if count else (0, 0)
    embedding: Any = np.memmap(numbers, "<f4", "r", shape=shape) if count else np.zeros(shape, "<f4")
    arrays: dict[str, Any] = {"embedding": embedding}
    for name, values in (*good.items(), *bad.items()):
        arrays[name] = np.array(values, dtype=float if name in SPENT else str)
    np.savez(path, **arrays)
    numbers.unlink()


PREDICTIONS = Table({".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet})
EMBEDDINGS = Table({".npz": _write_npz, ".parquet": _write_parquet_of_embeddings})
