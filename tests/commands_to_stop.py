"""Commands in processes of their own, for tests that send them signals.

They are forked from a process that has imported everything, so that each costs no more than its work; this module
imports little for the same reason.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        __name__,
        "miaformer.cli",
        "miaformer.cli.output",
        "miaformer.cli.predict",
        "miaformer.data.transforms",
        "miaformer.prediction.predictor",
        "miaformer.prediction.run",
        "pyarrow.parquet",
    ]
)


def start(argv: Sequence[str], log: Path, rows_in_group: int, pause_s: float = 0.0) -> ForkServerProcess:
    """A `miaformer` command, without numba; what it says goes to `log`.

    rows_in_group: of parquet files, so that little data has several. pause_s: after each batch, as on a slow disk, for
    whoever is to stop it and may be late.
    """
    process = _PROCESSES.Process(target=_run, args=(list(argv), log, rows_in_group, pause_s))
    process.start()
    return process


def _run(argv: list[str], log: Path, rows_in_group: int, pause_s: float) -> None:
    from miaformer import cli
    from miaformer.engine import native
    from miaformer.prediction import rows
    from miaformer.prediction.unfinished import UnfinishedRun

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    add = UnfinishedRun.add

    def add_slowly(run: UnfinishedRun, *batch: Any) -> int:
        count = add(run, *batch)
        time.sleep(pause_s)
        return count

    UnfinishedRun.add = add_slowly  # type: ignore[method-assign]
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    native.enabled = False  # numba takes seconds to start
    rows.ROWS_IN_GROUP = rows_in_group
    raise SystemExit(cli.main(argv))
