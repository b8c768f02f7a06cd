"""Several processes that train together on this machine's processor.

Small tensors leave a second thread nothing to do: on two cores `digits` trains no faster with two threads, and 1.3
times as fast with two processes, each with its share of every batch. Accelerators have `accelerate launch`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from miaformer.engine.processor import processor_cores

if TYPE_CHECKING:
    from miaformer.training import Interrupted

WRONG, STOPPED = 2, 130  # exit status after an error told in one line, and after Ctrl-C
_PATIENCE_S = 20.0  # for the other processes, once one has failed


def add_processes(parser: argparse.ArgumentParser) -> None:
    """--processes, for commands that share training by themselves."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="number of processes that share training on a CPU (default: 2 if it has 2 or more cores)",
    )


def check_processes(count: int) -> None:
    if count < 1:
        raise ValueError(f"--processes {count} must be at least 1")


def chosen_processes(asked: int | None, on_processor: bool) -> int:
    """What --processes says, or as many as pay: two on a processor that has two cores."""
    if asked is not None:
        check_processes(asked)
        return asked
    return min(2, processor_cores()) if on_processor else 1


def say_stopped(stop: Interrupted, advice: str) -> None:
    """After Ctrl-C; the first process speaks for all."""
    if is_first_process():
        sys.stderr.write(f"Stopped after step {stop.step}; saved as {stop.checkpoint}. {advice}\n")


def is_one_of_several() -> bool:
    """Whether this process was started as one of a group, here or by torchrun."""
    return "RANK" in os.environ


def is_first_process() -> bool:
    """Whether this one, alone or of a group, speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def run_in_processes(arguments: Sequence[str], count: int) -> int:
    """Run `miaformer ARGUMENTS` in `count` processes and return its exit status: that of the first one to fail.

    The first process has the terminal; what others say is shown where it fails without a reason of its own. Ctrl-C
    is passed on, and waited for: they save and end by themselves. Raises ChildProcessError where one was killed.
    """
    port = _free_port()
    with tempfile.TemporaryFile("w+") as others:
        processes = [_start(arguments, rank, count, port, others) for rank in range(count)]
        try:
            with _passing_on_interrupts(processes):
                failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is None:
            return 0
        status = int(processes[failed].returncode)
        if processes[0].returncode not in (WRONG, STOPPED):  # it has not told why by itself
            others.seek(0)
            sys.stderr.write(others.read())
    if status < 0:
        raise ChildProcessError(f"process {failed} of {count} was killed ({signal.Signals(-status).name})")
    return status


def _start(arguments: Sequence[str], rank: int, count: int, port: int, others: IO[str]) -> subprocess.Popen[Any]:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, processor_cores() // count)),
    }
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:  # a host name that resolves to an address out of reach is no hindrance then
        environment["GLOO_SOCKET_IFNAME"] = loopback[0]
    return subprocess.Popen(
        [sys.executable, "-m", "miaformer", *arguments],
        env={**os.environ, **environment},
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else others,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> int | None:
    """Until all have ended, or for a while after one has failed: the first that failed."""
    failed, deadline = None, float("inf")
    while True:
        statuses = [process.poll() for process in processes]
        if failed is None:
            failed = next((rank for rank, status in enumerate(statuses) if status), None)
            deadline = float("inf") if failed is None else time.monotonic() + _PATIENCE_S
        if None not in statuses or time.monotonic() > deadline:
            return failed
        time.sleep(0.05)


@contextmanager
def _passing_on_interrupts(processes: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    """A terminal sends Ctrl-C to all of them, a process manager to this one only: they take two at once for one."""

    def pass_on(signum: int, frame: Any) -> None:
        for process in processes:
            process.send_signal(signum)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
