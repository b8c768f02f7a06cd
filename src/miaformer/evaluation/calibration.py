"""Calibration: from the mean compute asked for to the price that brings it, measured as deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from miaformer import budget
from miaformer.budget import Calibration
from miaformer.looks import View, choose_looks
from miaformer.model import MIAFormer

OnProgress = Callable[[str, int], None]  # stage ("calibrate", "controls", "evaluate"), passes or images done


class LabelledBatch(Protocol):
    """What evaluation needs of a batch: `images` (B, 3, H, W), normalised, and `labels` (B,) int64."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


def calibrate(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    data: str = "",
    tolerance: float = 0.01,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Measure the model's table from budget to price, and store it as `model.calibration`.

    The decisions measured are those of inference: greedy, executed sparsely. Of a model with `looks=2` the same passes
    say which budgets are better spent in two looks. The images are kept in memory, for they are run 13 to 48 times.

    batches: of the calibration set, e.g. `Batches(...).epoch(0)`; labels are not read. data: what to call that set in
    the table. tolerance: the largest step between neighbouring fractions, where the controllers allow it.

    Raises ValueError where there are no images.
    """
    parameter = next(model.parameters())
    images = [batch.images.to(parameter) for batch in batches]
    num_images = sum(map(len, images))
    if not num_images:
        raise ValueError("calibrate() was given no images")
    views: dict[float, View] = {}  # by price, where there are answers to compare
    looks_twice = model.adapt_config.looks == 2 and model.num_classes > 1
    passes = 0

    def mean_fraction(price: float) -> float:
        nonlocal passes
        outputs = [model.run(batch, price=price) for batch in images]
        fractions = torch.cat([output.trace.macs_fraction for output in outputs])
        if looks_twice:
            views[price] = View.of(torch.cat([output.logits for output in outputs]), fractions)
        passes += 1
        if on_progress is not None:
            on_progress("calibrate", passes)
        return fractions.double().mean().item()

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            table = budget.calibrate(mean_fraction, num_images, data, tolerance, model.price_range())
            if looks_twice:
                table = replace(table, looks=choose_looks([views[price] for price in table.prices]))
            model.calibration = table
    finally:
        model.train(training)
    return model.calibration
