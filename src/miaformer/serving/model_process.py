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
from typing import Any, TypeVar

from miaformer.prediction.predictor import Predictor

T = TypeVar("T")

STOPS = (signal.SIGINT, signal.SIGTERM)  # may come to both processes: the server first answers what it has admitted
_log = logging.getLogger(__name__)


class ModelDiedError(Exception):
    """The model's process ended in the middle of work. It is started again."""


class ModelProcess:
    """Calls functions of the model where it is: `process(function, *arguments)` is `function(predictor, *arguments)`.

    The function is one of a module, and all that goes there and back can be pickled. Threads may call at once: they are
    served in turn, and the next call is there already when one ends. The first waits for the model to be loaded.
    """

    def __init__(self, load: Callable[[], Predictor]) -> None:
        """load: called in the process, and again where it has to be started again. Can be pickled."""
        self._load = load
        self._trouble: str | None = None
        # A caller takes the second before it leaves the first, so answers go to their calls.
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._replacing = threading.Lock()
        self._child: _Child | None = _Child(load)
        atexit.register(self.close)

    def __call__(self, work: Callable[..., T], *arguments: Any) -> T:
        """Raises what `work` or `load` raises there, and ModelDiedError."""
        call = pickle.dumps((work, arguments), pickle.HIGHEST_PROTOCOL)
        with self._sending:
            child = self._loaded()
            with self._surviving(child):
                child.there.send_bytes(call)
            self._receiving.acquire()
        try:
            with self._surviving(child):
                raised, found = pickle.loads(child.there.recv_bytes())
        finally:
            self._receiving.release()
        if raised:
            raise found
        return found

    @property
    def trouble(self) -> str | None:
        """Why it answers nothing at present, if so."""
        if self._trouble is not None and self._sending.acquire(blocking=False):
            try:
                if self._child is not None and self._child.there.poll():
                    with suppress(Exception):  # then there is trouble still
                        self._loaded()
            finally:
                self._sending.release()
        return self._trouble

    def close(self) -> None:
        """Stop it, whatever it does."""
        atexit.unregister(self.close)
        if self._child is not None:
            self._child.stop()

    def _loaded(self) -> _Child:
        """The process, once its model is loaded. Raises what `load` raised."""
        child = self._child
        if child is None:
            child = self._child = _Child(self._load)
        if not child.loaded:
            with self._surviving(child):
                raised, error = pickle.loads(child.there.recv_bytes())
            if raised:
                child.stop()
                self._child, self._trouble = None, f"the model cannot be loaded: {error}"
                raise error
            child.loaded, self._trouble = True, None
        return child

    @contextmanager
    def _surviving(self, child: _Child) -> Iterator[None]:
        """Start another process where this one turns out to have ended."""
        try:
            yield
        except (EOFError, OSError):
            with self._replacing:
                if self._child is child:  # the first to find out
                    self._trouble = f"the model's process ended ({child.stop()}) and starts again"
                    _log.error("%s", self._trouble)
                    self._child = _Child(self._load)
            raise ModelDiedError("the model's process ended") from None


class _Child:
    """A process, and our end of the line to it."""

    def __init__(self, load: Callable[[], Predictor]) -> None:
        self.there, here = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # a fork would inherit the state of threads that it has not
        self._process = context.Process(target=_serve, args=(here, load), name="model", daemon=True)
        with _no_stops():
            self._process.start()
        here.close()  # now the process has the only one: when it ends, so does our waiting
        self.loaded = False

    def stop(self) -> str:
        """How it ended, in words."""
        self.there.close()
        self._process.join(0.1)  # one that died says how
        self._process.kill()  # there is nothing to save
        self._process.join()
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def _no_stops() -> Iterator[None]:
    """What is started meanwhile never hears of Ctrl-C and SIGTERM, not even before its first line runs."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(calls: Connection, load: Callable[[], Predictor]) -> None:
    """What the process does, until the other end of `calls` is closed, or gone with the process that had it."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
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
