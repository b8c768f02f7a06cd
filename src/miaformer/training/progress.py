"""What a run shows while it goes on: a live line for people, JSONL and TensorBoard for everything else."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

DURATIONS = "durations.jsonl"  # in a run's directory
PLAIN_INTERVAL_S = 15.0  # between lines where no terminal can show a live one


class Display:
    """A progress bar a stage, with running means of loss, accuracy, and mean and spread of MACs over images."""

    def __init__(self, console: Console | None = None, enabled: bool = True) -> None:
        self.console = console or Console()
        self.enabled = enabled
        self._progress: Progress | None = None
        self._last_line = 0.0

    def start_stage(self, title: str, total: int, done: int) -> None:
        self._title, self._total = title, total
        if not self.enabled:
            return
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(title, total=total, completed=done, metrics="")
            self._progress.start()

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        text = describe(metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, metrics=text)
        elif time.monotonic() - self._last_line > PLAIN_INTERVAL_S or done == self._total:
            self._last_line = time.monotonic()
            self.console.print(f"{self._title:<10} {done:>6}/{self._total}  {text}", highlight=False)

    def end_stage(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)


def describe(metrics: Mapping[str, float]) -> str:
    parts = []
    if "loss" in metrics:
        parts += [f"loss {metrics['loss']:.3f}", f"acc {100 * metrics['accuracy']:.1f} %"]
    if "accuracy_full" in metrics:
        parts.append(f"full {100 * metrics['accuracy_full']:.1f} %")
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
