"""What was measured in the directories of a comparison, as one report: `compare --json` writes it, pages show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from miaformer.data.files import read_json
from miaformer.lab.comparison.ablations import ABLATIONS
from miaformer.lab.comparison.results import read_points, summarise
from miaformer.training.progress import core_seconds


def comparison_report(runs: Sequence[Path], backbone: Path) -> dict[str, Any]:
    """The fields of `Table`; `seeds`, `core_seconds` (means) and `adaptation` by method; where runs were measured;
    `model`, None where the backbone was given and not the recipe's.

    runs: directories, all measured; backbone: the directory of its training, if it was trained. Rows of methods that
    are ours without a part say `ablation`. Raises ValueError where runs do not belong together.
    """
    table = asdict(summarise(*read_points(runs)))
    for row in table["rows"]:
        row["ablation"] = row["name"] in ABLATIONS
    measured = [read_json(run / "measured.json") for run in runs]
    seeds, seconds = defaultdict(list), defaultdict(list)
    if (own := core_seconds(backbone)) is not None:
        seconds["backbone"].append(own)
    for one in measured:
        seeds[one["method"]].append(one["seed"])
        if one["core_seconds"] is not None:
            seconds[one["method"]].append(one["core_seconds"])
    trained = backbone / "recipe.json"
    mean = {name: fmean(values) for name, values in seconds.items()}
    return {
        **table,
        "data": measured[0]["asked"]["data"],
        "model": read_json(trained)["recipe"]["model"] if trained.exists() else None,
        "seeds": dict(seeds),
        "core_seconds": mean,
        "adaptation": _adaptation(mean),
        "environment": measured[0]["environment"],
    }


def _adaptation(seconds: dict[str, float]) -> dict[str, dict[str, float | None]]:
    """By method the processor minutes of adapting it, and their share of what training the backbone took."""
    backbone = seconds.get("backbone")
    return {
        name: {"minutes": own / 60, "share_of_backbone": own / backbone if backbone else None}
        for name, own in seconds.items()
        if name != "backbone"
    }
