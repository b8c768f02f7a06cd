"""What a comparison left in its directory, as `miaformer compare --json` would write it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from miaformer.model.saved import read_json
from miaformer.reports.history import is_history, read_history


def is_comparison_directory(directory: Path) -> bool:
    return bool(_runs(directory)) or is_history(directory / "backbone")


def read_comparison(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The report of all that is measured (None: nothing is yet), and the runs that are not, with how far they are.

    Rows of methods that are ours without a part say `ablation`. Raises ValueError where runs do not belong together.
    """
    from miaformer.lab.comparison import ABLATIONS, summarise
    from miaformer.lab.comparison.results import read_points
    from miaformer.training.progress import core_seconds

    runs = _runs(directory)
    measured = [run for run in runs if (run / "measured.json").is_file()]
    missing = [_progress(run) for run in runs if run not in measured]
    backbone = directory / "backbone"
    if is_history(backbone) and not read_history(backbone).has_model:
        missing.insert(0, _progress(backbone))
    if not measured:
        return None, missing
    table = asdict(summarise(*read_points(measured)))
    for row in table["rows"]:
        row["ablation"] = row["name"] in ABLATIONS
    reports = [read_json(run / "measured.json") for run in measured]
    seeds: dict[str, list[int]] = {}
    of_backbone = core_seconds(backbone)
    seconds = {"backbone": [] if of_backbone is None else [of_backbone]}
    for report in reports:
        seeds.setdefault(report["method"], []).append(report["seed"])
        if report["core_seconds"] is not None:
            seconds.setdefault(report["method"], []).append(report["core_seconds"])
    return {
        **table,
        "recipe": _recipe(backbone, [run for run in runs if run.parent.name == "learned"]),
        "data": reports[0]["asked"]["data"],
        "seeds": seeds,
        "core_seconds": {name: sum(values) / len(values) for name, values in seconds.items() if values},
        "environment": reports[0]["environment"],
    }, missing


def _recipe(backbone: Path, ours: list[Path]) -> dict[str, Any]:
    """Ours with the stages of the backbone before its own; what is known of it."""
    recipes = [read_json(run / "recipe.json")["recipe"] for run in (backbone, *ours[:1]) if is_history(run)]
    stages = [stage for recipe in recipes for stage in recipe["stages"]]
    return {**recipes[-1], "stages": stages} if recipes else {}


def _runs(directory: Path) -> list[Path]:
    """METHOD/seedK where anything is in it, ours first."""
    found = [path for path in directory.glob("*/seed*") if (path / "measured.json").is_file() or is_history(path)]
    return sorted(found, key=lambda path: (path.parent.name != "learned", path))


def _progress(run: Path) -> str:
    """Which one it is, and how far it has come."""
    name = run.name if run.name == "backbone" else f"{run.parent.name}, {run.name.replace('seed', 'seed ')}"
    history = read_history(run)
    return f"{name} ({'trained' if history.has_model else f'step {history.done:,} of {history.planned:,}'})"
