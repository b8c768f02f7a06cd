"""An exported file in 8-bit integers: calibrated as it will run, and compared with the model in float32."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.evaluation.calibration import OnProgress, calibrate
from miaformer.export import export_onnx, open_session, run_session
from miaformer.export.session import NO_CAP, run_of
from miaformer.model.budget import Calibration
from miaformer.model.early_exit import EarlyExit
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Learned, Look


@dataclass(frozen=True)
class Int8Point:
    """The file and the model on the same images, at one budget."""

    budget: float
    accuracy: float  # in per cent
    float32_accuracy: float
    macs_fraction: float  # mean
    float32_macs_fraction: float
    flipped: float  # share of all decisions (blocks, heads, tokens) that differ


def calibrated_int8(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    data: str = "",
    on_progress: OnProgress | None = None,
) -> MIAFormer:
    """The model with the budgets that its file in 8-bit integers needs: give it to `export_onnx(..., int8=True)`.

    Rounding moves decisions, and with them what a price brings; the file's own decisions are measured, in ONNX
    Runtime. The model given keeps its table.

    Raises ValueError where there are fewer than two images.
    """
    images = list(batches)
    count = sum(len(batch.images) for batch in images)
    if count < 2:
        raise ValueError(f"calibrating needs two images at least, better hundreds: a budget is a mean; got {count}")
    twin = copy.copy(model)  # the same parameters, with a table of its own
    with tempfile.TemporaryDirectory() as folder:
        calibrate(twin, images, data, on_progress=on_progress, look_at=_File(model, Path(folder) / "int8.onnx"))
    return twin


class _File:
    """Takes the looks that a calibration asks for in a file: at any price, which that file knows as a budget."""

    def __init__(self, model: MIAFormer, path: Path) -> None:
        self.model, twin = model, copy.copy(model)
        if model.adapt_config.chooses_resolution:
            twin.calibration = model.calibration and replace(model.calibration, looks=())
        else:
            twin.calibration = Calibration(model.price_range(), (1.0, 0.5), 0)  # prices in, evenly by their logarithm
            low, high = model.log_price(torch.tensor(twin.calibration.prices)).tolist()
            self._budget_of = lambda log_price: 1.0 - 0.5 * (log_price - low) / (high - low)
        export_onnx(twin, path, int8=True, trace=True)
        self._run = run_of(open_session(path, torch.get_num_threads()))

    def __call__(self, images: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        if isinstance(look.policy, Learned):
            budget = self._budget_of(look.policy.log_price.item())
        else:
            budget = self.model.macs_of_sizes()[look.sizes[0]] / self.model.cost().backbone
        scalars = {"budget": budget, "cap": NO_CAP}
        if isinstance(look.policy, EarlyExit):
            scalars["leave"] = float(look.policy.threshold)
        feed = {name: np.asarray(value, np.float32) for name, value in scalars.items()}
        each = []
        for image in images:
            found = self._run({"images": image[None].numpy(), **feed})
            early = found.get("answers", found["logits"][:0])
            each.append((np.concatenate([early, found["logits"]]), found["macs_fraction"]))
        answers, macs = (np.stack(parts) for parts in zip(*each, strict=True))
        return torch.from_numpy(answers), torch.from_numpy(macs[:, 0])


@torch.inference_mode()
def compare_int8(
    model: MIAFormer, calibrated: MIAFormer, batches: Iterable[LabelledBatch], budgets: Sequence[float]
) -> list[Int8Point]:
    """The file in 8-bit integers of `calibrated_int8` against the model itself, each at its own budgets."""
    batches = list(batches)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        path = Path(folder) / "int8.onnx"
        export_onnx(calibrated, path, int8=True, trace=True)
        session = open_session(path, torch.get_num_threads())
    points = []
    for budget in budgets:
        rows: list[list[float]] = []
        for batch in batches:
            wanted = model.run(batch.images, budget=budget)
            for place, (image, label) in enumerate(zip(batch.images, batch.labels.tolist(), strict=True)):
                found = run_session(session, image[None].numpy(), budget)
                own = {name: getattr(wanted.trace, name)[place].numpy() for name in ("depth", "heads", "tokens")}
                flips = np.concatenate([(found[name][0] != decided).ravel() for name, decided in own.items()])
                right = found["logits"].argmax() == label, wanted.logits[place].argmax() == label
                spent = found["macs_fraction"][0], wanted.trace.macs_fraction[place]
                rows.append([*map(float, (*right, *spent, flips.mean()))])
        own_right, float32_right, macs, float32_macs, flipped = np.mean(rows, axis=0).tolist()
        points.append(Int8Point(budget, 100 * own_right, 100 * float32_right, macs, float32_macs, flipped))
    return points
