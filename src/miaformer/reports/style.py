"""How this project's pictures look: colours, figures, and how names and numbers are written. For a light page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from miaformer.reports.page import Markup, tag

INK, FAINT, PAPER = "#22262b", "#8a9099", "#ffffff"
KEPT, SKIPPED = "#1f6fb2", "#eceef1"
RIGHT, WRONG = "#2e7d4f", "#c0392b"
ON_PAGES = {INK: "--ink", FAINT: "--quiet", KEPT: "--accent", SKIPPED: "--empty", WRONG: "--warning"}
POLICIES = {  # colour, marker
    "learned": (KEPT, "o"),
    "static": ("#d98a1f", "s"),
    "random": (FAINT, "^"),
    "cls-attention": ("#7a5aa6", "D"),
    "full": (INK, "D"),
}


def short(name: str, most: int = 14) -> str:
    name = name.partition(",")[0]
    return name if len(name) <= most else name[: most - 1] + "…"


def with_unit(count: float) -> str:
    """51.2 M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def new_figure(width: float, height: float, axes: bool = True) -> tuple[Any, Any]:
    """A figure of its own, without the state that pyplot keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, dpi=150)
    FigureCanvasAgg(figure)
    if not axes:
        return figure, None
    plot = figure.add_subplot()
    plain(plot)
    return figure, plot


def plain(axes: Any) -> None:
    """Two thin sides and a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=SKIPPED, linewidth=0.8)
    axes.set_axisbelow(True)


def reference_line(axes: Any, accuracy: float) -> None:
    """What others are held against."""
    axes.axhline(accuracy, color=FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)


def bare(axes: Any) -> None:
    """Nothing but what is drawn in it."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)


def in_page(figure: Any, tight: bool = True) -> Markup:
    """The figure as a part of a page, its colours those of the page, light or dark: `ON_PAGES`. tight: cut to what is
    drawn.
    """
    import matplotlib

    drawn = io.StringIO()
    size: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.02} if tight else {}
    nameless = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "miaformer"}):  # text, and the same each time
        figure.savefig(drawn, format="svg", transparent=True, metadata=nameless, **size)
    svg = drawn.getvalue()
    for colour, name in ON_PAGES.items():
        svg = svg.replace(colour, f"var({name})")
    return tag("figure", Markup(svg[svg.index("<svg") :]))


def rectangle(corner: tuple[float, float], width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="none")
