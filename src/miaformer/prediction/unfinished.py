"""A run that may be killed at any moment: its rows, and what they come to, until they are one whole file.

OUT.partial/ holds `run.jsonl`, the journal, and the rows so far; at the end the rows become OUT and the folder goes.
Rows are written first, then the journal says up to where they are safe; after a kill what lies beyond is written over.
So a run that is resumed after the last batch that the journal knows of loses nothing and repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from miaformer.prediction.entries import BEGINNING, Position
from miaformer.prediction.journal import NAME, Journal
from miaformer.prediction.rows import SUFFIXES, Row, open_rows

MOST_NAMED = 20  # failures that a tally names


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


@dataclass(frozen=True)
class _Safe:
    """What no kill can take any more, and the batches that wait to become so."""

    tally: Tally = Tally()
    position: Position = BEGINNING  # after the last safe row
    place: int = 0  # the same in the file of rows: see `RowsFile.write`
    held: list[tuple[list[Row], Position]] = field(default_factory=list)


class UnfinishedRun:
    """Takes rows a batch at a time, keeps them from being lost, and makes their file of them at the end."""

    def __init__(self, out: str | Path, settings: Mapping[str, Any], resume: bool = False) -> None:
        """out: the file, .csv, .jsonl or .parquet; what was there before stays until it is whole.

        settings: what must be the same to go on with a run, as JSON knows it, under the names that people give it.
        resume: go on with the unfinished run, if there is one; otherwise it is dropped.

        Raises ValueError where that run had other settings, or another process is at work on it.
        """
        self.out = check_out(out)
        self.folder = partial_folder(self.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._journal = opened.enter_context(closing(Journal(self.folder)))
            marks = self._journal.marks(settings) if resume else None
            if marks is None:
                self._journal.begin(settings)
                _remove_rows(self.folder)
            self._rows = opened.enter_context(closing(open_rows(self.folder, self.out.suffix)))
            self._safe, before_s = self._recovered(settings, marks or [])
            self._opened = opened.pop_all()
        self._start_s = time.monotonic() - before_s

    @property
    def tally(self) -> Tally:
        """Of the rows that are safe."""
        return self._safe.tally

    @property
    def position(self) -> Position:
        """In the inputs, after the last row that is safe."""
        return self._safe.position

    @property
    def seconds(self) -> float:
        """How long it has taken, before it was resumed too."""
        return time.monotonic() - self._start_s

    def add(self, rows: list[Row], position: Position) -> int:
        """Take a batch; position: after it. Returns how many rows there are now."""
        self._safe.held.append((rows, position))  # one step: Ctrl-C finds a batch whole or not at all
        held = sum(len(batch) for batch, _ in self._safe.held)
        count = self.tally.rows + held
        if self._rows.is_due(held):
            self.save()
        return count

    def save(self) -> None:
        """Make safe what was added. May be called again after it was interrupted."""
        safe = self._safe
        if not safe.held:
            return
        rows = [row for batch, _ in safe.held for row in batch]
        tally = safe.tally.after(rows)
        position = safe.held[-1][1]
        place = self._rows.write(rows, safe.place)
        self._journal.write(
            {
                "place": place,
                "position": position,
                "seconds": round(self.seconds, 3),
                "tally": {name: value for name, value in asdict(tally).items() if name != "failures"},
                "failures": tally.failures[len(safe.tally.failures) :],
            }
        )
        self._safe = _Safe(tally, position, place)

    def finish(self) -> None:
        """Make the file whole, in its place, and remove what was beside it."""
        self.save()
        self._rows.finish(self._safe.place)
        self._journal.write({"complete": True})
        (self.folder / self._rows.name).replace(self.out)
        self.close()
        _remove(self.folder)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> UnfinishedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recovered(self, settings: Mapping[str, Any], marks: Sequence[Mapping[str, Any]]) -> tuple[_Safe, float]:
        """What the journal says is safe, and how many seconds it took."""
        marks = [mark for mark in marks if "place" in mark]
        good = len(marks)
        while good and not self._rows.has(marks[good - 1]["place"]):
            good -= 1  # not after a kill: the machine went down, or somebody removed rows
        if good < len(marks):
            self._journal.begin(settings)
            for mark in marks[:good]:
                self._journal.write(mark)
        if not good:
            return _Safe(), 0.0
        failures: list[tuple[str, str]] = []
        rows = 0
        for mark in marks[:good]:
            if mark["tally"]["rows"] > rows:  # a line may be there twice, see `save`
                failures += [(path, error) for path, error in mark["failures"]]
            rows = mark["tally"]["rows"]
        last = marks[good - 1]
        tally = Tally(**last["tally"], failures=tuple(failures))
        return _Safe(tally, Position(*last["position"]), last["place"]), float(last["seconds"])


def check_out(out: str | Path) -> Path:
    """Raises ValueError where rows cannot be written to a file of this name."""
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{out} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    folder = partial_folder(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is in the way: rows are kept in a folder of this name until {path.name} is whole")
    return path


def partial_folder(out: Path) -> Path:
    """Where the rows of a file are until it is whole."""
    return out.with_name(f"{out.name}.partial")


def is_finished(out: str | Path) -> bool:
    """Whether a file is whole, with no unfinished run beside it."""
    path = Path(out)
    folder = partial_folder(path)
    if not path.exists():
        return False
    journal = folder / NAME
    if not journal.exists():
        return True
    moved = not any((folder / f"rows{suffix}").exists() for suffix in SUFFIXES)
    if moved and journal.read_bytes().endswith(b'{"complete": true}\n'):  # killed in its last step
        _remove(folder)
        return True
    return False


def _remove(folder: Path) -> None:
    """Remove what a run wrote, the journal last, and the folder if nothing else is in it."""
    _remove_rows(folder)
    (folder / NAME).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _remove_rows(folder: Path) -> None:
    for path in [*folder.glob("part-*.parquet"), *(folder / f"rows{suffix}" for suffix in SUFFIXES)]:
        path.unlink(missing_ok=True)
