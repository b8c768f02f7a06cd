"""A picture among many, before it is opened: what sources give and what makes rows takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Unreadable:
    """Why a picture, or the rest of a shard, cannot be had."""

    reason: str


class Entry(NamedTuple):
    """What gets a row: its name, and its file, its encoded bytes, or why there is neither."""

    name: str
    content: Path | bytes | Unreadable


class Position(NamedTuple):
    """How far some sources were read: so many of them whole, and so many entries of the next."""

    sources: int
    entries: int


BEGINNING = Position(0, 0)


class SourceError(ValueError):
    """A source of pictures that cannot be read, or read on. The message says why, and does not name it."""


class Source(Protocol):
    """A picture file, or a file that holds many."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int | None:
        """How many entries it has, where that can be known without reading it through."""

    @property
    def identity(self) -> str:
        """What tells it from others, and from what it was before it was changed."""

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Its entries from number `start` on, in an order that is always the same, a few at a time in memory.

        Raises SourceError where it is damaged, after the entries before the damage.
        """


def reason(error: Exception, name: str) -> str:
    """What an error says, on one line, without the name that it begins with."""
    return " ".join(str(error).removeprefix(f"{name}: ").split())


def changed_when(path: Path) -> str:
    """Size and time of change of a file: the identity of one that is too large to read for it."""
    found = path.stat()
    return f"{path} {found.st_size} {found.st_mtime_ns}"
