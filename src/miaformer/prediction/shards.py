"""Files that hold many pictures, read as streams: tar archives and parquet files."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from miaformer.prediction.entries import Entry, SourceError, Unreadable, changed_when

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIX = ".parquet"

_READ_ROWS = 64  # of a parquet file at a time
_READ_BYTES = 1 << 20  # of a file at a time


class TarShard:
    """The members of a tar archive that are pictures by their suffix, named ARCHIVE/MEMBER; hidden ones are skipped."""

    count = None  # a tar archive has no index: to count is to read it

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.identity = path, str(path), changed_when(path)

    def entries(self, start: int = 0) -> Iterator[Entry]:
        from miaformer.images import picture_suffixes

        suffixes = picture_suffixes()
        pictures = 0
        try:
            with tarfile.open(self.path, tarinfo=_Member) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all: a gigabyte for a million
                    if not member.isreg() or not _is_picture(member.name, suffixes):
                        continue
                    pictures += 1
                    if pictures > start:
                        file = tar.extractfile(member)
                        assert file is not None  # of regular members there is one
                        yield Entry(f"{self.path}/{member.name.removeprefix('./')}", file.read())
                if not self.name.lower().endswith(".tar"):
                    _read_on(tar)
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            raise SourceError(_tar_damage(error)) from error
        if not pictures:
            raise SourceError("no member of this archive is a picture by its suffix")


class _Member(tarfile.TarInfo):
    """Takes a damaged header for what it is; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):  # a block of zeros is the end
                raise
            reason = error if buf else "cut short: its end marker is missing"
            raise tarfile.ReadError(str(reason)) from error


def _is_picture(member: str, suffixes: set[str]) -> bool:
    hidden = any(part.startswith(".") and part != "." for part in member.split("/"))
    return not hidden and os.path.splitext(member)[1].lower() in suffixes


def _read_on(tar: tarfile.TarFile) -> None:
    """Read a compressed archive to its end, where its checksum is."""
    assert tar.fileobj is not None
    while tar.fileobj.read(_READ_BYTES):
        pass


def _tar_damage(error: Exception) -> str:
    reason = str(error)
    if "\n" in reason:  # why it is not an archive of this kind, a line for each kind
        return "not a tar archive, or damaged at its beginning"
    return f"damaged archive: {reason or type(error).__name__}"


class ParquetShard:
    """The rows of a parquet file that holds pictures, named FILE/ROW."""

    def __init__(self, path: Path, root: Path) -> None:
        """root: what paths in its rows begin from, where those hold no bytes.

        Raises SourceError where it cannot be opened, NoPicturesError where it has no column of pictures.
        """
        from miaformer.data.parquet import image_column

        self.path, self.name, self.identity = path, str(path), changed_when(path)
        self._root = root
        with self._opened() as file:
            names = file.schema_arrow.names
            self._column = image_column(file.schema_arrow)
            self.count: int | None = file.metadata.num_rows
        if self._column is None:
            raise NoPicturesError(f"no column of pictures ({{bytes, path}} or bytes) among {', '.join(names)}")

    def entries(self, start: int = 0) -> Iterator[Entry]:
        from miaformer.data.parquet import stored_picture

        row = 0
        try:
            with self._opened() as file:
                for group in range(file.num_row_groups):
                    if row + file.metadata.row_group(group).num_rows <= start:
                        row += file.metadata.row_group(group).num_rows
                        continue
                    for batch in file.iter_batches(_READ_ROWS, row_groups=[group], columns=[self._column]):
                        for value in batch.column(0).to_pylist():
                            if row >= start:
                                stored = stored_picture(value, self._root)
                                content = Unreadable("neither bytes nor a path") if stored is None else stored
                                yield Entry(f"{self.path}/{row}", content)
                            row += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise SourceError(f"damaged parquet file: {' '.join(str(error).split())}") from error
        if not row:
            raise SourceError("this parquet file has no rows")

    def _opened(self):  # type: ignore[no-untyped-def]  # a pyarrow.parquet.ParquetFile
        from miaformer.data.parquet import open_parquet

        try:
            # Buffered: a column of pictures is otherwise read a whole row group at a time.
            return open_parquet(self.path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True)
        except ValueError as error:
            raise SourceError(str(error).removeprefix(f"{self.path}: ")) from error


class NoPicturesError(SourceError):
    """A parquet file that holds no pictures: of a folder's it is not meant, named by itself it is a mistake."""
