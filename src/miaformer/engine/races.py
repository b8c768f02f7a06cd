"""What is fastest on this machine: raced once, and kept in the user's cache."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from miaformer.data.files import whole_file
from miaformer.engine.processor import processor_name

LEAST_CALLS = 5


def cache_folder() -> Path:
    """Where exported files and what was fastest are kept: MIAFORMER_CACHE, or `miaformer` in the user's cache."""
    given = os.environ.get("MIAFORMER_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "miaformer"


def faster(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of a call of each, called in turn, the fastest first. The first call of each does not count.

    seconds: for each of them; no fewer than `LEAST_CALLS` are timed.
    """
    for call in candidates.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begun = clock()
    while len(next(iter(taken.values()))) < LEAST_CALLS or clock() - begun < seconds * len(candidates):
        for name, call in candidates.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return dict(sorted(medians.items(), key=lambda one: one[1]))


def remembered(file: Path, race: str, candidates: set[str], run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `run` gives, or gave when it was last run on this machine with these candidates.

    file: JSON, in which races are kept by name, processor, threads and torch version; where it cannot be written, they
    are run again next time.
    """
    key = f"{race}, {processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found = _kept(file).get(key)
    if not isinstance(found, dict) or set(found) != candidates:
        found = run()
        with suppress(OSError), whole_file(file) as unfinished:
            unfinished.write_text(json.dumps({**_kept(file), key: found}, indent=2) + "\n")
    return found


def _kept(file: Path) -> dict[str, dict[str, float]]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
