"""What `miaformer compare` shows of its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from miaformer.reports.comparison_rows import COLUMNS, OURS, between, written


def comparison_table(report: Mapping[str, Any]) -> Table:
    shown = Table(
        caption=f"{report['num_images']:,} test images; intervals of 95 % over images; hardest: the tenth with the "
        "greatest dense loss; ours minus it: the lead of `learned`, in points. MACs and time: of the backbone's."
    )
    shown.add_column(COLUMNS[0], no_wrap=True)
    for name in COLUMNS[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    rows = written(report["rows"], report["differences"])
    for (row, cells), (following, _) in zip(rows, [*rows[1:], ({"budget": -1.0}, ())], strict=True):
        style = "bold" if row["name"] == OURS else None
        shown.add_row(*cells, style=style, end_section=following["budget"] != row["budget"])
    return shown


def conclusions(report: Mapping[str, Any]) -> Iterator[str]:
    for name, fraction in report["at_equal_accuracy"].items():
        yield f"{name}: half a point below dense at {fraction:.3f} of the MACs"
    below = report["one_point_below"]
    for name, one in below.get("methods", {}).items():
        yield f"{name}: one point below dense at {one['macs_fraction']:.3f} {between(one['interval'])} of the MACs"
    best = below.get("best_baseline")
    if best is not None:
        ratio = f"{best['ratio']:.3f} {between(best['ratio_interval'])}"
        yield f"There ours takes {ratio} of the MACs of the best baseline, {best['name']}."
    for at in report["adaptivity"]:
        yield (
            f"Does compute follow difficulty? At {at['budget']:g}: rank correlation of MACs with the backbone's loss "
            f"{at['loss']:+.3f}, with minus its margin {at['margin']:+.3f}."
        )
    share = report["adaptation"].get(OURS, {}).get("share_of_backbone")
    if share is not None:
        yield f"Adapting took {share:.2f} of the time that training the backbone took."
