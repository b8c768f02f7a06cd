"""Evaluation and timing on a data set: pictures in, the reports of `miaformer eval` and `miaformer bench` out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaformer.data import Batch, Batches, ImageData, build_transform
from miaformer.data.source import check_classes
from miaformer.data.unlabelled import read_pictures
from miaformer.evaluation.bench import TIMED_ENGINES, Report, batches_of_size, bench
from miaformer.evaluation.calibration import OnProgress, calibrate
from miaformer.evaluation.drawn import Grains, drawn_models, mixed_by_confidence
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.evaluate import evaluate
from miaformer.export.engines import Engine
from miaformer.model.model import MIAFormer


def ordered_batches(model: MIAFormer, data: ImageData, batch_size: int = 64) -> Batches:
    """The images in their order, as the model's backbone expects them, labelled in the order of its classes.

    Classes are matched by name; a model without names is taken to answer in the data's order, and has these names from
    then on.

    Raises ValueError where the data has one class alone, and where model and data have different classes.
    """
    check_classes(data)
    if not model.num_classes:
        raise ValueError(f"the model has no classifier for the classes of {data.name}: train it on them first")
    data = model.in_own_order(data)
    if model.label_names is None:
        model.label_names = list(data.classes)
    transform = build_transform(model.data_config())
    return Batches(data, transform, batch_size, seed=0, shuffle=False, drop_last=False)


def evaluate_data(
    model: MIAFormer,
    data: ImageData,
    budgets: Sequence[float],
    policies: Sequence[str] = ("learned", "static", "random"),
    cap: float | None = None,
    held_out: ImageData | None = None,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """`evaluate` on a data set, as `miaformer eval --json` writes it: with the data's name, and what is known of the
    model's calibration.

    held_out: the calibration split, which static and random need of a calibrated model. For the other arguments, and
    for the errors raised, see `evaluate` and `ordered_batches`.
    """
    batches = ordered_batches(model, data, batch_size)
    calibration = None if held_out is None else ordered_batches(model, held_out, batch_size).epoch(0)
    report = evaluate(model, batches.epoch(0), budgets, policies, cap, calibration, seed, on_progress, engine)
    return {"data": data.name, "calibration": calibration_facts(model), **report}


def calibration_facts(model: MIAFormer) -> dict[str, Any] | None:
    """Where the model's budgets were measured, and which it can meet; None of an uncalibrated model."""
    table = model.calibration
    if table is None:
        return None
    least, most = table.range
    return {"data": table.data, "num_images": table.num_images, "least": least, "most": most}


def bench_data(
    model: MIAFormer,
    data: str | Path,
    engines: Sequence[str] = TIMED_ENGINES,
    dtypes: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 8, 32),
    budgets: Sequence[float] = (0.35, 0.5, 0.7),
    *,
    grains: Sequence[Grains] | None = None,
    repeats: int = 15,
    seconds: float = 20.0,
    calibration_images: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`bench` on pictures of a data set, as `miaformer bench --json` writes it.

    data: what `read_pictures` takes. grains: decisions are drawn at random, once for each, instead of the model's own.
    calibration_images: on which controllers are drawn, and a model without calibration is calibrated. Ctrl-C ends it
    with what there is, and `interrupted` says so; on_cell is given the same after each dtype and batch size.

    Raises ValueError as `read_pictures`, `drawn_models` and `bench` do.
    """
    wanted = max(batch * batches_of_size(batch) for batch in batch_sizes)
    pictures = read_pictures(data, build_transform(model.data_config()), wanted + calibration_images, seed)
    held_out = pictures[-calibration_images:]
    if len(pictures) >= 2 * calibration_images:  # else there are too few for both
        pictures = pictures[:-calibration_images]
    pictures = pictures[:wanted]
    models = {"all": model} if grains is None else drawn_models(model, held_out, pictures, seed, grains)
    if grains is not None and "resolution" in grains:  # as many are timed as time allows, perhaps eight
        pictures = pictures[mixed_by_confidence(models["resolution"], pictures)]
    _calibrate_all(models, held_out, str(data), on_progress)
    device = next(model.parameters()).device
    about = {
        "calibration": {grain: calibration_facts(one) for grain, one in models.items()},
        "drawn": grains is not None,
        "environment": describe_environment(device, seed),
    }

    def keep(found: Report) -> None:
        if on_cell is not None:
            on_cell({"data": str(data), **found.to_json(), "interrupted": True, **about})

    settings = (dtypes, batch_sizes, budgets, repeats, seconds, on_progress)
    found = bench(models, pictures, engines, *settings, on_cell=keep)
    return {"data": str(data), **found.to_json(), **about}


def _calibrate_all(models: dict[str, MIAFormer], held_out: Tensor, data: str, on_progress: OnProgress | None) -> None:
    """Those that are not calibrated yet, coarsely: time is what is measured."""
    numbers = torch.arange(len(held_out)).split(16)
    batches = [Batch(images, part, part) for images, part in zip(held_out.split(16), numbers, strict=True)]
    for grains, model in models.items():
        stage = "calibrate" if len(models) == 1 else f"calibrate {grains}"

        def on_pass(_: str, done: int, stage: str = stage) -> None:
            if on_progress is not None:
                on_progress(stage, done)

        if model.calibration is None:
            calibrate(model, batches, data, 0.08, on_pass)
