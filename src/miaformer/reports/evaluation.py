"""What `miaformer eval` found, as a section of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miaformer.reports.page import Markup, facts, percent, table, tag
from miaformer.reports.plots import tradeoff_figure
from miaformer.reports.point_cells import DENSE_CELLS, spent_cells
from miaformer.reports.style import in_page

OURS = "learned"


def evaluation_section(report: Mapping[str, Any]) -> Iterable[Markup]:
    """Accuracy over MACs, and every number."""
    yield tag("h2", f"Accuracy per compute on {report.get('data', 'test images')}")
    if report["points"]:
        yield in_page(tradeoff_figure(report))
    yield _points(report)
    yield facts(_facts(report))
    if report.get("corruptions"):
        yield tag("h3", "Under corruptions", class_="group")
        yield _corruptions(report["corruptions"])


def is_evaluation(report: Mapping[str, Any]) -> bool:
    return "points" in report and "dense" in report


def _points(report: Mapping[str, Any]) -> Markup:
    columns = ("policy", "budget", "accuracy", "MACs: mean", "95th percentile", "most", "blocks", "heads", "patches")
    points = report["points"]
    rows = [("dense", "", percent(report["dense"]["accuracy"], 2), *DENSE_CELLS)]
    rows += [(p["policy"], f"{p['budget']:g}", percent(p["accuracy"], 2), *spent_cells(p)) for p in points]
    strong = [place for place, point in enumerate(points, start=1) if point["policy"] == OURS]
    caption = "MACs: of the dense model's. Heads and patches: of executed blocks."
    return table(columns, rows, caption, strong)


def _facts(report: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {
        "Images": f"{report['num_images']:,}",
        "Dense MACs per image": f"{report['dense']['macs'] / 1e6:,.1f} M",
        "Controllers, at most": percent(report["controllers"]["macs_fraction"], 2) + " of that, counted",
    }
    if report.get("cap") is not None:
        found["Cap"] = f"{report['cap']:g}"
    for point in report["adaptivity"]["by_budget"]:
        name = f"Rank correlation of dense loss and MACs, budget {point['budget']:g}"
        found[name] = f"{point['spearman_difficulty_macs']:+.3f}"
    for left_out in report["left_out"]:
        found[f"Left out: {left_out['policy']} at {left_out['budget']:g}"] = left_out["reason"]
    return found


def _corruptions(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy by corruption, means over severities."""
    columns = list(dict.fromkeys((row["policy"], row["budget"]) for row in rows))
    body: list[list[str]] = []
    for corruption in dict.fromkeys(row["corruption"] for row in rows):
        cells = [corruption]
        for column in columns:
            own = [r["accuracy"] for r in rows if (r["policy"], r["budget"], r["corruption"]) == (*column, corruption)]
            cells.append(percent(sum(own) / len(own)) if own else "")
        body.append(cells)
    heads = ["corruption", *(policy if budget is None else f"{policy} {budget:g}" for policy, budget in columns)]
    return table(heads, body, "Accuracy, means over severities.")
