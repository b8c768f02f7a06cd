"""What `miaformer eval` found, as a section of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from miaformer.reports.chart import Chart, Level, Series, coloured, figure
from miaformer.reports.page import Markup, facts, percent, table, tag

OURS = "learned"


def evaluation_section(report: Mapping[str, Any]) -> Iterable[Markup]:
    """Accuracy over MACs, and every number."""
    yield tag("h2", f"Accuracy per compute on {report.get('data', 'test images')}")
    if report["points"]:
        yield figure(_tradeoff(report), (1040, 400), (350, 330))
    yield _points(report)
    yield facts(_facts(report))
    if report.get("corruptions"):
        yield tag("h3", "Under corruptions", class_="group")
        yield _corruptions(report["corruptions"])


def is_evaluation(report: Mapping[str, Any]) -> bool:
    return "points" in report and "dense" in report


def _tradeoff(report: Mapping[str, Any]) -> Chart:
    series = []
    for name in dict.fromkeys(point["policy"] for point in report["points"]):
        own = sorted((p["macs_fraction"], p["accuracy"]) for p in report["points"] if p["policy"] == name)
        x, y = zip(*own, strict=True)
        series.append(Series(name, x, y, dots=True, strong=name == OURS))
    dense = Level(f"dense: {percent(report['dense']['accuracy'])}", report["dense"]["accuracy"])
    label = "mean MACs per image, of the dense model's"
    return Chart("Accuracy", label, coloured(series), percent, level=dense, ends=True)


def _points(report: Mapping[str, Any]) -> Markup:
    columns = ("policy", "budget", "accuracy", "MACs: mean", "95th percentile", "most", "blocks", "heads", "patches")
    rows: list[Sequence[str]] = [("dense", "", percent(report["dense"]["accuracy"], 2), *["1.000"] * 3, *["1.00"] * 3)]
    strong = []
    for point in report["points"]:
        strong += [len(rows)] if point["policy"] == OURS else []
        rows.append(
            (
                point["policy"],
                f"{point['budget']:g}",
                percent(point["accuracy"], 2),
                *(f"{point[name]:.3f}" for name in ("macs_fraction", "macs_fraction_p95", "macs_fraction_max")),
                *(f"{point[name]:.2f}" for name in ("depth_kept", "heads_kept", "tokens_kept")),
            )
        )
    caption = "MACs: of the dense model's. Heads and patches: of executed blocks."
    return table(columns, rows, caption, strong)


def _facts(report: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {
        "Images": f"{report['num_images']:,}",
        "Dense MACs an image": f"{report['dense']['macs'] / 1e6:,.1f} M",
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
