"""What pictures there are: files, folders, patterns, archives and parquet files, as one stream in a fixed order."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
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
    return Inputs([one for one in sources.values() if one.name in named or not _lists_some_of(one, pictures)])


def _lists_some_of(source: Source, pictures: set[str]) -> bool:
    """Whether it is a table about pictures that are sources themselves."""
    listed = source.listed() if isinstance(source, ParquetShard) else set()
    return bool(listed) and listed <= pictures


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
    named = Path(path)
    if named.is_dir():
        return _below(named, image_column)
    if named.is_file():
        return [_of_file(named, named.parent, image_column)]
    if glob.has_magic(path):
        return _matching(path, image_column)
    raise SourceError("neither a file nor a folder" if named.exists() else "no such file or folder")


def _below(folder: Path, image_column: str | None) -> list[Source]:
    from miaformer.data.images import files_below, picture_suffixes

    files = [path for path in files_below(folder, _known_suffix()) if not _is_unfinished(path.relative_to(folder))]
    sources = _holding_pictures(files, folder, image_column)
    if not sources:
        some = ", ".join(sorted(picture_suffixes())[:8])
        shards = ", ".join((*ARCHIVE_SUFFIXES, PARQUET_SUFFIX))
        raise SourceError(f"no pictures in this folder (known suffixes: {some}, ...; {shards})")
    return sources


def _matching(pattern: str, image_column: str | None) -> list[Source]:
    found: list[Source] = []
    known = _known_suffix()
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    for match in matches:
        if _is_unfinished(match):
            continue
        if match.is_dir():
            try:
                found += _below(match, image_column)
            except SourceError:  # a folder without pictures: the pattern matches others
                continue
        elif known(match.name):
            found += _holding_pictures([match], match.parent, image_column)
    if not found:
        none = "none is a picture by its suffix" if matches else "no such file or folder"
        raise SourceError(f"{none} (as a pattern it matches {len(matches):,} names)")
    return found


def _holding_pictures(files: Sequence[Path], root: Path, image_column: str | None) -> list[Source]:
    found: list[Source] = []
    for path in files:
        try:
            found.append(_of_file(path, root, image_column))
        except NoPicturesError:
            continue
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


def _known_suffix() -> Callable[[str], bool]:
    from miaformer.data.images import picture_suffixes

    pictures = picture_suffixes()
    shards = (*ARCHIVE_SUFFIXES, PARQUET_SUFFIX)
    return lambda name: os.path.splitext(name)[1].lower() in pictures or name.lower().endswith(shards)


def _is_unfinished(path: Path) -> bool:
    return any(part.endswith(_UNFINISHED) for part in path.parts)
