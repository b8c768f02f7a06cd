"""The report of a comparison: accuracy over MACs and over time with intervals, and every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miaformer.reports.comparison_plot import comparison_figure
from miaformer.reports.comparison_rows import COLUMNS, OURS, Row, between, written
from miaformer.reports.page import Markup, facts, join, table, tag
from miaformer.reports.style import in_page
from miaformer.reports.training import duration

DENSE = "dense"
SHARED = (OURS, DENSE)


def is_comparison(report: Mapping[str, Any]) -> bool:
    return "rows" in report and "differences" in report


def comparison_head(report: Mapping[str, Any], missing: Sequence[str] = ()) -> Markup:
    """missing: runs that have begun and are not measured, each with how far it has come."""
    recipe, seeds = report.get("recipe") or {}, report.get("seeds", {})
    known: dict[str, object] = {
        "Methods": len(dict.fromkeys(row["name"] for row in report["rows"])),
        "Test images": f"{report['num_images']:,}",
        "Data": report.get("data") or "unknown",
    }
    if seeds.get(OURS):
        known["Seeds of ours"] = ", ".join(map(str, seeds[OURS]))
    if report.get("model"):
        known["Model"] = report["model"]
    warning = None
    if missing:
        warning = tag(
            "p", f"Not finished; this shows what is measured. Not measured yet: {'; '.join(missing)}.", class_="warning"
        )
    return join((tag("h1", f"Comparison: {recipe.get('name', 'methods')}"), warning, facts(known)))


def comparison_body(report: Mapping[str, Any]) -> Iterable[Markup]:
    """Curves and tables."""
    for title, rows in _groups(report["rows"]):
        yield tag("h2", title)
        yield tag("p", "Vertical lines are 95 % intervals over test images.", class_="quiet")
        yield in_page(comparison_figure(rows))
        yield _table(rows, report["differences"])
    yield from _equal_accuracy(report["at_equal_accuracy"])
    yield from _one_point_below(report.get("one_point_below", {}))
    yield from _times(report["rows"])
    yield from _adaptivity(report["adaptivity"])
    yield from _durations(report.get("core_seconds", {}))


def _groups(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Baselines and ablations apart, ours and dense with both: rows may say that they are of an ablation."""
    for title, ablation in (("Accuracy per compute", False), ("Without a part of it", True)):
        own = [row for row in rows if row["name"] in SHARED or bool(row.get("ablation")) == ablation]
        if any(row["name"] not in SHARED for row in own) or not ablation:
            yield title, own


def _table(rows: Sequence[Row], differences: Sequence[Row]) -> Markup:
    order = written(rows, differences)
    strong = [place for place, (row, _) in enumerate(order) if row["name"] == OURS]
    caption = (
        "In brackets 95 % intervals over images. Hardest: the tenth with the greatest dense loss. Ours minus it: the "
        "lead of `learned`, in points. MACs and time: of the backbone's."
    )
    return table(COLUMNS, (cells for _, cells in order), caption, strong)


def _equal_accuracy(found: Mapping[str, float]) -> Iterable[Markup]:
    if found:
        yield tag("h2", "MACs for half a point of loss")
        order = sorted(found.items(), key=lambda pair: pair[1])
        strong = [place for place, (name, _) in enumerate(order) if name == OURS]
        yield table(("method", "MACs"), [(name, f"{value:.3f}") for name, value in order], None, strong)


def _one_point_below(found: Mapping[str, Any]) -> Iterable[Markup]:
    """Older reports have none."""
    if found.get("methods"):
        yield tag("h2", "MACs for one point of loss")
        order = sorted(found["methods"].items(), key=lambda pair: pair[1]["macs_fraction"])
        strong = [place for place, (name, _) in enumerate(order) if name == OURS]
        cells = [(name, f"{one['macs_fraction']:.3f}", between(one["interval"])) for name, one in order]
        best = found["best_baseline"]
        caption = None
        if best is not None:
            ratio = f"{best['ratio']:.3f} {between(best['ratio_interval'])}"
            caption = f"Ours takes {ratio} of the MACs of the best baseline, {best['name']}."
        yield table(("method", "MACs", "95 % interval"), cells, caption, strong)


def _times(rows: Sequence[Row]) -> Iterable[Markup]:
    """At every batch size, where rows say more than one fraction."""
    cells = [
        (row["name"], f"{row['macs_fraction']:.3f}", size, f"{time['ms']:.2f}", f"{time['fraction']:.2f}",
         time["engine"], time["dense_engine"])
        for row in rows
        for size, time in row.get("times", {}).items()
    ]  # fmt: skip
    if cells:
        yield tag("h2", "Time")
        columns = ("method", "MACs", "batch", "ms a batch", "of dense", "engine", "dense engine")
        yield table(columns, cells, "Each on the engine that runs it fastest, of those that were timed.")


def _adaptivity(points: Sequence[Row]) -> Iterable[Markup]:
    if points:
        yield tag("h2", "Does compute follow difficulty?")
        rows = [(f"{point['budget']:g}", f"{point['loss']:+.3f}", f"{point['margin']:+.3f}") for point in points]
        caption = "Rank correlation of what ours spends on an image with how hard it is for the backbone."
        yield table(("budget", "with its loss", "with minus its margin"), rows, caption)


def _durations(seconds: Mapping[str, float]) -> Iterable[Markup]:
    if seconds:
        yield tag("h2", "Time to train")
        rows = [(name, duration(value)) for name, value in seconds.items()]
        yield table(("run", "processor time"), rows, "Of all processes together; the mean over seeds.")
