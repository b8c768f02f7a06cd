"""Curves as inline SVG: drawn twice, for a wide page and for a phone, so that text is read at its own size in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from miaformer.reports.page import Markup, join, tag
from miaformer.reports.style import pushed_apart

ACCENT = ""  # the page's own accent colour
# Of everything else: hues that can be told apart on white and, lighter, on black.
COLOURS = (
    "#c9760f", "#7a5aa6", "#238a7e", "#b83f3a", "#6f5a4c", "#4c8a24", "#5b6f9e", "#a0508f", "#857a3c", "#6b7178",
)  # fmt: skip
_LABEL = 14  # pixels from one label at the end of a line to the next


@dataclass(frozen=True)
class Series:
    """Points in the order of x, joined by a line. low, high: ends of an interval at each. dots: mark them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = ACCENT
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False
    strong: bool = False  # a thicker line, on top of the others


@dataclass(frozen=True)
class Level:
    """A horizontal line that others are read against."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """What is drawn. shown: how a number of y is written; marks: vertical lines, each with the name of what follows."""

    title: str
    x_label: str
    series: Sequence[Series]
    shown: Callable[[float], str] = "{:g}".format
    level: Level | None = None
    marks: Sequence[tuple[float, str]] = ()
    ends: bool = False  # names at the ends of lines, where there is room; a key below otherwise


def figure(chart: Chart, size: tuple[int, int] = (440, 250), narrow: tuple[int, int] = (350, 230)) -> Markup:
    """The chart, in pixels on a wide page and on a phone, with a key to its lines."""
    drawn = [
        tag("div", _svg(chart, size, chart.ends), class_="wide"),
        tag("div", _svg(chart, narrow, False), class_="narrow"),
    ]
    key = None
    if len(chart.series) > 1:
        key = tag("div", *map(_key, chart.series), class_="key narrow-key" if chart.ends else "key")
    return tag("figure", *drawn, key)


def coloured(series: Sequence[Series]) -> list[Series]:
    """Those that are not strong, each in a colour of its own."""
    others = iter(COLOURS * (len(series) // len(COLOURS) + 1))
    return [one if one.strong else replace(one, colour=next(others)) for one in series]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within low and high, at most so many."""
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (size, 2 * size, 5 * size, 10 * size, 20 * size):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(place * step, 12) for place in range(first, last + 1)]


class _Frame:
    """From numbers to pixels."""

    def __init__(self, chart: Chart, size: tuple[int, int], right: int) -> None:
        self.width, self.height = size
        every = [value for one in chart.series for values in (one.y, one.low or (), one.high or ()) for value in values]
        every += [chart.level.y] if chart.level else []
        low, high = min(every), max(every)
        margin = (high - low or abs(high) or 1.0) * 0.06
        self.y_low, self.y_high = low - margin, high + margin
        xs = [x for one in chart.series for x in one.x]
        self.x_low, self.x_high = min(xs), max(xs)
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        self.y_ticks = ticks(self.y_low, self.y_high, 5)
        self.left = 12 + round(7.2 * max(len(chart.shown(tick)) for tick in self.y_ticks))
        self.right, self.top, self.bottom = self.width - right, 46 if chart.marks else 32, self.height - 42

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def _svg(chart: Chart, size: tuple[int, int], ends: bool) -> Markup:
    longest = max(len(one.name) for one in chart.series)
    frame = _Frame(chart, size, right=24 + round(6.6 * longest) if ends else 12)
    lines = [_line(one, frame, chart.shown) for one in sorted(chart.series, key=lambda one: one.strong)]
    names = ", ".join(one.name for one in chart.series)
    return tag(
        "svg",
        _axes(chart, frame),
        *lines,
        _ends(chart.series, frame) if ends else None,
        viewBox=f"0 0 {size[0]} {size[1]}",
        class_="chart",
        role="img",
        aria_label=f"{chart.title} over {chart.x_label}: {names}",
    )


def _axes(chart: Chart, frame: _Frame) -> Markup:
    parts = [tag("text", chart.title, x=0, y=13, class_="title")]
    for value in frame.y_ticks:
        y = _at(frame.y(value))
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", chart.shown(value), x=frame.left - 8, y=_at(frame.y(value) + 4), text_anchor="end"))
    for value in ticks(frame.x_low, frame.x_high, frame.width // 65):
        written = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
        parts.append(tag("text", written, x=_at(frame.x(value)), y=frame.bottom + 18, text_anchor="middle"))
    parts.append(tag("text", chart.x_label, x=frame.right, y=frame.height - 6, text_anchor="end"))
    if chart.level:
        y = _at(frame.y(chart.level.y))
        reference = {"stroke": "currentColor", "class_": "reference"}
        parts.append(tag("line", x1=frame.left, x2=frame.right, y1=y, y2=y, **reference))
        parts.append(tag("text", chart.level.name, x=frame.left + 4, y=_at(frame.y(chart.level.y) - 6)))
    parts += _marks(chart.marks, frame)
    return join(parts)


def _marks(marks: Sequence[tuple[float, str]], frame: _Frame) -> list[Markup]:
    """A name is left out where the next one would lie on it, and what begins before the curves do."""
    parts = []
    places = [frame.x(value) for value, _ in marks]
    for (value, name), (x, after) in zip(marks, pairwise([*places, frame.right]), strict=True):
        if value < frame.x_low:
            continue
        if value > frame.x_low:
            parts.append(tag("line", x1=_at(x), x2=_at(x), y1=frame.top - 8, y2=frame.bottom, class_="stage"))
        if after - x > 6.6 * len(name):
            parts.append(tag("text", name, x=_at(x + 4), y=frame.top - 5))
    return parts


def _line(one: Series, frame: _Frame, shown: Callable[[float], str]) -> Markup:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(one.x, one.y, strict=True)]
    parts: list[Markup] = []
    if len(points) > 1:
        path = "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in points)
        parts.append(tag("path", d=path, class_="line ours" if one.strong else "line"))
    if one.low is not None and one.high is not None:
        for (x, _), low, high in zip(points, one.low, one.high, strict=True):
            ends = {"y1": _at(frame.y(low)), "y2": _at(frame.y(high))}
            parts.append(tag("line", x1=_at(x), x2=_at(x), **ends, class_="whisker"))
    if one.dots or len(points) == 1:
        for (x, y), x_value, y_value in zip(points, one.x, one.y, strict=True):
            told = tag("title", f"{one.name}: {shown(y_value)} at {x_value:.3g}")
            parts.append(tag("circle", told, cx=_at(x), cy=_at(y), r=4 if one.strong else 3, class_="dot"))
    return tag("g", *parts, **_look(one))


def _ends(series: Sequence[Series], frame: _Frame) -> Markup:
    """Names to the right, pushed apart where they would overlap, each with a thin line to its own curve's end."""
    order = sorted(series, key=lambda one: frame.y(one.y[-1]))
    heights = pushed_apart([frame.y(one.y[-1]) for one in order], _LABEL)
    parts = []
    for one, height in zip(order, heights, strict=True):
        x, y, label = frame.x(one.x[-1]), frame.y(one.y[-1]), frame.right + 14
        path = f"M{_at(x + 5)} {_at(y)}L{frame.right + 4} {_at(height)}H{label - 3}"
        weight = "title colour" if one.strong else "colour"
        parts.append(tag("path", d=path, class_="grid", fill="none"))
        parts.append(tag("text", one.name, x=label, y=_at(height + 4), class_=weight, style=_look(one)["style"]))
    return join(parts)


def _key(one: Series) -> Markup:
    dot = tag("circle", cx=5, cy=5, r=4, **_look(one))
    return tag("span", tag("svg", dot, width=10, height=10, aria_hidden="true"), one.name)


def _look(one: Series) -> dict[str, Any]:
    own = "--own:var(--accent)" if one.colour == ACCENT else f"--base:{one.colour}"
    return {"class_": "colour", "style": own}


def _at(pixels: float) -> str:
    return f"{pixels:.1f}"
