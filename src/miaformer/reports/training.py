"""The report of a training run: curves, stages, settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from miaformer.reports.history import History, Row, StageHistory
from miaformer.reports.page import Markup, facts, join, percent, table, tag
from miaformer.reports.style import FAINT, INK, KEPT, in_page, new_figure

MOST_POINTS = 75  # of a curve: more are averaged


def training_head(run: History) -> Markup:
    """Title, how far it has come, and what it is."""
    images = f"{run.num_images:,} images of {run.data}"
    return join(
        (
            tag("h1", f"Training run: {run.recipe['name']}"),
            tag("p", f"{images}, seed {run.seed}.", class_="quiet"),
            None if run.is_finished else tag("p", f"Not finished: {_where(run)}.", class_="warning"),
            facts(_facts(run)),
        )
    )


def training_body(run: History) -> Iterable[Markup]:
    """Curves and stages."""
    if run.done:
        yield tag("h2", "Curves")
        yield tag("p", "Means over neighbouring steps; stages are marked where they begin.", class_="quiet")
        yield tag("div", *_curves(run), class_="charts")
    yield tag("h2", "Stages")
    yield _stages(run.stages)


def settings(recipe: Mapping[str, Any]) -> Iterable[Markup]:
    """All of a recipe."""
    yield tag("h2", "Settings")
    plain = {name: value for name, value in recipe.items() if name != "stages"}
    yield facts(dict(_flat(plain)))
    stages = recipe.get("stages", [])
    if stages:
        names = list(dict.fromkeys(name for stage in stages for name in stage))
        yield table(
            names, [[_written(stage.get(name)) for name in names] for stage in stages], "Settings of the stages."
        )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _where(run: History) -> str:
    """How far a run has come that has not come to its end."""
    if not run.done:
        return "it has not made its first step"
    if run.done >= run.planned:
        return f"all {run.planned:,} steps are made, and no model is saved yet"
    current = next(stage for stage in run.stages if len(stage.rows) < stage.planned)
    return f"step {run.done:,} of {run.planned:,}, in {current.kind}; this shows what there is"


def _facts(run: History) -> dict[str, object]:
    found: dict[str, object] = {
        "Model": run.recipe["model"],
        "Steps": f"{run.done:,}" if run.is_finished else f"{run.done:,} of {run.planned:,}",
    }
    if run.seconds is not None:
        processes = max(stage.processes or 1 for stage in run.stages)
        found["Duration"] = duration(run.seconds) + (f", {processes} processes" if processes > 1 else "")
    last = run.stages[-1].rows if run.stages else []
    if last:
        score, written = _score(run.stages)
        found[f"{score.capitalize()} in training, at its end"] = written(_mean(last, score))
    if run.calibration is not None:
        least, most = run.calibration["fractions"][-1], run.calibration["fractions"][0]
        found["Budgets it can meet"] = f"{least:.2f} to {most:.2f} of the dense MACs"
        found["Calibrated on"] = f"{run.calibration['num_images']:,} images of {run.calibration['data']}"
    return found


def _score(stages: Sequence[StageHistory]) -> tuple[str, Callable[[float], str]]:
    """What tells how good the model is, and how it is written; without labels it is likeness to a teacher."""
    known = {name for stage in stages for row in stage.rows[-1:] for name in row}
    if "similarity" in known:
        return "similarity", "{:.3f}".format
    return ("agreement" if "agreement" in known else "accuracy"), percent


def _mean(rows: Sequence[Row], name: str) -> float:
    """Over the last 20 steps."""
    values = [row[name] for row in rows[-20:] if name in row]
    return sum(values) / len(values)


# Curves ---------------------------------------------------------------------------------------------------------------


def _curves(run: History) -> Iterable[Markup]:
    """Averaged over so many steps that `MOST_POINTS` are left; where a run diverged there is no point."""
    rows = [row for stage in run.stages for row in stage.rows]
    score, _ = _score(run.stages)
    for title, lines in (
        ("Loss", {"loss": "loss"}),
        (score.capitalize(), {score: "as executed", f"{score}_full": "everything executed"}),
        ("MACs, of the dense model's", {"macs_fraction": "taken", "budget": "asked"}),
        ("Learning rate", {"lr": "learning rate"}),
    ):
        figure, axes = new_figure(5.4, 3.0)
        figure.subplots_adjust(left=0.12, right=0.93, bottom=0.16, top=0.76)
        for (name, label), colour in zip(lines.items(), (KEPT, "#c9760f"), strict=False):
            known = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if known:
                parts = np.array_split(np.array(known, dtype=float), min(len(known), MOST_POINTS))
                means = np.array([part.mean(axis=0) for part in parts])
                axes.plot(*means.T, color=colour, marker="." if len(means) == 1 else "", label=label, gid=name)
        if not axes.lines:
            continue
        first = axes.dataLim.x0
        for stage in run.stages:
            if stage.rows and stage.rows[0]["step"] >= first:
                start = stage.rows[0]["step"]
                axes.axvline(start, color=FAINT, linewidth=0.8, linestyle=":")
                where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
                axes.annotate(stage.kind, (start, 1), (0, 2), rotation=20, fontsize=8, color=FAINT, **where)
        axes.set_title(title, loc="left", fontsize=10, weight="bold", color=INK, pad=34)
        axes.yaxis.get_offset_text().set_horizontalalignment("right")  # a power of ten, beside the names of stages
        axes.set_xlabel("step")
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        yield in_page(figure, tight=False)


# Tables ---------------------------------------------------------------------------------------------------------------


def _stages(stages: Sequence[StageHistory]) -> Markup:
    score, written_score = _score(stages)
    columns = ("stage", "steps", "duration", "loss", score, "everything executed", "MACs taken", "asked")
    rows = []
    for stage in stages:
        made = len(stage.rows)
        means = [
            written(_mean(stage.rows, name)) if any(name in row for row in stage.rows[-1:]) else ""
            for name, written in (
                ("loss", "{:.3f}".format),
                (score, written_score),
                (f"{score}_full", written_score),
                ("macs_fraction", "{:.3f}".format),
                ("budget", "{:.3f}".format),
            )
        ]
        steps = f"{made:,}" if made >= stage.planned else f"{made:,} of {stage.planned:,}"
        took = "" if stage.seconds is None else duration(stage.seconds)
        rows.append([stage.kind, steps, took, *means])
    return table(
        columns, rows, "Means over the last 20 steps of each stage, of training batches with their augmentation."
    )


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _written(value)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_written, value)) or "none"
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
