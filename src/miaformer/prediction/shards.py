"""Files that hold many pictures, read as streams: tar and zip archives, and parquet files."""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from miaformer.prediction.entries import Entry, SourceError, Unreadable, changed_when

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
ZIP_SUFFIX = ".zip"
PARQUET_SUFFIX = ".parquet"
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ZIP_SUFFIX)

_READ_ROWS = 64  # of a parquet file at a time
_READ_BYTES = 1 << 20  # of a file at a time
_MOST_LINKS = 40  # one to the next, as Linux follows them
_NO_PICTURES = "no member of this archive is a picture by its suffix"


class TarShard:
    """The members of a tar archive that are pictures by their suffix, named ARCHIVE/MEMBER; hidden ones are skipped.

    Links to other members are these; in a compressed archive, where to look back is to begin again, they are
    unreadable, as are links to elsewhere.
    """

    count = None  # a tar archive has no index: to count is to read it

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.identity = path, str(path), changed_when(path)
        self._is_compressed = not self.name.lower().endswith(".tar")

    def entries(self, start: int = 0) -> Iterator[Entry]:
        from miaformer.data.images import picture_suffixes

        suffixes = picture_suffixes()
        pictures = 0
        links: _Links | None = None
        try:
            with tarfile.open(self.path, tarinfo=_Member) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all: a gigabyte for a million
                    if member.isdir() or not _is_picture(member.name, suffixes):
                        continue
                    pictures += 1
                    if pictures <= start:
                        continue
                    content: bytes | Unreadable
                    if member.isreg():
                        file = tar.extractfile(member)
                        assert file is not None  # of regular members there is one
                        content = file.read()
                    elif not (member.islnk() or member.issym()):
                        content = Unreadable("neither a file nor a link")
                    elif self._is_compressed:
                        content = Unreadable(
                            f"a link to {member.linkname!r}, not read in a compressed archive: unpack it"
                        )
                    else:
                        links = links or _Links(self.path)
                        content = links.content(member)
                    yield Entry(f"{self.path}/{member.name.removeprefix('./')}", content)
                if self._is_compressed:
                    _read_on(tar)
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
            raise SourceError(_tar_damage(error)) from error
        finally:
            if links is not None:
                links.tar.close()
        if not pictures:
            raise SourceError(_NO_PICTURES)


class _Links:
    """An archive opened again and read through, with all its members by name, for what links in it stand for."""

    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path)  # noqa: SIM115  # its user closes it
        self._members = {os.path.normpath(member.name): member for member in self.tar.getmembers()}

    def content(self, member: tarfile.TarInfo) -> bytes | Unreadable:
        at: tarfile.TarInfo | None = member
        for _ in range(_MOST_LINKS):
            if at is None or at.isreg():
                break
            folder = os.path.dirname(at.name) if at.issym() else ""
            at = self._members.get(os.path.normpath(os.path.join(folder, at.linkname)))
        file = self.tar.extractfile(at) if at is not None and at.isreg() else None
        if file is None:
            return Unreadable(f"a link to {member.linkname!r}, which is no file of this archive")
        return file.read()


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


class ZipShard:
    """The members of a zip archive that are pictures by their suffix, named ARCHIVE/MEMBER; hidden ones are skipped."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError where it cannot be opened."""
        self.path, self.name, self.identity = path, str(path), changed_when(path)
        with self._opened() as archive:
            self.count: int | None = len(self._pictures(archive))

    def entries(self, start: int = 0) -> Iterator[Entry]:
        with self._opened() as archive:
            pictures = self._pictures(archive)
            for member in pictures[start:]:
                yield Entry(f"{self.path}/{member.filename}", _unzipped(archive, member))
        if not pictures:
            raise SourceError(_NO_PICTURES)

    def _pictures(self, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        from miaformer.data.images import picture_suffixes

        suffixes = picture_suffixes()
        return [one for one in archive.infolist() if not one.is_dir() and _is_picture(one.filename, suffixes)]

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise SourceError(f"not a zip archive, or damaged: {error}") from error


def _unzipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | Unreadable:
    if stat.S_ISLNK(member.external_attr >> 16):
        return Unreadable("a symbolic link, not read in a zip archive: unpack it")
    try:
        return archive.read(member)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        return Unreadable(f"damaged in its archive: {error}")
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed in a way that Python cannot undo
        return Unreadable(str(error))


class ParquetShard:
    """The rows of a parquet file that holds pictures, named FILE/ROW."""

    def __init__(self, path: Path, root: Path, column: str | None = None) -> None:
        """column: the one that holds pictures, or paths from the file's folder or from `root` on; None: it is found.

        Raises SourceError where it cannot be opened, or several do, NoPicturesError where it has no such column.
        """
        from miaformer.data.parquet_columns import NoColumnError, image_column

        self.path, self.name, self.identity = path, str(path), changed_when(path)
        if column is not None:
            self.identity += f" {column}"
        self._roots = (path.parent, root)
        with self._opened() as file:
            try:
                self._column = image_column(file, self.name, self._roots, column)
            except ValueError as error:
                kind = NoPicturesError if isinstance(error, NoColumnError) else SourceError
                raise kind(str(error).removeprefix(f"{path}: ")) from error
            self.count: int | None = file.metadata.num_rows

    def listed(self) -> set[str]:
        """Absolute paths of the pictures that its first rows name; empty where they hold pictures themselves."""
        from miaformer.data.parquet_columns import listed_files

        try:
            with self._opened() as file:
                return {os.path.abspath(path) for path in listed_files(file, self._column, self._roots)}
        except (OSError, ValueError):  # damaged: told of when its rows are read
            return set()

    def entries(self, start: int = 0) -> Iterator[Entry]:
        from miaformer.data.parquet_columns import stored_picture

        row = 0
        lacking = Unreadable(f"column {self._column!r} holds neither bytes nor a path")
        try:
            with self._opened() as file:
                for group in range(file.num_row_groups):
                    if row + file.metadata.row_group(group).num_rows <= start:
                        row += file.metadata.row_group(group).num_rows
                        continue
                    for batch in file.iter_batches(_READ_ROWS, row_groups=[group], columns=[self._column]):
                        for value in batch.column(0).to_pylist():
                            if row >= start:
                                stored = stored_picture(value, self._roots)
                                yield Entry(f"{self.path}/{row}", lacking if stored is None else stored)
                            row += 1
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise SourceError(f"damaged parquet file: {' '.join(str(error).split())}") from error
        if not row:
            raise SourceError("this parquet file has no rows")

    def _opened(self):  # type: ignore[no-untyped-def]  # a pyarrow.parquet.ParquetFile
        from miaformer.data.parquet_columns import open_parquet

        try:
            # Buffered: a column of pictures is otherwise read a whole row group at a time.
            return open_parquet(self.path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True)
        except ValueError as error:
            raise SourceError(str(error).removeprefix(f"{self.path}: ")) from error


class NoPicturesError(SourceError):
    """A parquet file that holds no pictures: of a folder's it is not meant, named by itself it is a mistake."""
