"""A run that may be killed at any moment: its rows, and what they come to, until they are one whole file.

OUT.partial/run.jsonl is its journal. The first line says what the run is, each other line is a batch of rows with the
position after it. A kill can only cut the last line short; a run that is resumed drops that line, and so loses nothing
else and repeats nothing. At the end the rows become OUT, in its format, and the folder goes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miaformer.data.extras import require
from miaformer.data.files import lock
from miaformer.prediction.entries import BEGINNING, Position
from miaformer.prediction.rows import PREDICTIONS, Row, Table

MOST_NAMED = 20  # failures that a tally names

_JOURNAL = "run.jsonl"
_FORMAT = 3


@dataclass(frozen=True)
class Tally:
    """What some rows come to."""

    rows: int = 0
    pictures: int = 0  # that were classified
    macs: float = 0.0  # sum over pictures of their fractions of the dense model's
    most: float = 0.0  # the largest of these
    failures: tuple[tuple[str, str], ...] = ()  # (path, error) of the first `MOST_NAMED`

    @property
    def failed(self) -> int:
        return self.rows - self.pictures

    def after(self, rows: Sequence[Row]) -> Tally:
        """With more rows."""
        good = [row for row in rows if "error" not in row]
        spent = [row["macs_fraction"] for row in good]
        failures = [(row["path"], row["error"]) for row in rows if "error" in row]
        return replace(
            self,
            rows=self.rows + len(rows),
            pictures=self.pictures + len(good),
            macs=self.macs + sum(spent),
            most=max([self.most, *spent]),
            failures=(*self.failures, *failures)[:MOST_NAMED],
        )


class UnfinishedRun:
    """Takes rows a batch at a time, keeps them from being lost, and makes their file of them at the end.

    `tally` is what the rows come to; `position` is in the inputs, after the last of them.
    """

    def __init__(
        self, out: str | Path, settings: Mapping[str, Any], resume: bool = False, table: Table = PREDICTIONS
    ) -> None:
        """out: the file, of a suffix of `table`; what was there before stays until it is whole.

        settings: what must be the same to go on with a run, as JSON knows it, under the names that people give it.
        resume: go on with the unfinished run, if there is one; otherwise it is dropped.

        Raises ValueError where that run had other settings, or another process is at work on it.
        """
        self.out, self._table = check_out(out, table), table
        self.folder = _partial_folder(self.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tally, self.position = Tally(), BEGINNING
        self._journal = (self.folder / _JOURNAL).open("a+b")
        try:
            lock(self._journal)
            if not resume:
                self._journal.truncate(0)
            self._start_s = time.monotonic() - self._recovered(settings)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"another process is at work in {self.folder}: wait for it, or choose another file"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """How long it has taken, before it was resumed too."""
        return time.monotonic() - self._start_s

    def add(self, rows: list[Row], position: Position) -> int:
        """Keep a batch; position: after it. Returns how many rows there are now."""
        self._write({"position": position, "seconds": round(self.seconds, 3), "rows": rows})
        self.tally, self.position = self.tally.after(rows), position
        return self.tally.rows

    def finish(self) -> None:
        """Write the file, put it in its place, and remove what was beside it."""
        whole = self.folder / f"rows{self.out.suffix}"
        self._table.write(whole, self._rows())
        whole.replace(self.out)
        self.close()
        _remove(self.folder)

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> UnfinishedRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def _rows(self) -> Iterator[Row]:
        self._journal.seek(0)
        next(self._journal)
        for line in self._journal:
            yield from json.loads(line)["rows"]

    def _recovered(self, settings: Mapping[str, Any]) -> float:
        """Take up the journal as far as it is whole, and drop the rest. Returns how many seconds that took to make."""
        self._journal.seek(0)
        whole, seconds = 0, 0.0
        for line in self._journal:
            if not line.endswith(b"\n"):
                break
            try:
                said = json.loads(line)
            except ValueError:  # not after a kill: the machine went down before it was on the disk
                break
            if whole == 0:
                self._check(said, settings)
            else:
                self.tally, self.position = self.tally.after(said["rows"]), Position(*said["position"])
                seconds = said["seconds"]
            whole += len(line)
        self._journal.truncate(whole)
        if whole == 0:
            self._write({"format": _FORMAT, "settings": dict(settings)})
        return seconds

    def _check(self, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        if head.get("format") != _FORMAT:
            raise ValueError(f"{self.folder / _JOURNAL} was written by another version: start afresh, without --resume")
        begun = head["settings"]
        for name in dict.fromkeys([*settings, *begun]):
            then, now = ("none" if of.get(name) is None else str(of[name]) for of in (begun, settings))
            if then != now:
                raise ValueError(
                    f"the unfinished run in {self.folder} has {name} {then}, this one {now}: give the same arguments "
                    "to go on with it, or start afresh, without --resume"
                )


def check_out(out: str | Path, table: Table = PREDICTIONS) -> Path:
    """Raises ValueError where rows cannot be written to a file of this name."""
    path = Path(out)
    *others, last = table.suffixes
    if path.suffix not in table.suffixes:
        raise ValueError(f"{out} must end in {', '.join(others)} or {last}")
    if path.suffix == ".parquet":
        require("pyarrow.parquet")
    if path.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    folder = _partial_folder(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is in the way: rows are kept in a folder of this name until {path.name} is whole")
    return path


def is_finished(out: str | Path) -> bool:
    """Whether a file is whole, with no unfinished run beside it."""
    path = Path(out)
    return path.exists() and not (_partial_folder(path) / _JOURNAL).exists()


def _partial_folder(out: Path) -> Path:
    """Where the rows of a file are until it is whole."""
    return out.with_name(f"{out.name}.partial")


def _remove(folder: Path) -> None:
    """Remove the journal of a run, and the folder if nothing else is in it."""
    (folder / _JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
