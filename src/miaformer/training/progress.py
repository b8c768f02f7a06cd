"""What a run shows while it goes on: a live line for people, JSONL and TensorBoard for everything else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

DURATIONS = "durations.jsonl"  # in a run's directory
PLAIN_INTERVAL_S = 15.0  # between lines where no terminal can show a live one


# What a step of a stage costs against one of the backbone stage: the teacher's forward pass, the gates of `supervised`,
# the two sub-networks of an image in `reinforce`. Rough: between what a ViT of 0.1 million parameters and a ViT-S at
# 112 px showed on a CPU (elastic 2.1 and 2.0, supervised 1.7 and 3.3, reinforce 3.5 and 6.2). Other kinds count as 1.
STEP_COST = {"probe": 0.5, "backbone": 1.0, "elastic": 2.0, "supervised": 2.5, "reinforce": 4.5}
FIRST_ESTIMATE = 10  # steps of a stage, done now, before its pace is told


class Display:
    """A progress bar a stage, with running means of loss, accuracy, and mean and spread of MACs over images, and the
    time left.

    clock: seconds.
    """

    def __init__(
        self, console: Console | None = None, enabled: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.enabled = enabled
        self._clock = clock
        self._progress: Progress | None = None
        self._last_line = float("-inf")

    def start_stage(
        self, title: str, total: int, done: int, batch_size: int, later: Sequence[tuple[str, int]] = ()
    ) -> None:
        """title: the stage's kind. done: of its `total` steps, before now. later: kinds and steps of those to come."""
        self._title, self._total = title, total
        self._pace = Pace(title, total, done, batch_size, later, self._clock)
        if not self.enabled:
            return
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, metrics="")
            self._progress.start()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        text = f"{describe(metrics)}{self._pace.after(done)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, metrics=text)
        elif self._clock() - self._last_line > PLAIN_INTERVAL_S or done == self._total:
            self._last_line = self._clock()
            self.console.print(f"{self._title:<10} {done:>6}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def end_stage(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Pace:
    """How fast a stage goes, and about how long it and those after it still take, by the steps done now.

    The first step is left out: it warms up and starts workers. Stages to come are taken to cost what `STEP_COST` says.
    """

    def __init__(
        self,
        kind: str,
        total: int,
        done: int,
        batch_size: int,
        later: Sequence[tuple[str, int]],
        clock: Callable[[], float],
    ) -> None:
        self._total, self._before, self._batch_size, self._clock = total, done, batch_size, clock
        own = STEP_COST.get(kind, 1.0)
        self._later = sum(steps * STEP_COST.get(other, 1.0) / own for other, steps in later)  # in steps of this stage
        self._since = 0.0

    def after(self, done: int) -> str:
        """What there is to tell after a step: pictures a second, and the time left; nothing at first."""
        now, steps = self._clock(), done - self._before
        if steps <= 1:
            self._since = now
        if steps < FIRST_ESTIMATE:
            return ""
        seconds = (now - self._since) / (steps - 1)
        speed = self._batch_size / max(seconds, 1e-9)
        text = f"  {speed:,.{0 if speed >= 10 else 1}f} images/s"
        left = self._total - done
        if left:
            text += f"  {duration(left * seconds)} left"
        if self._later:
            text += f"  run: about {duration((left + self._later) * seconds)}"
        return text


def duration(seconds: float) -> str:
    """For people: 45 s, 3 min, 1 h 20 min."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return " ".join(f"{count} {unit}" for count, unit in ((hours, "h"), (minutes, "min")) if count)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# What tells how good a model is in training (`objective.score_name`): in short, and how it is written.
SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("acc", _percent),
    "agreement": ("agreement", _percent),
    "similarity": ("similarity", "{:.3f}".format),
}


def describe(metrics: Mapping[str, float]) -> str:
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    for score, (short, written) in SCORES.items():
        if score in metrics:
            parts.append(f"{short} {written(metrics[score])}")
        if f"{score}_full" in metrics:
            parts.append(f"full {written(metrics[f'{score}_full'])}")
    if "macs_fraction" in metrics:
        parts.append(f"MACs {metrics['macs_fraction']:.2f} ± {metrics['macs_std']:.2f}")
    return "  ".join(parts)


class Means:
    """Exponential running means of metrics, started at the first value."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.values: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            before = self.values.get(name, value)
            self.values[name] = self.decay * before + (1 - self.decay) * value
        return self.values


class MetricsFile:
    """One JSON object a line, appended; lines beyond the step that is resumed from are cut off."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a run that was killed while writing it
                    continue
                if row["step"] <= resumed_step:
                    kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file: TextIO = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class Duration:
    """How long training took, from one checkpoint to the next: a JSON object a line, appended to a file."""

    def __init__(self, path: Path, stage: str, processes: int) -> None:
        self.path, self.stage, self.processes = path, stage, processes
        self._since = time.perf_counter()

    def write(self, step: int) -> None:
        now = time.perf_counter()
        row = {"step": step, "stage": self.stage, "seconds": now - self._since, "processes": self.processes}
        self._since = now
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def core_seconds(run: Path) -> float | None:
    """What training took in all, processes added up, of a run's directory; None where it was not recorded.

    Steps that were done twice, after a run was killed, count as often as they were done up to a checkpoint.
    """
    path = run / DURATIONS
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sum(row["seconds"] * row["processes"] for row in rows)
