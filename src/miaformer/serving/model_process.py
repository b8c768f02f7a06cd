"""The model in a process of its own, so that what surrounds it takes no time from it.

One process runs one line of Python at a time. A forward pass is hundreds of short operations with Python between them,
and each of these would wait until the event loop or a decoder lets go: half of a small model's time, by measurement.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from miaformer.predictor import Predictor

T = TypeVar("T")

_log = logging.getLogger(__name__)


class ModelDiedError(Exception):
    """The model's process ended in the middle of work. It is started again."""


class ModelProcess:
    """Calls functions of the model where it is: `process(function, *arguments)` is `function(predictor, *arguments)`.

    The function is one of a module, and all that goes there and back can be pickled. Calls wait for each other, and the
    first one for the model to be loaded.
    """

    def __init__(self, load: Callable[[], Predictor]) -> None:
        """load: called in the process, and again where it has to be started again. Can be pickled."""
        self._load = load
        self._one_at_a_time = threading.Lock()
        self._process: SpawnProcess | None = None
        self._loaded = False
        self._trouble: str | None = None
        self._start()
        atexit.register(self.close)

    def __call__(self, work: Callable[..., T], *arguments: Any) -> T:
        """Raises what `work` or `load` raises there, and ModelDiedError."""
        call = pickle.dumps((work, arguments), pickle.HIGHEST_PROTOCOL)
        with self._one_at_a_time:
            if self._process is None:
                self._start()
            self._wait_until_loaded()
            with self._surviving():
                self._there.send_bytes(call)
                raised, found = pickle.loads(self._there.recv_bytes())
        if raised:
            raise found
        return found

    @property
    def trouble(self) -> str | None:
        """Why it answers nothing at present, if so."""
        if self._trouble is not None and self._one_at_a_time.acquire(blocking=False):
            try:
                if self._process is not None and not self._loaded and self._there.poll():
                    with suppress(Exception):  # then there is trouble still
                        self._wait_until_loaded()
            finally:
                self._one_at_a_time.release()
        return self._trouble

    def close(self) -> None:
        """Stop it, whatever it does."""
        atexit.unregister(self.close)
        self._stop()

    def _wait_until_loaded(self) -> None:
        if self._loaded:
            return
        with self._surviving():
            raised, error = pickle.loads(self._there.recv_bytes())
        if raised:
            self._trouble = f"the model cannot be loaded: {error}"
            self._stop()
            raise error
        self._loaded, self._trouble = True, None

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Start it again where it turns out to have ended."""
        try:
            yield
        except (EOFError, OSError):
            self._trouble = f"the model's process ended ({self._stop()}) and starts again"
            _log.error("%s", self._trouble)
            self._start()
            raise ModelDiedError(self._trouble) from None

    def _start(self) -> None:
        self._there, here = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # a fork would inherit the state of threads that it has not
        self._process = context.Process(target=_serve, args=(here, self._load), name="model", daemon=True)
        self._process.start()
        here.close()  # now the process has the only one: when it ends, so does our waiting
        self._loaded = False

    def _stop(self) -> str:
        """How it ended, in words."""
        if self._process is None:
            return "it had been stopped"
        self._there.close()
        self._process.join(0.1)  # one that died says how
        self._process.kill()  # there is nothing to save
        self._process.join()
        code, self._process = self._process.exitcode, None
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _serve(calls: Connection, load: Callable[[], Predictor]) -> None:
    """What the process does, until the other end of `calls` is closed, or gone with the process that had it."""
    for stops in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the server may yet need it, whoever sends them
        signal.signal(stops, signal.SIG_IGN)
    try:
        predictor = load()
    except Exception as error:
        calls.send_bytes(_pickled_error(error))
        return
    try:
        calls.send_bytes(pickle.dumps((False, None)))
        while True:
            work, arguments = pickle.loads(calls.recv_bytes())
            try:
                said = pickle.dumps((False, work(predictor, *arguments)), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                said = _pickled_error(error)
            calls.send_bytes(said)
    except (EOFError, OSError):
        return


def _pickled_error(error: Exception) -> bytes:
    """With its traceback; in words where it cannot be pickled and read again."""
    error.add_note(f"in the model's process:\n{traceback.format_exc()}")
    try:
        said = pickle.dumps((True, error))
        pickle.loads(said)
    except Exception:
        return pickle.dumps((True, RuntimeError(f"{type(error).__name__}: {error}")))
    return said
