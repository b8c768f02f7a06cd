"""Ctrl-C is heard once, whoever passes it on, and a second one is not to be argued with."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from miaformer.training.interrupts import StopRequest


def test_the_first_one_asks_an_echo_is_the_same_one_and_the_second_stops_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGINT)
    request = StopRequest()
    with request.by_interrupt():
        assert not request.asked
        signal.raise_signal(signal.SIGINT)
        assert request.asked
        now += 0.9
        signal.raise_signal(signal.SIGINT)
        now += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_is_changed() -> None:
    heard: list[object] = []

    def work() -> None:
        with StopRequest().by_interrupt():
            heard.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [signal.getsignal(signal.SIGINT)]
