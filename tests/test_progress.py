"""What a run says while it goes on: how fast it is, and how long it still takes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from miaformer.training.progress import FIRST_ESTIMATE, PLAIN_INTERVAL_S, STEP_COST, Display, duration

METRICS = {"loss": 1.0, "accuracy": 0.5}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(
    seconds_per_step: float, total: int, done: int = 0, later: list[tuple[str, int]] | None = None, first_s: float = 0.0
) -> dict[int, str]:
    """The plain lines of a stage whose first step takes `first_s` longer than the others, by their step."""
    clock, out = Clock(), io.StringIO()
    display = Display(Console(file=out, width=200), clock=clock)
    display.start_stage("backbone", total, done, 32, later or [])
    clock.now += first_s
    said = {}
    for step in range(done + 1, total + 1):
        clock.now += seconds_per_step
        before = out.tell()
        display.step(step, METRICS)
        if out.tell() > before:
            said[step] = out.getvalue()[before:].rstrip("\n")
    display.end_stage()
    return said


def test_speed_and_time_left_are_told_from_the_tenth_step_on() -> None:
    said = lines(16.0, total=100)
    assert list(said) == list(range(1, 101))
    assert all("images/s" not in said[step] and "left" not in said[step] for step in range(1, FIRST_ESTIMATE))
    assert said[10] == "backbone       10/100  loss 1.000  acc 50.0 %  2.0 images/s  24 min left"  # 90 steps of 16 s
    assert said[99].endswith("2.0 images/s  16 s left")
    assert said[100].endswith("2.0 images/s")


def test_the_first_step_which_is_slow_does_not_count() -> None:
    assert lines(16.0, total=100, first_s=500.0)[10] == lines(16.0, total=100)[10]


def test_only_steps_done_now_count_after_a_resume() -> None:
    said = lines(16.0, total=100, done=60)
    assert all("left" not in said[step] for step in range(61, 70))
    assert said[70].endswith("2.0 images/s  8 min left")


def test_stages_to_come_are_estimated_by_what_their_steps_cost() -> None:
    said = lines(20.0, total=40, later=[("supervised", 60), ("some other kind", 15)])
    expected = (30 + 60 * STEP_COST["supervised"] + 15) * 20.0
    assert said[10].endswith(f"10 min left  run: about {duration(expected)}")
    assert said[40].endswith(f"images/s  run: about {duration(expected - 30 * 20.0)}")


def test_plain_lines_come_every_so_often_and_at_the_end() -> None:
    said = lines(1.0, total=50)
    assert list(said) == [1, 17, 33, 49, 50]
    assert PLAIN_INTERVAL_S == 15


def test_the_live_bar_tells_the_same() -> None:
    clock, out = Clock(), io.StringIO()
    display = Display(Console(file=out, width=200, force_terminal=True), clock=clock)
    display.start_stage("elastic", 100, 0, 32, [("reinforce", 10)])
    for step in range(1, 12):
        clock.now += 16
        display.step(step, METRICS)
    display.end_stage()
    assert "2.0 images/s  24 min left  run: about" in out.getvalue()


def test_a_display_that_is_off_says_nothing() -> None:
    out = io.StringIO()
    display = Display(Console(file=out), enabled=False)
    display.start_stage("elastic", 1, 0, 32)
    display.step(1, METRICS)
    display.end_stage()
    display.say("something")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "1 s"), (59.4, "59 s"), (59.5, "1 min"), (185, "3 min"), (3599, "1 h"), (4800, "1 h 20 min")],
)  # fmt: skip
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said
