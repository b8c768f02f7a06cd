"""The picture of a comparison: accuracy over MACs, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from miaformer.reports.comparison_rows import OURS
from miaformer.reports.style import INK, POLICIES, new_figure, plain, reference_line, save

_LOOKS = {  # colour, marker
    **POLICIES,
    "top-tokens": ("#2a9d8f", "v"),
    "merging": ("#c0392b", "P"),
    "merging-free": ("#d98880", "P"),
    "exits": ("#6d4c41", "X"),
    "even-exits": ("#5aa02c", "p"),
    "resolution": ("#c2185b", "d"),
    "resolution-free": ("#e48bb0", "d"),
    "resolution-looks": ("#880e4f", "D"),
    "int8": ("#4b6e2f", "*"),
    "shallow": ("#9a8c5a", "H"),
    "backbone": ("#22262b", "P"),
}
ROOM = 0.6  # below ours, as a share of what it ranges over: other methods may fall far out of the picture


_OTHERS = [  # of methods without a look of their own
    (colour, marker)
    for marker in "osv"
    for colour in ("#d98a1f", "#7a5aa6", "#2a9d8f", "#c0392b", "#6d4c41", "#8a9099", "#22262b")
]


def _batches(timed: Sequence[Mapping[str, Any]]) -> str:
    """Of what size those are whose time is drawn: the largest. Older rows do not say."""
    sizes = [int(size) for row in timed for size in row.get("times", {})]
    return f"batches of {max(sizes)}," if sizes else "batches"


def _lowest(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Where the axis of accuracy begins, in per cent: what falls far below ours would leave no room for the rest."""
    ours = [100 * row["accuracy"] for row in rows if row["name"] == OURS]
    if not ours:
        return None
    all_rows = [100 * row["accuracy"] for row in rows]
    low = min(ours) - ROOM * (max(all_rows) - min(ours))
    return low if min(all_rows) < low else None


def _reference(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The accuracy in per cent that methods are held against: the dense control's or the backbone's, the better one."""
    static = [100 * float(row["accuracy"]) for row in rows if row["name"] in ("dense", "backbone")]
    return max(static, default=None)


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """`comparison_figure` as a file."""
    save(comparison_figure(rows, f"Accuracy per compute: {title}"), path)


def comparison_figure(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Any:
    """Accuracy over MACs, and over measured time, of the rows of a comparison: one line a method, with intervals.

    Raises ValueError where there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to plot")
    figure, _ = new_figure(11.5, 4.8, axes=False)
    timed = [row for row in rows if row["time_fraction"] is not None]
    panels = [("macs_fraction", "mean MACs per image", rows)]
    panels += [("time_fraction", f"time, {_batches(timed)} on this machine", timed)] if timed else []
    shared = None
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name not in _LOOKS and name != "dense"]
    looks = dict(zip(names, cycle(_OTHERS), strict=False))
    for place, (measure, label, shown) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place, sharey=shared)
        shared = shared or axes
        plain(axes)
        for name in dict.fromkeys(row["name"] for row in shown):
            own = sorted((r for r in shown if r["name"] == name), key=lambda row: row[measure])
            xs, ys = [row[measure] for row in own], [100 * row["accuracy"] for row in own]
            if name == "dense":
                axes.plot(xs, ys, marker="*", color=INK, markersize=14, linestyle="none", label=name, zorder=4)
                continue
            colour, marker = _LOOKS.get(name) or looks[name]
            errors = [[100 * abs(r["accuracy"] - r["accuracy_interval"][end]) for r in own] for end in (0, 1)]
            line = {"linewidth": 2.2 if name == OURS else 1.2, "markersize": 6, "zorder": 3, "capsize": 2}
            axes.errorbar(xs, ys, errors, color=colour, marker=marker, label=name, elinewidth=0.8, **line)
        if (reference := _reference(rows)) is not None:
            reference_line(axes, reference)
        axes.set_xlabel(f"{label}, as a fraction of the backbone's")
        if place == 1:
            axes.set_ylabel("accuracy, %")
            axes.set_title(title or "", loc="left", color=INK)
    if shared is not None and (low := _lowest(rows)) is not None:
        shared.set_ylim(bottom=low, top=100 * max(row["accuracy_interval"][1] for row in rows) + 0.5)
    every_method = figure.axes[0].get_legend_handles_labels()  # of time only those that were timed
    look = {"frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.axes[-1].legend(*every_method, loc="center left", bbox_to_anchor=(1.0, 0.5), **look)
    figure.tight_layout()
    return figure
