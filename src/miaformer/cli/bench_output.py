"""The report of `miaformer bench` for people: a table for each dtype and batch size, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

MOST_VARIATION = 0.2  # of a dense reference, above which its times are not to be trusted
COLUMNS = ("MACs", "± images", "ms", "time", "± rounds", "efficiency", "time vs best dense")


def bench_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each dtype and batch size, in the order they were measured."""
    several = len({row["grains"] for row in report["rows"]}) > 1
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in report["dense"]):
        yield _table(report, dtype, batch, several)


def _table(report: Mapping[str, Any], dtype: str, batch: int, several_grains: bool) -> Table:
    dense, rows = (
        [row for row in report[kind] if (row["dtype"], row["batch"]) == (dtype, batch)] for kind in ("dense", "rows")
    )
    images, repeats = dense[0]["images"], dense[0]["repeats"]
    title = f"{dtype}, batch {batch}: {counted(images, 'picture')}, {counted(repeats, 'round')}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("engine", no_wrap=True)
    if several_grains:
        table.add_column("grains", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    best = min((row["best_dense_ms"] for row in rows), default=min(row["ms"] for row in dense))
    for reference in dense:
        engine = reference["engine"]
        against_best = "1.00 (best)" if reference["ms"] == best else f"{reference['ms'] / best:.2f}"
        spacer = [""] if several_grains else []
        own = [row for row in rows if row["engine"] == engine]
        varies = f"{reference['variation']:.2f}"
        cells = (engine, *spacer, "dense", "1.000", "", f"{reference['ms']:.1f}", "1.00", varies, "", against_best)
        table.add_row(*cells, end_section=not own)
        for row in own:
            table.add_row(
                "",
                *([row["grains"]] if several_grains else []),
                f"{row['budget']:g}",
                f"{row['macs_fraction']:.3f}",
                f"{row['macs_fraction_std']:.3f}",
                f"{row['ms']:.1f}",
                f"{row['time_fraction']:.2f}",
                f"{row['spread']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['best_time_fraction']:.2f}",
                end_section=row is own[-1],
            )
    return table


def bench_notes(report: Mapping[str, Any]) -> Iterator[str]:
    """What the tables leave unsaid, a line each."""
    environment = report["environment"]
    threads, version = counted(environment["threads"], "thread"), environment["versions"]["torch"]
    yield f"{report['model']} on {report['data']}; {environment['device']}, {threads}, torch {version}."
    yield (
        "ms: a batch. time: of the same engine's dense execution. Budget 1 decides too, and keeps everything. "
        "efficiency: MACs / time, 1.00 where all saved MACs became saved time. ± rounds: interquartile ranges."
    )
    if report["drawn"]:
        yield (
            "Decisions were drawn at random, so that images differ in what they get: times are as a trained model's, "
            "answers mean nothing."
        )
    for row in report["dense"]:
        if row["variation"] > MOST_VARIATION:
            yield (
                f"Warning: the dense time of {row['engine']}, {row['dtype']}, batch {row['batch']}, varies by "
                f"{row['variation']:.0%} of its median (interquartile range). This machine has other work: do not "
                "trust times of this table."
            )
    for dtype, engine, precise in dict.fromkeys(
        (row["dtype"], row["best_dense_engine"], row["best_dense_dtype"]) for row in report["rows"]
    ):
        if dtype != precise:
            yield f"Best dense execution for {dtype}, at some batch size: {engine} in {precise}."
    for left_out in report["left_out"]:
        batches = ", ".join(map(str, left_out["batches"]))
        yield (
            f"Left out: {left_out['engine']}, {left_out['execution']}, {left_out['dtype']}, batch {batches}: "
            f"{left_out['reason'].rstrip('.')}."
        )
    if report["interrupted"]:
        yield "Interrupted: what was not measured until then is missing."


def counted(number: int, what: str) -> str:
    """`1 round`, `2 rounds`"""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
