"""The model's process answers the calls of many threads, and its end is told, not waited for."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("fastapi")

from miaformer.prediction.predictor import Predictor
from miaformer.serving.model_process import ModelDiedError, ModelProcess

Load = Callable[[], Predictor]  # what is loaded here is no model: nothing of the process depends on that


def load_what(what: str) -> str:
    return what


def load_unless(missing: str) -> str:
    if not os.path.exists(missing):
        raise FileNotFoundError(2, "no such model", missing)
    return "here"


def echo(model: str, *arguments: Any) -> tuple[Any, ...]:
    return model, *arguments


def pid_of(_: str) -> int:
    return os.getpid()


def sleep(_: str, seconds: float) -> None:
    time.sleep(seconds)


def fail(_: str, error: Exception) -> None:
    raise error


def fail_oddly(_: str) -> None:
    class LocalError(Exception):
        pass

    raise LocalError("cannot be pickled")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(done: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def process() -> Iterator[ModelProcess]:
    process = ModelProcess(cast(Load, partial(load_what, "model")))
    yield process
    process.close()


def test_each_thread_gets_its_own_answers(process: ModelProcess) -> None:
    def ask(thread: int) -> bool:
        sent = [(thread, n, bytes(n * 1000)) for n in range(60)]
        return all(process(echo, *what) == ("model", *what) for what in sent)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert process.trouble is None


def test_errors_are_raised_here_and_say_where_there(process: ModelProcess) -> None:
    with pytest.raises(OSError, match="a file of the model's") as raised:
        process(fail, OSError("a file of the model's"))  # not taken for the end of the line
    assert any("in fail" in note for note in raised.value.__notes__)
    with pytest.raises(RuntimeError, match="LocalError: cannot be pickled"):
        process(fail_oddly)
    assert process(echo, 1) == ("model", 1)
    assert process.trouble is None


def test_signals_that_stop_a_server_do_not_stop_it(process: ModelProcess) -> None:
    pid = process(pid_of)
    for stops in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, stops)
    assert process(pid_of) == pid


def test_killed_it_fails_what_it_had_and_starts_again(process: ModelProcess) -> None:
    pid = process(pid_of)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(process, sleep, 60) for _ in range(2)]  # one runs, one is on its way
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(ModelDiedError):
                call.result(timeout=30)
    assert process.trouble == "the model's process ended (signal 9) and starts again"
    wait_until(lambda: process.trouble is None)  # once it is there, whether or not anybody calls
    assert process(echo, 2) == ("model", 2)
    assert process(pid_of) != pid
    assert gone(pid)


def test_a_model_that_cannot_be_loaded_is_tried_again_when_it_is_asked(tmp_path: Path) -> None:
    process = ModelProcess(cast(Load, partial(load_unless, str(tmp_path / "model"))))
    try:
        with pytest.raises(FileNotFoundError, match="no such model"):
            process(echo)
        assert "the model cannot be loaded: " in str(process.trouble)
        (tmp_path / "model").touch()
        assert process(echo, 3) == ("here", 3)
        assert process.trouble is None
    finally:
        process.close()


PARENT = """
import time
from functools import partial
from miaformer.serving.model_process import ModelProcess
from test_model_process import load_what, pid_of

if __name__ == "__main__":
    print(ModelProcess(partial(load_what, "model"))(pid_of), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_it_ends_with_the_server_however_that_ends(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid))
