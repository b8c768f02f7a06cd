"""What commands say: tables and notes for people, progress on the terminal, JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from miaformer.data.files import whole_file
from miaformer.reports.point_cells import DENSE_CELLS, spent_cells

PIPED_WIDTH = 120  # columns, where no terminal says how many there are


def console(stderr: bool = False) -> Console:
    found = Console(stderr=stderr, highlight=False)
    if not found.is_terminal:
        found.width = PIPED_WIDTH
    return found


def write_json(path: str | Path, content: Any) -> None:
    """Write a whole file or none: a report is never left half written."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line for people, as it is: neither wrapped nor marked up."""
    console().print(text, soft_wrap=True, markup=False)


def write_outputs(args: argparse.Namespace, report: Any, draw: Callable[[str], None]) -> None:
    """Write what --json and --plot ask for, and say so. draw: draws the report to a file."""
    if args.json:
        write_json(args.json, report)
        say(f"wrote {args.json}")
    if args.plot:
        draw(args.plot)
        say(f"wrote {args.plot}")


class LiveProgress:
    """A bar a stage on the terminal, gone when it ends; nothing where there is no terminal. Called as
    `OnProgress`.

    totals: how many images or passes each stage has, where that is known.
    """

    def __init__(self, totals: Mapping[str, int], unit: str = "images") -> None:
        out = console(stderr=True)
        self._totals = totals
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        """total: where only the caller knows it."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or self._totals.get(stage))
        self._progress.update(self._tasks[stage], completed=done)

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} {self.unit}/s", style="cyan")


def print_table(table: Table, out: Console | None = None) -> None:
    """Print it whole, however narrow the terminal: without a frame where that does not fit, then closer together, and
    at last beyond the edge.
    """
    out = out or console()
    if _width(out, table) > out.width:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
        for column in table.columns:
            column.header = str(column.header).replace(" ", "\n")
    if _width(out, table) > out.width:
        table.padding = 0
    terminal, out.width = out.width, max(out.width, _width(out, table))
    out.print(table, crop=False)
    out.width = terminal


def _width(out: Console, table: Table) -> int:
    """Columns that it takes when nothing is cut off."""
    return Measurement.get(out, out.options.update(width=10_000), table).maximum


def list_failed(failed: Mapping[str, str], count: int | None = None) -> None:
    """Tell of pictures that failed, with the reason by path; count: of all, where these are the first."""
    count = len(failed) if count is None else count
    more = count - len(failed)
    table = Table(title=f"{count:,} failed", title_justify="left", title_style="bold red", caption_justify="left")
    table.add_column("path", overflow="fold")
    table.add_column("why", overflow="fold")
    for path, why in failed.items():
        table.add_row(Text(path), Text(why))
    if more:
        table.caption = f"... and {more:,} more: see the error column"
    console(stderr=True).print(table)


def report_table(report: Mapping[str, Any]) -> Table:
    """A report of `evaluate`, dense first, then budget by budget."""
    table = Table(caption="MACs: fractions of the dense model's. Heads and tokens: of executed blocks.")
    table.add_column("policy", no_wrap=True)
    for name in ("budget", "accuracy", "MACs mean", "p95", "max", "blocks", "heads", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = f"{100 * report['dense']['accuracy']:.2f} %"
    table.add_row("dense", "", dense, *DENSE_CELLS, end_section=True)
    points = report["points"]
    for point, following in zip(points, [*points[1:], None], strict=True):
        table.add_row(
            point["policy"],
            f"{point['budget']:g}",
            f"{100 * point['accuracy']:.2f} %",
            *spent_cells(point),
            style="bold" if point["policy"] == "learned" else None,
            end_section=following is None or following["budget"] != point["budget"],
        )
    return table


def report_notes(report: Mapping[str, Any]) -> list[str]:
    """What a table of numbers leaves unsaid, a line each."""
    notes = [f"{report['num_images']:,} images; dense: {report['dense']['macs'] / 1e6:,.1f} M MACs per image."]
    if share := report["controllers"]["macs_fraction"]:
        notes.append(f"Controllers take at most {100 * share:.2f} % of that; all MACs above include them.")
    for point in report["adaptivity"]["by_budget"]:
        notes.append(
            f"Does compute follow difficulty? At {point['budget']:g}: rank correlation of dense loss and MACs "
            f"{point['spearman_difficulty_macs']:+.3f}, standard deviation of MACs {point['macs_fraction_std']:.3f}."
        )
    for left_out in report["left_out"]:
        notes.append(f"Left out: {left_out['policy']} at {left_out['budget']:g}: {left_out['reason']}.")
    return notes
