"""Ctrl-C in the middle of training: the step at hand ends, and what there is by then is saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, its state saved."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}, saved as {checkpoint}")
        self.checkpoint, self.step = checkpoint, step


class StopRequest:
    """asked: whether somebody wants this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def by_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C asks to stop after the step at hand; the second one stops at once.

        One that follows within a second is the same one: terminal and launcher may both pass it on.
        """
        asked_at = float("inf")

        def request(signum: int, frame: Any) -> None:
            nonlocal asked_at
            if time.monotonic() > asked_at + 1:
                raise KeyboardInterrupt
            asked_at = min(asked_at, time.monotonic())
            self.asked = True

        try:
            before = signal.signal(signal.SIGINT, request)
        except ValueError:  # not the main thread: its owner handles signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
