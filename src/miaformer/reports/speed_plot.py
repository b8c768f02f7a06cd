"""What skipped compute saves in time, as a picture: time over MACs, and the line on which all of it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from miaformer.reports.style import FAINT, INK, new_figure, plain, save

_AXES = ("dtype", "batch", "engine", "grains")
_X = "mean MACs per image, as a fraction of the dense model's"
_Y = "time, as a fraction of dense execution's"
_COLOURS = {"eager": "#1f6fb2", "packed": "#7a4fa3", "compile": "#d98a1f", "onnx": "#2e7d4f"}
_OTHER_COLOUR = "#7a5aa6"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NAMES = {"eager": "eager PyTorch", "packed": "packed weights", "compile": "torch.compile", "onnx": "ONNX Runtime"}
_PANEL, _LEFT, _TOP, _BOTTOM = 3.1, 0.72, 1.0, 0.55  # inches
_COLUMNS = 4  # of a long legend

Looks = Mapping[tuple[str, str], tuple[str, str, str]]  # colour, marker and name, by engine and grains


def plot_speed(report: Mapping[str, Any], path: str | Path) -> None:
    """A panel for each dtype (row) and batch size (column) of a report of `bench`; a colour an engine.

    Raises ValueError where the report has no rows.
    """
    rows = report["rows"]
    if not rows:
        raise ValueError("the report has no rows to plot")
    dtypes, batches, engines, grains = (list(dict.fromkeys(row[name] for row in rows)) for name in _AXES)
    looks = _looks(engines, grains)
    top = _TOP + 0.17 * max(0, math.ceil((len(looks) + 2) / _COLUMNS) - 2)  # room for two rows of the legend, and more
    width, height = 0.8 + _PANEL * max(len(batches), 2), top + _BOTTOM + _PANEL * len(dtypes)
    left, right = _LEFT / width, (_LEFT + _PANEL * len(batches)) / width
    figure, _ = new_figure(width, height, axes=False)
    grid = figure.add_gridspec(
        len(dtypes), len(batches), left=left, right=right, bottom=_BOTTOM / height, top=1 - top / height,
        wspace=0.08, hspace=0.22,
    )  # fmt: skip
    most = max(1.08, 1.05 * max(row["time_fraction"] for row in rows))
    for i, dtype in enumerate(dtypes):
        for j, batch in enumerate(batches):
            axes = figure.add_subplot(grid[i, j])
            _draw_panel(axes, [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)], looks, most)
            title = f"batch {batch}" if len(dtypes) == 1 else f"{dtype}, batch {batch}"
            axes.set_title(title, loc="left", fontsize=10, color=INK)
            axes.tick_params(labelleft=j == 0, labelbottom=i == len(dtypes) - 1)
            if i == j == 0:
                near = {"textcoords": "offset points", "ha": "left", "va": "top", "fontsize": 8, "color": FAINT}
                axes.annotate("all saved MACs\nare saved time", (0.3, 0.3), (8, -4), **near)
    name, only = str(report["model"]).removeprefix("timm:"), f", {dtypes[0]}" if len(dtypes) == 1 else ""
    title = f"{name}: time saved by skipping{only}"
    figure.text(left, 1 - 0.16 / height, title, ha="left", va="top", fontsize=12, color=INK)
    _legend(figure, looks, left, 1 - 0.5 / height)
    figure.text(0.02, (height + _BOTTOM - top) / 2 / height, _Y, rotation=90, ha="left", va="center", color=INK)
    figure.text((left + right) / 2, 0.05 / height, _X, ha="center", va="bottom", color=INK)
    save(figure, path)


def _looks(engines: Sequence[str], grains: Sequence[str]) -> Looks:
    """Markers tell engines apart, or grains if there are several."""
    several = len(grains) > 1
    found = {}
    for engine, own_marker in zip(engines, cycle(_MARKERS), strict=False):
        for one, grain_marker in zip(grains, cycle(_MARKERS), strict=False):
            name = _NAMES.get(engine, engine) + (f", {one}" if several else "")
            marker = grain_marker if several else own_marker
            found[engine, one] = _COLOURS.get(engine, _OTHER_COLOUR), marker, name
    return found


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], looks: Looks, most: float) -> None:
    plain(axes)
    axes.tick_params(labelsize=8)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    axes.plot(1, 1, marker="*", color=INK, markersize=11, zorder=5)
    for (engine, grains), (colour, marker, _) in looks.items():
        own = sorted(
            (row["macs_fraction"], row["time_fraction"], row["budget"])
            for row in rows
            if (row["engine"], row["grains"]) == (engine, grains)
        )
        if not own:
            continue
        axes.plot([x for x, _, _ in own], [y for _, y, _ in own], color=colour, linewidth=1.5, zorder=2)
        for x, y, budget in own:
            face = "white" if budget == 1 else colour  # hollow: everything kept
            axes.plot(x, y, marker=marker, color=colour, markerfacecolor=face, markersize=6, zorder=4)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlim(0, 1.08)
    axes.set_ylim(0, most)


def _legend(figure: Any, looks: Looks, left: float, top: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.5, markersize=6, label=name)
        for colour, marker, name in looks.values()
    ]
    for marker, face, size, name in (("o", "white", 6, "everything kept"), ("*", INK, 9, "dense")):
        look: dict[str, Any] = {"marker": marker, "markeredgecolor": INK, "markerfacecolor": face, "markersize": size}
        handles.append(Line2D([], [], color="none", label=name, **look))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left, top),
        ncols=len(handles) if len(handles) < 6 else _COLUMNS, frameon=False, fontsize=8, labelcolor=INK,
        borderaxespad=0, borderpad=0, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
