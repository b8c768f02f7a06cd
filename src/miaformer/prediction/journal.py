"""How far a run got, in a file that a kill cannot spoil: what the run is, then a line whenever more of it is safe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from miaformer.data.files import lock

NAME = "run.jsonl"
_FORMAT = 2


class Journal:
    """JSON objects, one a line, in a folder of which at most one process has it open."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where another process has it open."""
        self.folder = folder
        self._file = (folder / NAME).open("a+b")
        try:
            lock(self._file)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is at work in {folder}: wait for it, or choose another file") from None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start afresh. settings: what makes another run another, under the names that people give it."""
        self._file.truncate(0)
        self.write({"format": _FORMAT, "settings": dict(settings)})

    def write(self, mark: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(mark).encode() + b"\n")
        self._file.flush()

    def marks(self, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """What was written since `begin`; None where there was none. A line that was cut short is taken out.

        Raises ValueError, naming the first difference, where it began with other settings.
        """
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
        marks: list[dict[str, Any]] = []
        for line in lines:
            with suppress(ValueError):
                marks.append(json.loads(line))
        if not marks:
            return None
        self._check(marks[0], settings)
        return marks[1:]

    def _check(self, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        begun = head.get("settings")
        if head.get("format") != _FORMAT or not isinstance(begun, dict):
            raise ValueError(f"{self.folder / NAME} was written by another version: start afresh, without --resume")
        for name in dict.fromkeys([*settings, *begun]):
            then, now = begun.get(name), settings.get(name)
            if then != now:
                raise ValueError(
                    f"the unfinished run in {self.folder} has {name} {_words(then)}, this one {_words(now)}: give the "
                    "same arguments to go on with it, or start afresh, without --resume"
                )

    def close(self) -> None:
        self._file.close()


def _words(value: Any) -> str:
    return "none" if value is None else str(value)
