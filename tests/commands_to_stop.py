"""Commands in processes of their own, for tests that send them signals.

They are forked from a process that has imported everything, so that each costs no more than its work; this module
imports little for the same reason.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

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


def start(argv: Sequence[str], log: Path, rows_in_group: int) -> ForkServerProcess:
    """A `miaformer` command, without numba; what it says goes to `log`.

    rows_in_group: of parquet files, so that little data has several.
    """
    process = _PROCESSES.Process(target=_run, args=(list(argv), log, rows_in_group))
    process.start()
    return process


def _run(argv: list[str], log: Path, rows_in_group: int) -> None:
    from miaformer import cli
    from miaformer.engine import native
    from miaformer.prediction import rows

    os.nice(19)  # so that whoever is to stop it is not late
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    native.enabled = False  # numba takes seconds to start
    rows.ROWS_IN_GROUP = rows_in_group
    raise SystemExit(cli.main(argv))
