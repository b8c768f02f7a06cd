"""Files that are there whole or not at all, wherever a program is stopped, and directories that hold one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; what was there stays until then. Makes its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    yield unfinished
    unfinished.replace(path)


def check_holds_no_run(directory: str | Path) -> None:
    """Raises ValueError where a run's `recipe.json` is there: two runs in one directory would mix."""
    if (Path(directory) / "recipe.json").exists():
        raise ValueError(f"{directory} holds a run already: resume it (--resume), or choose another directory")
