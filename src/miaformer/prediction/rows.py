"""What a row says, and the files that rows are written to: .csv, .jsonl and .parquet.

While a run goes on its rows are in a folder of their own. A `RowsFile` writes them there and says, as a number, up to
where they are safe; whatever happens later, it can go on from there.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

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
# Rows of a parquet file are held until they are worth a part of their own: this long, and this share of the time so
# far. So a kill costs half a second and 1 % at most, and a day's run has some 800 parts.
_HELD_S, _HELD_SHARE = 0.5, 0.01


class RowsFile(Protocol):
    """Rows of a run that is not finished, in a folder."""

    name: str  # of the whole file, in that folder

    def is_due(self, held: int) -> bool:
        """Whether it is time to write the rows that are held."""

    def write(self, rows: Sequence[Row], safe: int) -> int:
        """Write rows behind those that are safe, over anything else there, and return what is safe then.

        Doing it twice is as good as once: it may have been interrupted.
        """

    def has(self, safe: int) -> bool:
        """Whether all that was safe is there."""

    def finish(self, safe: int) -> None:
        """Make the whole file, of what is safe."""

    def close(self) -> None: ...


def open_rows(folder: Path, suffix: str) -> RowsFile:
    """suffix: one of `SUFFIXES`."""
    return _KINDS[suffix](folder)


def writable(name: str) -> str:
    """A name as all these files can hold it: bytes in it that are not UTF-8 are written out."""
    return name.encode(errors="backslashreplace").decode()


class _Lines:
    """Rows as lines of a file. What is safe is a number of bytes."""

    def __init__(self, path: Path, head: str, lines: Callable[[Sequence[Row]], str]) -> None:
        self.name = path.name
        self._head, self._lines = head, lines
        path.touch()
        self._file = path.open("r+b")

    def is_due(self, held: int) -> bool:
        return True

    def write(self, rows: Sequence[Row], safe: int) -> int:
        text = self._lines(rows) if safe else self._head + self._lines(rows)
        self._file.seek(safe)
        self._file.write(text.encode())
        self._file.flush()
        return self._file.tell()

    def has(self, safe: int) -> bool:
        return self._file.seek(0, io.SEEK_END) >= safe

    def finish(self, safe: int) -> None:
        self._file.truncate(safe)
        self._file.close()

    def close(self) -> None:
        self._file.close()


def _csv(folder: Path) -> _Lines:
    def lines(rows: Sequence[Row]) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="")
        for row in rows:
            top_k = " ".join(f"{guess['label']}:{guess['probability']:.6g}" for guess in row.get("top_k", ()))
            writer.writerow({**row, "top_k": top_k})
        return text.getvalue()

    return _Lines(folder / "rows.csv", f"{','.join(COLUMNS)}\r\n", lines)


def _jsonl(folder: Path) -> _Lines:
    def line(row: Row) -> str:
        return json.dumps({name: row[name] for name in COLUMNS if name in row}, ensure_ascii=False) + "\n"

    return _Lines(folder / "rows.jsonl", "", lambda rows: "".join(map(line, rows)))


class _Parquet:
    """Rows in parquet files of some batches each, which are joined at the end. What is safe is a number of them.

    A parquet file can be read only once its end is written, so one that grows for hours would be lost to a kill.
    """

    name = "rows.parquet"

    def __init__(self, folder: Path) -> None:
        self._folder, self._schema = folder, _arrow_schema()
        self._start = self._since = time.monotonic()

    def is_due(self, held: int) -> bool:
        now = time.monotonic()
        return held >= ROWS_IN_GROUP or now - self._since > _HELD_S + _HELD_SHARE * (now - self._start)

    def write(self, rows: Sequence[Row], safe: int) -> int:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), self._schema), self._part(safe))
        self._since = time.monotonic()
        return safe + 1

    def has(self, safe: int) -> bool:
        return all(self._part(number).exists() for number in range(safe))

    def finish(self, safe: int) -> None:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(self._folder / self.name, self._schema) as whole:
            for table in self._groups(safe):
                whole.write_table(table)

    def close(self) -> None:
        pass

    def _groups(self, safe: int) -> Iterator[Any]:
        """All rows, `ROWS_IN_GROUP` at a time, however many each part holds."""
        import pyarrow
        import pyarrow.parquet

        held = self._schema.empty_table()
        for number in range(safe):
            with pyarrow.parquet.ParquetFile(self._part(number)) as part:
                held = pyarrow.concat_tables([held, part.read()])
            while held.num_rows >= ROWS_IN_GROUP:
                yield held.slice(0, ROWS_IN_GROUP)
                held = held.slice(ROWS_IN_GROUP)
        if held.num_rows:
            yield held

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.parquet"


def _arrow_schema() -> Any:
    import pyarrow as pa

    guess = pa.struct([("label", pa.int64()), ("class", pa.string()), ("probability", pa.float64())])
    types = {"label": pa.int64(), "top_k": pa.list_(guess)}
    types |= dict.fromkeys(("path", "class", "error"), pa.string())
    return pa.schema([(name, types.get(name, pa.float64())) for name in COLUMNS])


_KINDS: dict[str, Callable[[Path], RowsFile]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _Parquet}
SUFFIXES = tuple(_KINDS)
