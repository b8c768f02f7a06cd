"""Accuracy per compute: the learned policy against the dense model and against controls of equal cost.

One pass over the data: each batch is run dense, then by every contender. So all of them see the same images,
and what an image costs can be compared with how hard it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.evaluation.calibration import OnProgress
from miaformer.evaluation.contenders import Contender, LeftOut, contenders, inference_batches
from miaformer.evaluation.environment import describe_environment
from miaformer.export.engines import Engine
from miaformer.model.model import MIAFormer
from miaformer.model.output import Trace


def evaluate(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    budgets: Sequence[float],
    policies: Sequence[str] = ("learned", "static", "random"),
    cap: float | None = None,
    calibration: Iterable[LabelledBatch] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """The report of `evaluate_data` and of `miaformer eval --json`.

    batches: of the test set, passed over once. budgets: fractions of the backbone's MACs. policies: of
    `POLICIES`; "full" is one point whatever the budgets. calibration: batches of the calibration set, passed
    over once, from which static and random take the learned policy's mean decisions. cap: the most MACs any
    image takes, a fraction. engine: of the model, runs the learned policy and the dense model; None: PyTorch, as
    for the other policies in any case. A policy that cannot meet a budget is named under `left_out`.

    Raises ValueError for unknown policies, budgets and labels, for no images, and where nothing can be
    compared.
    """
    found, left_out = contenders(model, budgets, policies, cap, calibration, seed, on_progress)
    return compare(model, batches, found, cap, seed, on_progress, left_out, engine)


@torch.inference_mode()
def compare(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    contenders: Sequence[Contender],
    cap: float | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    left_out: Sequence[LeftOut] = (),
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Run the contenders, and the dense model, over the same batches; the report of `evaluate`."""
    losses: list[Tensor] = []
    dense_correct: list[Tensor] = []
    tallies = [_Tally() for _ in contenders]
    done = 0
    for images, labels in inference_batches(model, batches):
        logits = (model.backbone if engine is None else engine.dense)(images).float()
        if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise ValueError(f"label {int(labels.max())} does not fit a model of {logits.shape[1]} classes")
        losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        dense_correct.append((logits.argmax(dim=1) == labels).cpu())
        for contender, tally in zip(contenders, tallies, strict=True):
            if engine is None or contender.name != "learned":
                output = model.run(images, policy=contender.policy, cap=cap)
            else:
                caps = None if cap is None else [cap] * len(images)
                output = engine.run(images, [contender.budget] * len(images), caps)
            tally.add(output.trace, output.logits.argmax(dim=1) == labels)
        done += len(images)
        if on_progress is not None:
            on_progress("evaluate", done)
    if not done:
        raise ValueError("there are no images to evaluate on")
    cost = model.cost()
    parameter = next(model.parameters())
    return {
        "dense": {"accuracy": _mean(torch.cat(dense_correct)), "macs": cost.backbone},
        "points": [
            {"policy": c.name, "budget": c.budget, "price": c.price, **tally.summary()}
            for c, tally in zip(contenders, tallies, strict=True)
        ],
        "adaptivity": _adaptivity(contenders, tallies, torch.cat(losses)),
        "left_out": [{"policy": o.name, "budget": o.budget, "reason": o.reason} for o in left_out],
        "controllers": {
            "macs": model.controller_macs(),
            "macs_fraction": model.controller_macs() / cost.backbone,
        },
        "num_images": done,
        "cap": cap,
        "engine": "eager" if engine is None else engine.name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "environment": describe_environment(parameter.device, seed),
    }


@dataclass
class _Tally:
    """What one contender did on each image, batch by batch."""

    correct: list[Tensor] = field(default_factory=list)
    macs_fraction: list[Tensor] = field(default_factory=list)
    depth: list[Tensor] = field(default_factory=list)  # shares of an image's blocks
    heads: list[Tensor] = field(default_factory=list)  # (B, L), shares of a block's heads
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, trace: Trace, correct: Tensor) -> None:
        self.correct.append(correct.cpu())
        self.macs_fraction.append(trace.macs_fraction.double().cpu())
        self.depth.append(trace.depth.double().cpu())
        self.heads.append(trace.heads.double().mean(dim=2).cpu())
        self.tokens.append(trace.tokens.double().mean(dim=2).cpu())

    def summary(self) -> dict[str, float]:
        """Shares of heads and tokens are means over executed blocks."""
        fraction, executed = torch.cat(self.macs_fraction), torch.cat(self.depth)
        blocks = max(executed.sum().item(), 1.0)
        return {
            "accuracy": _mean(torch.cat(self.correct)),
            "macs_fraction": _mean(fraction),
            "macs_fraction_p95": fraction.quantile(0.95).item(),
            "macs_fraction_max": fraction.max().item(),
            "macs_fraction_std": fraction.std(correction=0).item(),
            "depth_kept": _mean(executed),
            "heads_kept": torch.cat(self.heads).sum().item() / blocks,
            "tokens_kept": torch.cat(self.tokens).sum().item() / blocks,
        }


def _adaptivity(contenders: Sequence[Contender], tallies: Sequence[_Tally], losses: Tensor) -> dict[str, Any]:
    """Does compute follow difficulty? Each learned point, and their mean; None without a learned point."""
    by_budget = [
        {
            "budget": contender.budget,
            "spearman_difficulty_macs": spearman(losses, torch.cat(tally.macs_fraction)),
            "macs_fraction_std": torch.cat(tally.macs_fraction).std(correction=0).item(),
        }
        for contender, tally in zip(contenders, tallies, strict=True)
        if contender.name == "learned"
    ]
    values = [point["spearman_difficulty_macs"] for point in by_budget]
    return {
        "spearman_difficulty_macs": math.fsum(values) / len(values) if values else None,
        "by_budget": by_budget,
    }


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x and y (n,), ties sharing their mean rank; 0 where one is constant."""
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"spearman() takes two vectors of equal length, got {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return ((a * b).sum() / scale).item() if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks (n,) float64 from 0 up; equal values share the mean of their ranks."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts.double() - 1) / 2)[group]


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
