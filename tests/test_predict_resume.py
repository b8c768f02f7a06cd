"""A run of `miaformer predict` that was killed goes on with --resume and loses nothing, repeats nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from commands_to_stop import start
from PIL import Image

from miaformer import MIAFormer
from miaformer.engine import native
from miaformer.prediction.classify import BatchClassifier
from miaformer.prediction.entries import BEGINNING, Position
from miaformer.prediction.predictor import Predictor
from miaformer.prediction.rows import Row
from miaformer.prediction.run import predict
from miaformer.prediction.sources import find_inputs
from miaformer.prediction.unfinished import UnfinishedRun, is_finished

pytest.importorskip("pyarrow")
SUFFIXES = ("csv", "jsonl", "parquet")


def content(path: Path) -> Any:
    """Bytes, or rows of a parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_bytes()


# Rows, whatever they are of -------------------------------------------------------------------------------------------


def batches_of_rows(count: int = 40) -> list[list[Row]]:
    """As a classifier makes them, one with every third an error; names have what names can have."""
    generator = random.Random(3)
    rows: list[Row] = []
    for number in range(count):
        path = f'a,b/"{number}"\nü☃ {"x" * generator.randrange(60)}.jpg'
        if number % 3 == 0:
            rows.append({"path": path, "error": f"damaged, {number}"})
            continue
        top_k = [{"label": label, "class": None, "probability": generator.random()} for label in range(2)]
        shares = {name: generator.random() for name in ("macs_fraction", "depth_kept", "heads_kept", "tokens_kept")}
        rows.append({"path": path, **top_k[0], "top_k": top_k, **shares})
    return [rows[start : start + 4] for start in range(0, count, 4)]


def write(out: Path, batches: Sequence[list[Row]], resume: bool = False, stop_after: int | None = None) -> int:
    """Add what a run does not have; returns how many it had. stop_after: batches, and then stop as a kill does."""
    with UnfinishedRun(out, {"--top-k": 2}, resume) as unfinished:
        done = unfinished.position.entries
        assert unfinished.tally.rows == sum(len(batch) for batch in batches[:done])
        for number, batch in enumerate(batches[done:stop_after], done + 1):
            unfinished.add(batch, Position(0, number))
        if stop_after is None:
            unfinished.finish()
            assert unfinished.tally.failures == tuple(
                (row["path"], row["error"]) for batch in batches for row in batch if "error" in row
            )
    return done


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_kill_between_any_two_bytes_is_healed(tmp_path: Path, suffix: str) -> None:
    """The journal as a kill leaves it: cut anywhere."""
    batches = batches_of_rows()
    whole = tmp_path / f"whole.{suffix}"
    assert write(whole, batches) == 0
    generator = random.Random(5)
    for trial in range(8 if suffix == "parquet" else 30):
        out = tmp_path / str(trial) / f"out.{suffix}"
        stop = generator.randrange(1, len(batches))
        write(out, batches, stop_after=stop)
        assert not out.exists()
        journal = journal_of(out)
        lines = journal.read_bytes()
        cut = generator.randrange(len(lines) + 1) if trial else len(lines) - 1  # once a line that lacks its end alone
        journal.write_bytes(lines[:cut])
        kept = max(journal.read_bytes().count(b"\n") - 1, 0)
        assert write(out, batches, resume=True, stop_after=stop) == kept
        assert write(out, batches, resume=True) == max(kept, stop)
        assert content(out) == content(whole)
        assert list(out.parent.iterdir()) == [out]  # and nothing is left over


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_that_went_missing_are_made_again(tmp_path: Path, suffix: str) -> None:
    """Not by a kill: the machine went down before what was written was on the disk."""
    batches = batches_of_rows()
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    write(whole, batches)
    write(out, batches, stop_after=6)
    lines = journal_of(out).read_bytes().splitlines(keepends=True)
    lines[3] = bytes(len(lines[3]) - 1) + b"\n"
    journal_of(out).write_bytes(b"".join(lines))
    assert write(out, batches, resume=True, stop_after=3) == 2
    assert write(out, batches, resume=True) == 3
    assert content(out) == content(whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_kill_in_the_last_steps_is_healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    batches = batches_of_rows()
    out, before = tmp_path / f"out.{suffix}", tmp_path / "before"
    folder = journal_of(out).parent
    with monkeypatch.context() as killed:  # before the folder goes
        killed.setattr("miaformer.prediction.unfinished._remove", lambda folder: None)
        write(out, batches)
    expected = content(out)
    shutil.copytree(folder, before)
    assert write(out, batches, resume=True) == len(batches)
    assert is_finished(out)
    assert not folder.exists()
    assert content(out) == expected

    shutil.move(before, folder)  # before the rows become the file
    out.rename(folder / f"rows.{suffix}")
    assert not is_finished(out)
    assert write(out, batches, resume=True) == len(batches)
    assert content(out) == expected
    assert not folder.exists()


def test_parquet_is_typed_and_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    monkeypatch.setattr("miaformer.prediction.rows.ROWS_IN_GROUP", 9)
    out = tmp_path / "out.parquet"
    batches = batches_of_rows()
    write(out, batches)
    file = pyarrow.parquet.ParquetFile(out)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [9, 9, 9, 9, 4]
    schema = file.schema_arrow
    guess = pa.struct([("label", pa.int64()), ("class", pa.string()), ("probability", pa.float64())])
    assert {name: schema.field(name).type for name in ("path", "label", "class", "probability", "error")} == {
        "path": pa.string(),
        "label": pa.int64(),
        "class": pa.string(),
        "probability": pa.float64(),
        "error": pa.string(),
    }
    assert schema.field("top_k").type.value_type == guess
    assert schema.field("macs_fraction").type == pa.float64()
    rows = [row for batch in batches for row in batch]
    assert [{key: value for key, value in row.items() if value is not None} for row in file.read().to_pylist()] == [
        {key: value for key, value in row.items() if value is not None} for row in rows
    ]


def test_one_process_at_a_time_and_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("what was there before")
    batches = batches_of_rows()
    with UnfinishedRun(out, {}) as first:
        first.add(batches[0], Position(0, 1))
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another process is at work in .*out\.csv\.partial"):
                UnfinishedRun(out, {}, resume)
        first.add(batches[1], Position(0, 2))
    with UnfinishedRun(out, {}, resume=True) as second:
        assert second.position == Position(0, 2)
    with UnfinishedRun(out, {}) as third:  # without --resume all is dropped
        assert third.position == BEGINNING
        third.add(batches[0], Position(0, 1))
        assert out.read_text() == "what was there before"
        third.finish()
    assert out.read_text().startswith("path,label,class,")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_in_commands_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "enabled", False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Some 300 small pictures: a folder, a damaged tar archive and a parquet file."""
    import tarfile

    import pyarrow.parquet

    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(7)
    (root / "folder").mkdir()
    for number in range(200):
        pixels = generator.integers(0, generator.integers(2, 256), (18, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "folder" / f"{number:03}.png")
    (root / "folder" / "010.png").write_bytes(b"no picture")
    files = sorted((root / "folder").iterdir())
    with tarfile.open(root / "shard.tar", "w") as tar:
        for file in files[50:]:
            tar.add(file, file.name)
    shard = root / "cut.tar"
    shard.write_bytes((root / "shard.tar").read_bytes()[:40_000])
    table = pyarrow.table({"image": [file.read_bytes() for file in files[100:]]})
    pyarrow.parquet.write_table(table, root / "shard.parquet")
    return [root / "folder", shard, root / "shard.parquet"]


def command(model: Path, pictures: Sequence[Path], out: Path, *more: object) -> list[str]:
    argv = ["predict", model, *pictures, "--out", out, "--batch-size", 4, "--device", "cpu", "--threads", 1, *more]
    return [str(part) for part in argv]


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial") / "run.jsonl"


def marks(out: Path) -> int:
    """How often the journal says that more is safe."""
    return max(journal_of(out).read_bytes().count(b"\n") - 1, 0) if journal_of(out).exists() else 0


def stopped(
    argv: Sequence[str], out: Path, more: int, sign: int, delay_s: float = 0.0, pause_s: float = 0.0
) -> tuple[int, str]:
    """The exit status of a command that gets a signal once so many more marks are there, and what it said."""
    log = out.with_name("log")
    enough = marks(out) + more if "--resume" in argv else more
    journal_of(out).unlink(missing_ok="--resume" not in argv)
    process = start(argv, log, rows_in_group=8, pause_s=pause_s)
    deadline = time.monotonic() + 120
    while marks(out) < enough:
        assert process.is_alive(), f"it ended before it could be stopped: {log.read_text()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay_s)
    assert process.pid is not None
    os.kill(process.pid, sign)
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


@pytest.mark.parametrize(("suffix", "most"), [("csv", 14), ("parquet", 9)])
def test_killed_again_and_again_it_ends_as_if_it_never_was(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    pictures: list[Path],
    tmp_path: Path,
    suffix: str,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """most: how many more marks a kill waits for."""
    monkeypatch.setattr("miaformer.cli.output.PIPED_WIDTH", 1000)  # no name is folded
    generator = random.Random(11)
    whole, out = tmp_path / "whole" / f"out.{suffix}", tmp_path / f"out.{suffix}"
    assert run(capsys, *command(calibrated, pictures, whole, "--budget", 0.5))[0] == 1
    expected = content(whole)
    for kill in range(3 if suffix == "csv" else 2):
        argv = command(calibrated, pictures, out, "--budget", 0.5, *(["--resume"] if kill else []))
        before = marks(out)
        status, _ = stopped(argv, out, generator.randint(1, most), signal.SIGKILL, generator.uniform(0, 0.01))
        assert status == -signal.SIGKILL
        assert marks(out) > before  # it went on where it was
        assert not out.exists()
    status, said, err = run(capsys, *command(calibrated, pictures, out, "--budget", 0.5, "--resume"))
    assert status == 1
    assert "Resuming after " in said
    assert "2 failed" in err  # those found before the last kill are told of as well
    assert "010.png" in err
    assert "cut.tar" in err
    assert content(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", out.name, "whole"]


@pytest.fixture(scope="module")
def interrupted(calibrated: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file whose run was stopped by Ctrl-C, and what was said."""
    out = tmp_path_factory.mktemp("interrupted") / "out.parquet"
    status, said = stopped(command(calibrated, pictures, out), out, 3, signal.SIGINT, pause_s=0.2)
    assert status == 130
    return out, said


def copy_of(out: Path, folder: Path) -> Path:
    shutil.copytree(journal_of(out).parent, folder / journal_of(out).parent.name)
    return folder / out.name


def test_ctrl_c_says_in_one_line_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    pictures: list[Path],
    interrupted: tuple[Path, str],
    tmp_path: Path,
) -> None:
    out, said = copy_of(interrupted[0], tmp_path), interrupted[1]
    kept = sum(len(json.loads(line)["rows"]) for line in journal_of(out).read_text().splitlines()[1:])
    assert said == f"miaformer: interrupted: {kept} pictures kept; the same command with --resume goes on\n"
    status, told, _ = run(capsys, *command(calibrated, pictures, out, "--resume"))
    assert status == 1
    assert f"Resuming after {kept} pictures." in told
    run(capsys, *command(calibrated, pictures, tmp_path / "whole.parquet"))
    assert content(out) == content(tmp_path / "whole.parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_classified_before_ctrl_c_is_kept(
    calibrated: Path, pictures: list[Path], tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"out.{suffix}"
    classify = BatchClassifier(Predictor(MIAFormer.from_pretrained(calibrated)))

    def press(count: int) -> None:
        if count == 12:
            raise KeyboardInterrupt

    with UnfinishedRun(out, {}) as unfinished, pytest.raises(KeyboardInterrupt):
        predict(find_inputs(pictures), classify, unfinished, 4, press)
    with UnfinishedRun(out, {}, resume=True) as unfinished:
        assert unfinished.tally.rows == 12
        assert [path for path, _ in unfinished.tally.failures] == [str(pictures[0] / "010.png")]
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--budget", "0.5"], "--budget none, this one 0.5"),
        (["--cap", "0.5"], "--cap none, this one 0.5"),
        (["--top-k", "2"], "--top-k 5, this one 2"),
        (["--batch-size", "2"], "--batch-size 4, this one 2"),
        (["--dtype", "bfloat16"], "--dtype float32, this one bfloat16"),
        (["--classes", "NAMES"], "--classes none, this one of content "),
        (["--threads", "2"], "--threads 1, this one 2"),
        (["MODEL"], "MODEL of weights and calibration "),
        (["PATH"], "PATH 202 files ("),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_other_arguments_are_refused_in_one_line_and_lose_nothing(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    uncalibrated: Path,
    pictures: list[Path],
    interrupted: tuple[Path, str],
    tmp_path: Path,
    changed: list[str],
    named: str,
) -> None:
    out = copy_of(interrupted[0], tmp_path)
    before = {path: path.read_bytes() for path in journal_of(out).parent.iterdir()}
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    model = uncalibrated if changed == ["MODEL"] else calibrated
    paths = pictures[:2] if changed == ["PATH"] else pictures
    more = [str(names) if part == "NAMES" else part for part in changed if part not in ("MODEL", "PATH")]
    status, told, said = run(capsys, *command(model, paths, out, "--resume", *more))
    assert (status, told) == (2, "")
    assert said.count("\n") == 1
    assert f"the unfinished run in {out}.partial has {named}" in said
    assert "start afresh, without --resume" in said
    assert {path: path.read_bytes() for path in journal_of(out).parent.iterdir()} == before
    assert not out.exists()


def test_without_resume_it_starts_afresh(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    pictures: list[Path],
    interrupted: tuple[Path, str],
    tmp_path: Path,
) -> None:
    out = copy_of(interrupted[0], tmp_path)
    out.write_text("what was there before")
    some = sorted(pictures[0].iterdir())[20:24]
    status, told, _ = run(capsys, *command(calibrated, some, out, "--top-k", 1))
    assert status == 0
    assert "Resuming" not in told
    assert [row["path"] for row in content(out)] == [str(path) for path in some]
    assert not journal_of(out).parent.exists()


def test_resume_starts_where_there_is_nothing_and_leaves_what_is_whole(
    capsys: pytest.CaptureFixture[str], calibrated: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    some = sorted(pictures[0].iterdir())[20:24]
    status, told, _ = run(capsys, *command(calibrated, some, out, "--resume"))
    assert (status, len(out.read_text().splitlines())) == (0, 4)
    assert "Resuming" not in told
    os.utime(out, (1, 1))
    status, told, said = run(capsys, *command(calibrated, some, out, "--resume"))
    assert (status, said) == (0, "")
    assert "nothing to resume" in told
    assert out.stat().st_mtime == 1


def test_a_folder_in_the_way_is_told_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], calibrated: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").mkdir()
    (tmp_path / "other.csv.partial").write_text("not ours")
    for out, named in (("rows.csv", "is a folder"), ("other.csv", "is in the way")):
        status, _, said = run(capsys, *command(calibrated, pictures, tmp_path / out))
        assert (status, said.count("\n")) == (2, 1)
        assert named in said
    shard = tmp_path / "shard.parquet"
    shutil.copy(pictures[2], shard)
    status, _, said = run(capsys, *command(calibrated, [shard], tmp_path / "." / "shard.parquet"))
    assert (status, said.count("\n")) == (2, 1)
    assert "is one of the files to read" in said
    assert shard.read_bytes() == pictures[2].read_bytes()
