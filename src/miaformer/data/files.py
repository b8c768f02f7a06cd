"""Files that are there whole or not at all, wherever a program is stopped; JSON; directories that hold one run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; what was there stays until then. Makes its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    yield unfinished
    unfinished.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming a file that is missing, damaged, or holds something else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return content


def holds_run(directory: str | Path) -> bool:
    """Whether a training run in `directory` has come to something: a checkpoint, a model, or what was measured of it.

    A start that failed before its first checkpoint leaves nothing to go on from: it counts as none.
    """
    directory = Path(directory)
    kept = ("checkpoints/step_*", "model", "measured.json")
    return (directory / "recipe.json").exists() and any(any(directory.glob(pattern)) for pattern in kept)


def check_holds_no_run(directory: str | Path) -> None:
    """Raises ValueError where `directory` holds a run: two runs in one directory would mix."""
    if holds_run(directory):
        raise ValueError(f"{directory} holds a run already: resume it (--resume), or choose another directory")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes that lock `directory`, which exists, out of it. Raises ValueError where one is in it."""
    if os.name == "nt":  # it opens no directories, and has no flock
        yield
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        try:
            lock(opened)
        except BlockingIOError:
            raise ValueError(f"another process is training in {directory}: choose another directory") from None
        yield
    finally:
        os.close(opened)


def lock(file: IO[bytes] | int) -> None:
    """Raises BlockingIOError where another process has it. The end of a process, any end, unlocks its files."""
    try:
        import fcntl
    except ImportError:  # on Windows nothing is locked
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system that has no locks
        return
