"""The rows of a comparison in the order and words in which people read them: on the terminal, in docs, on pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS = "learned"
COLUMNS = ("method", "budget", "MACs", "time", "accuracy, %", "hardest tenth, %", "ours minus it, points")
Row = Mapping[str, Any]  # of a method at a budget, as `miaformer compare --json` writes it


def written(rows: Iterable[Row], differences: Iterable[Row]) -> list[tuple[Row, tuple[str, ...]]]:
    """Each row with its cells, one for each of `COLUMNS`: budget by budget, ours first, then the most accurate.

    differences: of ours to others. Static models know no budget: several of one name differ in their MACs.
    """
    gaps = {(gap["over"], gap["budget"], gap["macs_fraction"][1]): gap for gap in differences}
    order = sorted(rows, key=lambda row: (-(row["budget"] or 2.0), row["name"] != OURS, -row["accuracy"]))
    return [(row, _cells(row, gaps.get((row["name"], row["budget"], row["macs_fraction"])))) for row in order]


def _cells(row: Row, gap: Row | None) -> tuple[str, ...]:
    return (
        row["name"],
        "" if row["budget"] is None else f"{row['budget']:g}",
        f"{row['macs_fraction']:.3f}",
        "" if row["time_fraction"] is None else f"{row['time_fraction']:.2f}",
        _per_cent(row["accuracy"], row["accuracy_interval"]),
        f"{100 * row['accuracy_hardest']:.1f}",
        "" if gap is None else _per_cent(gap["difference"], gap["interval"], "+"),
    )


def between(interval: Sequence[float]) -> str:
    """An interval of MACs fractions."""
    return f"({interval[0]:.3f}, {interval[1]:.3f})"


def _per_cent(value: float, interval: Sequence[float], sign: str = "") -> str:
    """A share and its interval."""
    low, high = (f"{100 * end:{sign}.2f}" for end in interval)
    return f"{100 * value:{sign}.2f} ({low}, {high})"
