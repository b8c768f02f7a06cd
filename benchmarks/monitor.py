"""How soon the monitor of spending finds a rise, and whether it stays quiet, on what `learned` spent on CIFAR-10.

    .venv/bin/python benchmarks/monitor.py

Reads what `miaformer compare` kept in benchmarks/results/cifar10-small, writes benchmarks/results/monitor.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from miaformer.evaluation import describe_environment
from miaformer.serving.monitor import SpendingMonitor

RESULTS = Path(__file__).parent / "results"
RUN = RESULTS / "cifar10-small" / "learned" / "seed0"  # the bundled model
FITTED_ON = 2000
RISES = (0.02, 0.05, 0.1)  # of the dense model's MACs


def main() -> None:
    points = json.loads((RUN / "measured.json").read_text())["points"]
    arrays = np.load(RUN / "measured.npz")
    rows = []
    for point in points:
        if point["name"] != "learned":
            continue
        spent = arrays[f"macs_fraction{point['key']}"].astype(float)
        monitor = SpendingMonitor.fit(spent[:FITTED_ON])
        monitor.see(spent[FITTED_ON:])
        row = {"budget": point["budget"], "mean": monitor.mean, "std": monitor.std, "quiet_for": monitor.images}
        row["false_alarm_at"] = monitor.alarm_at
        for rise in RISES:
            monitor.reset()
            monitor.see(spent[FITTED_ON:] + rise)
            row[f"found_{rise:g}_after"] = monitor.alarm_at
        rows.append(row)
        print(row)
    command = ".venv/bin/python benchmarks/monitor.py"
    report = {"command": command, "rows": rows, "environment": describe_environment(torch.device("cpu"), 0)}
    (RESULTS / "monitor.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
