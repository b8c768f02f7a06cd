"""How this project's pictures look: colours, figures, and how names and numbers are written. For a light page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, FAINT, PAPER = "#22262b", "#8a9099", "#ffffff"
KEPT, SKIPPED = "#1f6fb2", "#eceef1"
RIGHT, WRONG = "#2e7d4f", "#c0392b"
POLICIES = {  # colour, marker, what it is
    "learned": ("#1f6fb2", "o", "per image"),
    "static": ("#d98a1f", "s", "same for all"),
    "random": ("#8a9099", "^", "by chance, as often"),
    "cls-attention": ("#7a5aa6", "D", "most attended tokens"),
}


def short(name: str, most: int = 14) -> str:
    name = name.partition(",")[0]
    return name if len(name) <= most else name[: most - 1] + "…"


def macs_with_unit(macs: float) -> str:
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g}{unit} MACs"
    return f"{macs:.0f} MACs"


def new_figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    """A figure of its own, without the state that pyplot keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, dpi=150)
    FigureCanvasAgg(figure)
    if not axes:
        return figure, None
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    plot.spines[["left", "bottom"]].set_color(FAINT)
    plot.tick_params(colors=INK, length=0)
    return figure, plot


def save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)


def rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="none")
