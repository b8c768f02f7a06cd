"""What pictures there are: files, folders, patterns, archives and parquet files, as one stream in a fixed order."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from miaformer.prediction.entries import BEGINNING, Entry, Position, Source, SourceError, Unreadable
from miaformer.prediction.shards import (
    ARCHIVE_SUFFIXES,
    PARQUET_SUFFIX,
    TAR_SUFFIXES,
    ZIP_SUFFIX,
    NoPicturesError,
    ParquetShard,
    TarShard,
    ZipShard,
)

_UNFINISHED = ".partial"  # folders of this suffix hold rows of a run that goes on


class PictureFile:
    """A file that is one picture."""

    __slots__ = ("path",)
    count = 1

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> str:
        return self.name  # to ask for sizes and times would take minutes of a million files on a remote disk

    def entries(self, start: int = 0) -> Iterator[Entry]:
        if start == 0:
            yield Entry(self.name, self.path)


class MissingSource:
    """Something that was named and is not there, or cannot be opened."""

    count = 1

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        self.identity = f"{name} missing"

    def entries(self, start: int = 0) -> Iterator[Entry]:
        if start == 0:
            yield Entry(self.name, Unreadable(self.reason))


class Inputs:
    """Sources one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    @property
    def total(self) -> int | None:
        """How many entries there are, None where that is not known before they are read."""
        counts = [source.count for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def entries(self, start: Position = BEGINNING) -> Iterator[tuple[Position, Entry]]:
        """Entries from a position on, each with the position after it. A damaged source ends with an unreadable one."""
        skip = start.entries
        for place, source in enumerate(self.sources[start.sources :], start.sources):
            try:
                for count, entry in enumerate(source.entries(skip), skip + 1):
                    yield Position(place, count), entry
            except SourceError as error:
                yield Position(place + 1, 0), Entry(source.name, Unreadable(str(error)))
            skip = 0

    def fingerprint(self) -> str:
        """A short digest of which sources there are, in which order, and of what they were when they were found."""
        digest = hashlib.blake2b(digest_size=4)
        for source in self.sources:
            digest.update(f"{source.identity}\n".encode(errors="surrogateescape"))
        files = "1 file" if len(self.sources) == 1 else f"{len(self.sources):,} files"
        return f"{files} ({digest.hexdigest()})"


def find_inputs(paths: Sequence[str | Path], image_column: str | None = None) -> Inputs:
    """What some paths name, each file once: files, folders with everything below them, patterns as the shell has them.

    Files are tar or zip archives or parquet files by their suffix, else pictures. In folders, and where a pattern
    matches, only files of known suffixes count, and parquet files only where they hold pictures, or list others than
    those that are found beside them. image_column: of parquet files; None: it is found. What is not there or cannot be
    opened becomes an unreadable entry in its place. Raises SourceError where there is nothing at all, and where no
    parquet file has that column.
    """
    sources: dict[str, Source] = {}
    missing: dict[str, str] = {}
    for path in map(str, paths):
        try:
            found = _sources(path, image_column)
        except SourceError as error:
            missing[path] = str(error)
            found = [MissingSource(path, str(error))]
        for source in found:
            sources.setdefault(source.name, source)
    if len(missing) == len(sources):
        raise SourceError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    if image_column is not None and not any(isinstance(source, ParquetShard) for source in sources.values()):
        raise SourceError(f"no parquet file here has a column {image_column!r} of pictures")
    named = {str(Path(path)) for path in paths}
    pictures = {os.path.abspath(source.path) for source in sources.values() if isinstance(source, PictureFile)}
    tables = [one for one in sources.values() if isinstance(one, ParquetShard) and one.name not in named]
    about_others = {one.name for one in tables if (listed := one.listed()) and listed <= pictures}
    return Inputs([one for one in sources.values() if one.name not in about_others])


def find_pictures(paths: Sequence[str | Path]) -> tuple[list[Path], dict[str, str]]:
    """Those that are files of their own, for commands that look at some; and what else was named, with the reason.

    Raises SourceError where there is no picture at all.
    """
    pictures: list[Path] = []
    others: dict[str, str] = {}
    for source in find_inputs(paths).sources:
        if isinstance(source, PictureFile):
            pictures.append(source.path)
        else:
            many = "holds many pictures: give files of one each"
            others[source.name] = source.reason if isinstance(source, MissingSource) else many
    if not pictures:
        raise SourceError("; ".join(f"{name}: {reason}" for name, reason in others.items()))
    return pictures, others


def _sources(path: str, image_column: str | None) -> list[Source]:
    from miaformer.data.images import files_below, picture_suffixes

    pictures, shards = picture_suffixes(), (*ARCHIVE_SUFFIXES, PARQUET_SUFFIX)

    def known(name: str) -> bool:
        return os.path.splitext(name)[1].lower() in pictures or name.lower().endswith(shards)

    named = Path(path)
    if named.is_file():
        return [_of_file(named, named.parent, image_column)]
    if named.is_dir():
        places = [named]
        none = (
            f"no pictures in this folder (known suffixes: {', '.join(sorted(pictures)[:8])}, ...; {', '.join(shards)})"
        )
    elif glob.has_magic(path):
        places = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
        none = "none is a picture by its suffix" if places else "no such file or folder"
        none = f"{none} (as a pattern it matches {len(places):,} names)"
    else:
        raise SourceError("neither a file nor a folder" if named.exists() else "no such file or folder")
    found: list[Source] = []
    for place in places:
        if place != named and _is_unfinished(place):
            continue
        files = files_below(place, known) if place.is_dir() else [place] if known(place.name) else []
        root = place if place.is_dir() else place.parent
        for file in files:
            if not _is_unfinished(file.relative_to(root)):
                with suppress(NoPicturesError):
                    found.append(_of_file(file, root, image_column))
    if not found:
        raise SourceError(none)
    return found


def _of_file(path: Path, root: Path, image_column: str | None) -> Source:
    """Raises NoPicturesError for a parquet file without a column of them."""
    name = path.name.lower()
    if name.endswith(TAR_SUFFIXES):
        return TarShard(path)
    if not name.endswith((ZIP_SUFFIX, PARQUET_SUFFIX)):
        return PictureFile(path)
    try:
        return ZipShard(path) if name.endswith(ZIP_SUFFIX) else ParquetShard(path, root, image_column)
    except NoPicturesError:
        raise
    except SourceError as error:
        return MissingSource(str(path), str(error))


def _is_unfinished(path: Path) -> bool:
    return any(part.endswith(_UNFINISHED) for part in path.parts)
