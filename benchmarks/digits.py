"""The figures of README's table: recipe `digits`, several seeds, learned against static and random at equal MACs.

    .venv/bin/python benchmarks/digits.py --out runs/digits-seeds

Trains what is not there yet (about four minutes a seed on two cores, in two processes as `make demo` does), evaluates
on the test split, and writes benchmarks/results/digits.json. The rank correlation is Spearman's: an image's MACs with
the dense model's loss on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from miaformer.cli.processes import run_in_processes
from miaformer.data import Batches, build_transform, open_data
from miaformer.evaluation import compare, contenders
from miaformer.training import get_recipe, trained_model

BUDGETS = (0.35, 0.5, 0.7)
RESULTS = Path(__file__).parent / "results" / "digits.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    reports = [evaluated(args.out / f"seed{seed}", seed) for seed in args.seeds]
    result = {"command": "python benchmarks/digits.py", "mean": means(reports), "seeds": reports}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result["mean"])
    print(f"written to {args.json}")


def evaluated(out: Path, seed: int) -> dict[str, Any]:
    """The report of one seed's model, trained first where it is not there."""
    recipe = get_recipe("digits")
    model = trained_model(recipe, out, seed=seed)
    if model is None:
        command = ["train", "--recipe", "digits", "--out", str(out), "--seed", str(seed), "--processes", "2"]
        status = run_in_processes([*command, *(["--resume"] if (out / "recipe.json").exists() else [])], 2)
        if status:
            raise SystemExit(status)
        model = trained_model(recipe, out, seed=seed)
    assert model is not None

    def batches(split: str) -> Batches:
        transform = build_transform(model.data_config())
        return Batches(open_data("digits", split), transform, 64, seed=seed, shuffle=False, drop_last=False)

    found, left_out = contenders(model, BUDGETS, calibration=batches("calibration").epoch(0), seed=seed)
    return {"seed": seed, **compare(model, batches("test").epoch(0), found, seed=seed, left_out=left_out)}


def means(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, of the points that every seed has."""
    rows = []
    for first in reports[0]["points"]:
        same = [
            point
            for report in reports
            for point in report["points"]
            if (point["policy"], point["budget"]) == (first["policy"], first["budget"])
        ]
        if len(same) == len(reports):
            numbers = {k: statistics.fmean(p[k] for p in same) for k, v in first.items() if isinstance(v, float)}
            rows.append({"policy": first["policy"], **numbers})
    correlations = [report["adaptivity"]["spearman_difficulty_macs"] for report in reports]
    return {
        "seeds": len(reports),
        "dense_accuracy": statistics.fmean(report["dense"]["accuracy"] for report in reports),
        "controllers_macs_fraction": statistics.fmean(r["controllers"]["macs_fraction"] for r in reports),
        "spearman_difficulty_macs": statistics.fmean(correlations),
        "spearman_by_seed": correlations,
        "points": rows,
    }


def show(mean: dict[str, Any]) -> None:
    controllers = 100 * mean["controllers_macs_fraction"]
    print(f"dense {100 * mean['dense_accuracy']:.2f} %, controllers {controllers:.2f} % of MACs")
    print(f"rank correlation {mean['spearman_difficulty_macs']:.2f}, by seed {mean['spearman_by_seed']}")
    for row in mean["points"]:
        print(f"{row['policy']:<8} {row['budget']:.2f}  {100 * row['accuracy']:.2f} %  at {row['macs_fraction']:.3f}")


if __name__ == "__main__":
    main()
