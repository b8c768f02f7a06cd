"""A picture of a latency check: predicted over measured, with the diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miaformer.evaluation.looks import FAINT, INK, POLICIES, SKIPPED, new_figure, save


def plot_latency(check: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """One point a batch, one colour a price, of the rows of `check_latency`.

    Raises ValueError where there are no rows.
    """
    if not check:
        raise ValueError("the latency check has no rows to plot")
    figure, axes = new_figure(5.4, 5.2)
    every = [ms for row in check for name in ("predicted_ms", "measured_ms") for ms in row[name]]
    low, high = 0.92 * min(every), 1.04 * max(every)
    axes.plot((low, high), (low, high), color=FAINT, linewidth=0.9, linestyle=(0, (4, 4)), zorder=1)
    looks = list(POLICIES.values())
    for index, row in enumerate(check):
        colour, marker, _ = looks[index % len(looks)]
        label = f"{row['mean_measured_ms']:.3g} ms on average, error {100 * row['error']:.1f} %"
        at = (row["measured_ms"], row["predicted_ms"])
        axes.scatter(*at, s=22, c=colour, marker=marker, linewidths=0, zorder=3, label=label)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel("measured, ms per image")
    axes.set_ylabel("predicted by the table, ms per image")
    axes.set_title(title or "Predicted and measured time", loc="left", color=INK, pad=10)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    axes.grid(color=SKIPPED, linewidth=0.8)
    save(figure, path)
