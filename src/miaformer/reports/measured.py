"""What a comparison left in its directory, as `miaformer compare --json` would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miaformer.data.files import read_json
from miaformer.reports.history import is_history, read_history


def is_comparison_directory(directory: Path) -> bool:
    return bool(_runs(directory)) or is_history(directory / "backbone")


def read_comparison(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The report of all that is measured (None: nothing is yet), and the runs that are not, with how far they are.

    Raises ValueError where runs do not belong together.
    """
    from miaformer.lab.comparison.report import comparison_report

    runs = _runs(directory)
    measured = [run for run in runs if (run / "measured.json").is_file()]
    missing = [_progress(run) for run in runs if run not in measured]
    backbone = directory / "backbone"
    if is_history(backbone) and not read_history(backbone).has_model:
        missing.insert(0, _progress(backbone))
    if not measured:
        return None, missing
    recipe = _recipe(backbone, [run for run in runs if run.parent.name == "learned"])
    return {"recipe": recipe, **comparison_report(measured, backbone)}, missing


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
