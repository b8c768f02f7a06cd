"""Files, folders, patterns, tar and parquet files are one stream, the same every time and from any place on."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miaformer.prediction.entries import BEGINNING, Entry, Position, SourceError, Unreadable
from miaformer.prediction.sources import find_inputs, find_pictures


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


PICTURES = [picture(number) for number in range(12)]


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def numbered(suffix: str = "png") -> dict[str, bytes]:
    return {f"a/{number:03}.{suffix}": content for number, content in enumerate(PICTURES)}


def write_parquet(path: Path, column: Any, name: str = "image", rows_in_group: int = 5) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": range(len(column)), name: column})
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=rows_in_group)
    return path


def entries(*paths: Path | str) -> list[Entry]:
    return [entry for _, entry in find_inputs(paths).entries()]


def names(*paths: Path | str) -> list[str]:
    return [entry.name for entry in entries(*paths)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with all there is, and with what is no input."""
    root = tmp_path / "all"
    (root / "deep" / ".hidden").mkdir(parents=True)
    (root / "old.csv.partial").mkdir()
    for place in ("1.png", "deep/2.PNG", "deep/.hidden/3.png", ".4.png", "old.csv.partial/5.png"):
        (root / place).write_bytes(PICTURES[0])
    (root / "notes.txt").write_text("no picture")
    write_tar(root / "deep" / "shard.tar", numbered())
    write_tar(root / "shard.tgz", numbered(), "w:gz")
    write_parquet(root / "data" / "train.parquet", [{"bytes": content, "path": None} for content in PICTURES])
    write_parquet(root / "predictions.parquet", ["ant", "bee"], name="class")
    return root


def test_a_folder_is_everything_below_it_in_order(mixed: Path) -> None:
    inputs = find_inputs([mixed])
    assert [Path(source.name).relative_to(mixed).as_posix() for source in inputs.sources] == [
        "1.png",
        "data/train.parquet",
        "deep/2.PNG",
        "deep/shard.tar",
        "shard.tgz",
    ]
    found = entries(mixed)
    assert found == entries(mixed)
    assert len(found) == 2 + 3 * len(PICTURES)
    assert inputs.total is None  # to count an archive is to read it
    assert find_inputs([mixed / "data", mixed / "1.png"]).total == len(PICTURES) + 1


@pytest.mark.parametrize("shard", ["deep/shard.tar", "shard.tgz"])
def test_an_archive_gives_its_pictures_by_suffix(mixed: Path, shard: str) -> None:
    assert entries(mixed / shard) == [
        Entry(f"{mixed / shard}/a/{number:03}.png", content) for number, content in enumerate(PICTURES)
    ]


def test_only_regular_visible_members_that_are_pictures_count(tmp_path: Path) -> None:
    path = tmp_path / "webdataset.TAR"
    write_tar(path, {"./0.jpg": b"j", "0.json": b"{}", "0.cls": b"1", "._0.jpg": b"mac", "d/0.WebP": b"w"})
    assert entries(path) == [Entry(f"{path}/0.jpg", b"j"), Entry(f"{path}/d/0.WebP", b"w")]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_links_in_an_archive_are_what_they_link_to_or_errors(tmp_path: Path, mode: Any) -> None:
    path = tmp_path / f"a.tar{'.' * (mode != 'w')}{mode[2:]}"
    links = {
        "before.jpg": (tarfile.SYMTYPE, "deep/b.jpg"),  # what follows
        "hard.jpg": (tarfile.LNKTYPE, "a.jpg"),
        "deep/soft.jpg": (tarfile.SYMTYPE, "../a.jpg"),
        "twice.jpg": (tarfile.SYMTYPE, "hard.jpg"),
        "passwd.jpg": (tarfile.SYMTYPE, "/etc/passwd"),
        "loop.jpg": (tarfile.SYMTYPE, "loop.jpg"),
        "gone.jpg": (tarfile.LNKTYPE, "gone/a.jpg"),
        "pipe.jpg": (tarfile.FIFOTYPE, ""),
    }
    with tarfile.open(path, mode) as tar:
        for name in ("a.jpg", *links, "deep/b.jpg"):
            member = tarfile.TarInfo(name)
            if name in links:
                member.type, member.linkname = links[name]
            else:
                member.size = 1
            tar.addfile(member, io.BytesIO(name[-5:-4].encode()))
    found = {entry.name.removeprefix(f"{path}/"): entry.content for entry in entries(path)}
    assert list(found) == ["a.jpg", *links, "deep/b.jpg"]
    assert (found["a.jpg"], found["deep/b.jpg"]) == (b"a", b"b")
    inside = {"before.jpg": b"b", "hard.jpg": b"a", "deep/soft.jpg": b"a", "twice.jpg": b"a"}
    for name in links:
        if mode == "w" and name in inside:
            assert found[name] == inside[name]
        else:
            assert isinstance(found[name], Unreadable), name
    for start in range(len(found)):
        (source,) = find_inputs([path]).sources
        assert [entry.content for entry in source.entries(start)] == list(found.values())[start:]


def test_a_zip_archive_gives_its_pictures_by_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.ZIP"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("d.png")
        for name in ("x.png", "__MACOSX/._x.png", "notes.txt", "d.png/y.jpg", "damaged.png"):
            archive.writestr(name, name.encode() * 9)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "x.png")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("damaged.png").header_offset + 30 + len("damaged.png") + 3
    content[at] ^= 0xFF
    path.write_bytes(content)
    found = {entry.name.removeprefix(f"{path}/"): entry.content for entry in entries(path)}
    assert list(found) == ["x.png", "d.png/y.jpg", "damaged.png", "link.png"]
    assert (found["x.png"], found["d.png/y.jpg"]) == (b"x.png" * 9, b"d.png/y.jpg" * 9)
    assert "damaged" in found["damaged.png"].reason  # type: ignore[union-attr]
    assert "symbolic link" in found["link.png"].reason  # type: ignore[union-attr]
    assert find_inputs([path]).total == 4
    (source,) = find_inputs([path]).sources
    assert [entry.content for entry in source.entries(1)] == list(found.values())[1:]
    path.write_bytes(content[:40])
    (entry,) = entries(path)
    assert "not a zip archive" in entry.content.reason  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", ["struct", "bytes", "img"])
def test_parquet_rows_are_named_by_number(tmp_path: Path, stored: str) -> None:
    column: list[Any] = PICTURES if stored == "bytes" else [{"bytes": one, "path": "x.png"} for one in PICTURES]
    path = write_parquet(tmp_path / "a.parquet", column, name="img" if stored == "img" else "image")
    assert entries(path) == [Entry(f"{path}/{row}", content) for row, content in enumerate(PICTURES)]
    assert find_inputs([path]).total == len(PICTURES)


def test_parquet_rows_may_name_files_or_hold_nothing(tmp_path: Path) -> None:
    column = [{"bytes": None, "path": "deep/x.png"}, {"bytes": None, "path": None}, None]
    path = write_parquet(tmp_path / "a.parquet", column)
    nothing = Unreadable("column 'image' holds neither bytes nor a path")
    assert [entry.content for entry in entries(path)] == [tmp_path / "deep" / "x.png", nothing, nothing]


def test_patterns_match_as_in_a_shell_and_leave_out_what_is_no_picture(mixed: Path) -> None:
    assert names(f"{mixed}/**/*.png") == [str(mixed / "1.png")]
    assert names(f"{mixed}/[0-9].*") == [str(mixed / "1.png")]
    assert names(f"{mixed}/**") == names(f"{mixed}/*") == names(mixed)
    odd = mixed / "[1].png"
    odd.write_bytes(PICTURES[1])
    assert names(str(odd)) == [str(odd)]  # a file of that very name goes before what it matches as a pattern


def test_what_is_named_twice_is_taken_once_in_the_first_place(mixed: Path) -> None:
    shard, one = mixed / "shard.tgz", mixed / "1.png"
    found = names(shard, one, shard, str(mixed) + "/./1.png")
    assert found == [*names(shard), str(one)]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("gone.png", "no such file or folder"),
        ("gone*.png", "no such file or folder .as a pattern it matches 0 names"),
        ("all/*.txt", "none is a picture by its suffix .as a pattern it matches 1 names"),
        ("all/deep/.hidden/none", "no such file"),
        ("empty", "no pictures in this folder"),
        ("all/predictions.parquet", r"no column of pictures among id, class"),
        ("-", "-: no such file"),
    ],
)
def test_what_is_not_there_is_an_error_alone_and_an_entry_beside_others(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, named: str, said: str
) -> None:
    monkeypatch.chdir(mixed.parent)
    Path("empty").mkdir()
    with pytest.raises(SourceError, match=said):
        find_inputs([named])
    first, *others = entries(named, mixed)
    assert first.name == named
    assert isinstance(first.content, Unreadable)
    assert others == entries(mixed)


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(path: Path) -> list[Entry]:
    """Entries before the damage; the last one has to name the shard."""
    *before, last = entries(path, path.parent / "after.png")[:-1]
    assert last.name == str(path)
    assert isinstance(last.content, Unreadable)
    assert "\n" not in last.content.reason
    assert all(isinstance(entry.content, bytes) for entry in before)
    return before


@pytest.mark.parametrize("cut", [512 * 3 + 100, 512 * 5, 512 * 5 - 50, 512 * 4 + 10])
def test_a_tar_cut_short_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    whole = write_tar(tmp_path / "a.tar", numbered())
    expected = entries(whole)
    whole.write_bytes(whole.read_bytes()[:cut])
    ends = [
        1024 * number + 512 + len(content) for number, content in enumerate(PICTURES)
    ]  # two blocks of 512 bytes each
    assert damaged(whole) == expected[: sum(end <= cut for end in ends)]


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    path = write_tar(tmp_path / "a.tar", numbered())
    expected = entries(path)
    content = bytearray(path.read_bytes())
    content[1024 * 4 : 1024 * 4 + 512] = os.urandom(512)
    path.write_bytes(content)
    assert damaged(path) == expected[:4]


def test_a_compressed_tar_is_checked_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    path = write_tar(tmp_path / "a.tar.gz", numbered(), "w:gz")
    expected, content = entries(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    before = damaged(path)
    assert 0 < len(before) < len(PICTURES)
    assert before == expected[: len(before)]
    path.write_bytes(content[:-8] + bytes(4) + content[-4:])  # the checksum is wrong
    assert damaged(path) == expected


NO_ARCHIVES = {"empty": b"", "text": b"no archive" * 100, "compressed text": gzip.compress(b"no archive" * 100)}


@pytest.mark.parametrize("content", NO_ARCHIVES.values(), ids=NO_ARCHIVES)
def test_what_is_no_archive_is_one_failed_entry(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    for name in ("a.tar", "a.tgz", "a.parquet"):
        (tmp_path / name).write_bytes(content)
        assert damaged(tmp_path / name) == []


def test_shards_without_pictures_are_failed_entries(tmp_path: Path) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    assert damaged(write_tar(tmp_path / "a.tar", {"notes.txt": b"none"})) == []
    pyarrow = pytest.importorskip("pyarrow")
    assert damaged(write_parquet(tmp_path / "a.parquet", pyarrow.array([], pyarrow.binary()))) == []


def test_a_damaged_page_keeps_the_rows_before_it(tmp_path: Path) -> None:
    (tmp_path / "after.png").write_bytes(PICTURES[0])
    path = write_parquet(tmp_path / "a.parquet", PICTURES, rows_in_group=4)
    expected = entries(path)
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    assert damaged(path) == expected[:4]


# From any place on ----------------------------------------------------------------------------------------------------


def test_reading_on_from_any_position_gives_the_rest(mixed: Path) -> None:
    broken = mixed / "broken.tar"
    broken.write_bytes((mixed / "deep" / "shard.tar").read_bytes()[: 1024 * 3 + 600])
    inputs = find_inputs([mixed / "gone.png", mixed])
    found = list(inputs.entries())
    assert len({position for position, _ in found}) == len(found)
    for done, (position, _) in enumerate(found, 1):
        assert list(inputs.entries(position)) == found[done:]
    assert list(inputs.entries(BEGINNING)) == found
    assert list(inputs.entries(Position(len(inputs.sources), 0))) == []


def test_a_fingerprint_tells_when_inputs_are_others(mixed: Path) -> None:
    before = find_inputs([mixed]).fingerprint()
    assert before == find_inputs([mixed]).fingerprint()
    assert before.startswith("5 files (")
    assert find_inputs([mixed / "deep", mixed]).fingerprint() != before  # another order
    (mixed / "6.png").write_bytes(PICTURES[0])
    more = find_inputs([mixed]).fingerprint()
    assert more != before
    os.utime(mixed / "shard.tgz", (1, 1))
    assert find_inputs([mixed]).fingerprint() != more


def test_shards_are_streams(tmp_path: Path) -> None:
    """24 MiB of pictures in each shard, read in a few."""
    pyarrow = pytest.importorskip("pyarrow")
    each, count = 1 << 12, 6 << 10
    content = np.random.default_rng(0).bytes(each)
    tar = write_tar(tmp_path / "a.tar", dict.fromkeys((f"{n}.png" for n in range(count)), content))
    unlike = pyarrow.array([n.to_bytes(4, "big") + content for n in range(count)])
    parquet = write_parquet(tmp_path / "a.parquet", unlike, rows_in_group=count)
    del unlike

    entries(write_tar(tmp_path / "warm.tar", numbered()))
    tracemalloc.start()
    assert sum(1 for _ in find_inputs([tar]).entries()) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * each / 8, peak

    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    held = [pool.bytes_allocated() - before for _ in find_inputs([parquet]).entries()]
    assert len(held) == count
    assert max(held) < count * each / 2


def test_commands_that_look_at_single_files_say_what_shards_are(mixed: Path) -> None:
    pictures, others = find_pictures([mixed, mixed / "gone.png"])
    assert pictures == [mixed / "1.png", mixed / "deep" / "2.PNG"]
    assert {Path(name).name for name in others} == {"train.parquet", "shard.tar", "shard.tgz", "gone.png"}
    with pytest.raises(SourceError, match=r"shard\.tgz: holds many pictures"):
        find_pictures([mixed / "shard.tgz"])
