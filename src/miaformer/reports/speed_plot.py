"""What skipped compute saves in time, as a picture: time over MACs, and the line on which all of it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miaformer.reports.style import FAINT, INK, new_figure, plain, save

_AXES = ("dtype", "batch", "engine", "grains")
_COLOURS = {"eager": "#1f6fb2", "packed": "#7a4fa3", "compile": "#d98a1f", "onnx": "#2e7d4f"}
_OTHER_COLOUR = "#7a5aa6"
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NAMES = {"eager": "eager PyTorch", "packed": "packed weights", "compile": "torch.compile", "onnx": "ONNX Runtime"}
_PANEL = 3.1  # inches


def plot_speed(report: Mapping[str, Any], path: str | Path) -> None:
    """A panel for each dtype (row) and batch size (column) of a report of `bench`; a colour an engine.

    Raises ValueError where the report has no rows.
    """
    rows = report["rows"]
    if not rows:
        raise ValueError("the report has no rows to plot")
    dtypes, batches, engines, grains = (list(dict.fromkeys(row[name] for row in rows)) for name in _AXES)
    figure, _ = new_figure(_PANEL * len(batches) + 2.2, _PANEL * len(dtypes) + 0.9, axes=False)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(dtypes), len(batches), sharex=True, sharey=True, squeeze=False)
    for dtype, line in zip(dtypes, panels, strict=True):
        for batch, axes in zip(batches, line, strict=True):
            _draw_panel(axes, [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)], engines, grains)
            title = f"batch {batch}" if len(dtypes) == 1 else f"{dtype}, batch {batch}"
            axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlim(0, 1.08)
    axes.set_ylim(0, max(1.08, 1.05 * max(row["time_fraction"] for row in rows)))
    name, only = str(report["model"]).removeprefix("timm:"), f", {dtypes[0]}" if len(dtypes) == 1 else ""
    figure.suptitle(f"{name}: time saved by skipping{only}", x=0.01, ha="left", fontsize=12, color=INK)
    figure.supylabel("time, as a fraction of dense execution's", fontsize=10, color=INK)
    figure.supxlabel("mean MACs per image, as a fraction of the dense model's", fontsize=10, color=INK)
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside right center", frameon=False, fontsize=8, labelcolor=INK)
    save(figure, path)


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], engines: Sequence[str], grains: Sequence[str]) -> None:
    """Markers tell engines apart, or grains if there are several."""
    plain(axes)
    axes.tick_params(labelsize=8)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)), label="all saved MACs\nare saved time")
    for i, engine in enumerate(engines):
        for j, grain in enumerate(grains):
            own = sorted(
                (row["macs_fraction"], row["time_fraction"], row["budget"])
                for row in rows
                if (row["engine"], row["grains"]) == (engine, grain)
            )
            if not own:
                continue
            name = _NAMES.get(engine, engine) + (f", {grain}" if len(grains) > 1 else "")
            marker = _MARKERS[(j if len(grains) > 1 else i) % len(_MARKERS)]
            look = {"color": _COLOURS.get(engine, _OTHER_COLOUR), "marker": marker, "markersize": 6, "linewidth": 1.5}
            axes.plot([x for x, *_ in own], [y for _, y, _ in own], label=name, **look)
            for x, y, budget in own:
                if budget == 1:
                    axes.plot(x, y, **look, markerfacecolor="white")
    hollow = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": INK, "linestyle": "none"}
    axes.plot([], [], label="everything kept", **hollow)
    axes.plot(1, 1, marker="*", color=INK, markersize=11, linestyle="none", label="dense", zorder=5)
