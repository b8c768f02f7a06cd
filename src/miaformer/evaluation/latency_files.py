"""`latency.json`: a latency table, the calibration made with it, and what else was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miaformer.evaluation.latency import LatencyCalibration, LatencyTable

FORMAT = 1


@dataclass(frozen=True)
class Latency:
    """A table, and where images were at hand the budgets that it was calibrated for."""

    table: LatencyTable
    calibration: LatencyCalibration | None = None

    def to_json(self) -> dict[str, Any]:
        calibration = None if self.calibration is None else self.calibration.to_json()
        return {"format": FORMAT, "table": self.table.to_json(), "calibration": calibration}

    @staticmethod
    def from_json(content: Any) -> Latency:
        """Raises ValueError naming what is missing or wrong."""
        if not isinstance(content, dict) or content.get("format") != FORMAT or "table" not in content:
            raise ValueError(f"this is no latency file of format {FORMAT}: write one with `miaformer profile`")
        calibration = content.get("calibration")
        return Latency(
            LatencyTable.from_json(content["table"]),
            None if calibration is None else LatencyCalibration.from_json(calibration),
        )


def read_latency(path: str | Path) -> Latency:
    """Raises ValueError naming the file that is missing, damaged, or no latency file."""
    try:
        return Latency.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}") from error
