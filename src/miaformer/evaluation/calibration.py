"""Calibration: from the mean compute asked for to the price that brings it, measured as deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from miaformer.model import budget
from miaformer.model.budget import Calibration
from miaformer.model.looks import View, choose_looks
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Full, Look

OnProgress = Callable[[str, int], None]  # stage ("calibrate", "controls", "evaluate"), passes or images done

# Images (B, 3, H, W) in one look to logits (B, classes) and macs_fraction (B,).
LookAt = Callable[[Tensor, Look], tuple[Tensor, Tensor]]


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
    look_at: LookAt | None = None,
) -> Calibration:
    """Measure the model's table from budget to price, and store it as `model.calibration`.

    The decisions measured are those of inference: greedy, executed sparsely. Of a model with `looks=2` the same passes
    say which budgets are better spent in two looks. The images are kept in memory, for they are run 13 to 48 times, or
    of a model that chooses resolutions once in each size.

    batches: of the calibration set, e.g. `Batches(...).epoch(0)`; labels are not read. data: what to call that set in
    the table. tolerance: the largest step between neighbouring fractions, where the controllers allow it. look_at: what
    takes one look in the model's place, as a file of it that was exported.

    Raises ValueError where there are no images.
    """
    parameter = next(model.parameters())
    images = [batch.images.to(parameter) for batch in batches]
    num_images = sum(map(len, images))
    if not num_images:
        raise ValueError("calibrate() was given no images")
    config = model.adapt_config
    passes = 0

    def measured(look: Look) -> View:
        nonlocal passes
        outputs = [look_at(batch, look) if look_at else _looked(model, batch, look) for batch in images]
        passes += 1
        if on_progress is not None:
            on_progress("calibrate", passes)
        logits, macs_fraction = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return View.of(logits, macs_fraction)

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if config.chooses_resolution:
                model.calibration = _of_sizes(model, measured, num_images, data)
            else:
                model.calibration = _of_prices(model, measured, num_images, data, tolerance)
    finally:
        model.train(training)
    return model.calibration


def _looked(model: MIAFormer, images: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    output = model.run(images, policy=look)
    return output.logits, output.trace.macs_fraction


def _of_sizes(model: MIAFormer, measured: Callable[[Look], View], num_images: int, data: str) -> Calibration:
    views = [measured(Look(Full(), (size,))) for size in model.image_sizes()]
    looks = choose_looks(views, between=False) if model.num_classes > 1 else ()
    return Calibration((), tuple(view.fraction for view in views), num_images, data, looks)


def _of_prices(
    model: MIAFormer, measured: Callable[[Look], View], num_images: int, data: str, tolerance: float
) -> Calibration:
    views: dict[float, View] = {}

    def mean_fraction(price: float) -> float:
        views[price] = measured(Look(model.learned(price)))
        return views[price].fraction

    table = budget.calibrate(mean_fraction, num_images, data, tolerance, model.price_range())
    if not model.adapt_config.looks_twice or model.num_classes <= 1:
        return table
    return replace(table, looks=choose_looks([views[price] for price in table.prices]))
