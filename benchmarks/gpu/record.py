"""What a stage found, on disk from its first step on: a stage that was stopped goes on after the last whole step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miaformer.evaluation.environment import describe_environment


class OutOfTimeError(Exception):
    """The minutes of a call are over; the same call goes on."""


class Record:
    """DIR/STAGE.json: where it was measured, and what each step gave."""

    def __init__(self, directory: Path, stage: str, device: torch.device, seconds: float) -> None:
        self.directory, self.device = directory, device
        self._path, self._end = directory / f"{stage}.json", time.monotonic() + seconds
        directory.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, Any] = {}
        if self._path.exists():
            self.steps = json.loads(self._path.read_text())["steps"]

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def step(self, name: str, make: Callable[[], Any], least_seconds: float = 5.0) -> Any:
        """What a step gives, made now unless it is known. Raises OutOfTimeError where too little time is left."""
        if name in self.steps:
            return self.steps[name]
        if self.seconds_left < least_seconds:
            raise OutOfTimeError(f"{name} and what follows are left for the next call")
        began = time.monotonic()
        found = make()
        self.steps[name] = found
        content = {"environment": describe_environment(self.device, 0), "steps": self.steps}
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(content, indent=2) + "\n")
        beside.replace(self._path)
        print(f"{name}: {json.dumps(found)[:300]} ({time.monotonic() - began:.1f} s)", flush=True)
        return found
