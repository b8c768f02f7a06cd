"""What a training run left in its directory, as far as it has come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miaformer.data.files import read_json

Row = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class StageHistory:
    """One stage: what was planned, and what has been done."""

    settings: dict[str, Any]  # of the recipe
    planned: int  # steps
    rows: list[Row]  # one a step, in their order
    seconds: float | None  # up to the last checkpoint; None where it was not recorded
    processes: int | None

    @property
    def kind(self) -> str:
        return str(self.settings["kind"])


@dataclass(frozen=True)
class History:
    """A run of `miaformer train`."""

    directory: Path
    recipe: dict[str, Any]
    data: str
    num_images: int
    seed: int
    stages: list[StageHistory]  # those of no step are left out
    calibration: dict[str, Any] | None
    environment: dict[str, Any] | None
    has_model: bool

    @property
    def done(self) -> int:
        """Steps."""
        return sum(len(stage.rows) for stage in self.stages)

    @property
    def planned(self) -> int:
        """Steps."""
        return sum(stage.planned for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def is_finished(self) -> bool:
        return self.has_model and self.done >= self.planned


def is_history(directory: Path) -> bool:
    return (directory / "recipe.json").is_file()


def read_history(directory: Path) -> History:
    """Raises ValueError naming a file that is damaged or of another kind."""
    described = read_json(directory / "recipe.json")
    try:
        recipe, num_images = described["recipe"], int(described["num_images"])
        rows = list(_lines(directory / "metrics.jsonl"))
        durations = list(_lines(directory / "durations.jsonl"))
        stages = list(_stages(recipe, num_images, rows, durations))
        data, seed = str(described["data"]), int(described["seed"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{directory}: not what `miaformer train` writes ({type(error).__name__} {error})") from error
    calibration, environment = (_json(directory / name) for name in ("model/calibration.json", "environment.json"))
    has_model = (directory / "model" / "model.safetensors").is_file()
    return History(directory, recipe, data, num_images, seed, stages, calibration, environment, has_model)


def _stages(recipe: dict[str, Any], num_images: int, rows: list[Row], durations: list[Row]) -> Iterator[StageHistory]:
    steps_per_epoch = num_images // recipe["batch_size"]
    first = 0
    for settings in recipe["stages"]:
        planned = max(round(settings["epochs"] * steps_per_epoch), 1 if settings["epochs"] > 0 else 0)
        last = first + planned
        if planned:
            own = [row for row in rows if first < row["step"] <= last]
            timed = [row for row in durations if first < row["step"] <= last]
            seconds = sum(row["seconds"] for row in timed) if timed else None
            yield StageHistory(settings, planned, own, seconds, timed[-1]["processes"] if timed else None)
        first = last


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _lines(path: Path) -> Iterator[Row]:
    """One JSON object a line; none where there is no file. The last line of a run that was killed may be half a one."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
