"""Accuracy and compute on corrupted images: the 15 common corruptions (Hendrycks and Dietterich, ICLR 2019).

They are made from the user's own pictures by `imagecorruptions`, at five severities, each the same in every run. Their
strengths are those of ImageNet-C, whatever the size of the pictures: of small ones they leave less.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from miaformer.data import ImageData
from miaformer.data.seeds import stream_seed
from miaformer.evaluation.calibration import OnProgress
from miaformer.evaluation.contenders import contenders
from miaformer.evaluation.evaluate import compare
from miaformer.evaluation.on_data import ordered_batches
from miaformer.export.engines import Engine
from miaformer.model.model import MIAFormer

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 32  # pixels, of what the library takes

_SEEDED = ("impulse_noise", "glass_blur")  # take a seed; the others draw from numpy's global generator


class Corrupted(ImageData):
    """The images of `whole`, corrupted."""

    def __init__(self, whole: ImageData, corruption: str, severity: int, seed: int = 0) -> None:
        if corruption not in CORRUPTIONS:
            raise ValueError(f"unknown corruption {corruption!r}: use some of {', '.join(CORRUPTIONS)}")
        if severity not in SEVERITIES:
            raise ValueError(f"severity {severity!r}: use 1 to 5")
        self.whole, self.corruption, self.severity, self.seed = whole, corruption, severity, seed
        self.classes, self.labels = whole.classes, whole.labels
        self.name = f"{whole.name}, {corruption} {severity}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        from imagecorruptions import corrupt

        picture, label = self.whole[index]
        if min(picture.size) < LEAST_SIDE:
            raise ValueError(
                f"{self.whole.name}: picture {index} is {picture.width} x {picture.height}, and corruptions need "
                f"{LEAST_SIDE} pixels a side"
            )
        seed = stream_seed(self.seed, index, self.corruption)
        extra = {"seed": seed} if self.corruption in _SEEDED else {}
        pixels = np.asarray(picture.convert("RGB"))
        before, before_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the library draws from it
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            found = corrupt(pixels, corruption_name=self.corruption, severity=self.severity, **extra)
        finally:
            random.setstate(before)
            np.random.set_state(before_numpy)  # noqa: NPY002
        return Image.fromarray(np.asarray(found, np.uint8)), label


def evaluate_corruptions(
    model: MIAFormer,
    data: ImageData,
    budgets: Sequence[float],
    policies: Sequence[str] = ("learned", "static", "random"),
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    *,
    cap: float | None = None,
    held_out: ImageData | None = None,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    engine: Engine | None = None,
) -> list[dict[str, Any]]:
    """A row for each corruption, severity and policy, the dense model among them: `corruptions` of `miaformer eval`.

    data: the images as they are; held_out: the calibration split, as it is too. Rows have `corruption`, `severity`,
    `policy`, `budget`, `accuracy`, `macs_fraction` and `macs_fraction_max`. See `evaluate` for the other arguments.

    Raises ValueError for unknown corruptions and severities, for pictures of less than 32 pixels a side, and as
    `evaluate` and `ordered_batches` do.
    """
    images = [Corrupted(data, name, severity, seed) for name in corruptions for severity in severities]
    calibration = None if held_out is None else ordered_batches(model, held_out, batch_size).epoch(0)
    found, _ = contenders(model, budgets, policies, cap, calibration, seed)
    rows: list[dict[str, Any]] = []
    for place, corrupted in enumerate(images, start=1):
        batches = ordered_batches(model, corrupted, batch_size).epoch(0)
        report = compare(model, batches, found, cap, seed, engine=engine)
        known = {"corruption": corrupted.corruption, "severity": corrupted.severity}
        dense = {"policy": "dense", "budget": None, "accuracy": report["dense"]["accuracy"]}
        rows.append({**known, **dense, "macs_fraction": 1.0, "macs_fraction_max": 1.0})
        kept = ("policy", "budget", "accuracy", "macs_fraction", "macs_fraction_max")
        rows += [{**known, **{name: point[name] for name in kept}} for point in report["points"]]
        if on_progress is not None:
            on_progress("corruptions", place)
    return rows


def mean_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over severities of each corruption, then over corruptions (`mean`), by policy and budget."""
    found = []
    for corruption in [*dict.fromkeys(row["corruption"] for row in rows), "mean"]:
        some = [row for row in rows if corruption in (row["corruption"], "mean")]
        for policy, budget in dict.fromkeys((row["policy"], row["budget"]) for row in some):
            own = [row for row in some if (row["policy"], row["budget"]) == (policy, budget)]
            means = {name: float(np.mean([row[name] for row in own])) for name in ("accuracy", "macs_fraction")}
            found.append({"corruption": corruption, "policy": policy, "budget": budget, **means})
    return found
