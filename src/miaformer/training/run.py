"""A whole run: recipe and data in; trained, calibrated and saved model out."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from rich.console import Console
from torch import nn

from miaformer.data import Batches, ImageData, build_transform, open_data
from miaformer.data.seeds import seed_everything
from miaformer.data.source import check_classes
from miaformer.evaluation.calibration import MOST_PASSES, calibrate
from miaformer.model.adapt import adapt
from miaformer.model.model import MIAFormer
from miaformer.training.choices import as_begun, described, with_precision, with_sizes
from miaformer.training.objective import Objective
from miaformer.training.preparation import (
    check_stages,
    check_trainable,
    fit_classifier,
    learnable,
    new_backbone,
    training_batches,
)
from miaformer.training.progress import Display, duration
from miaformer.training.recipes import Recipe, get_recipe
from miaformer.training.run_directory import check_free, claimed, data_name, describe
from miaformer.training.stages import OBJECTIVES
from miaformer.training.trainer import Trainer


def train(
    model: MIAFormer,
    data: str | Path | ImageData,
    recipe: Recipe | str = "finetune",
    out: str | Path = "runs/latest",
    *,
    seed: int = 0,
    resume: bool = False,
    calibration_data: ImageData | None = None,
    console: Console | None = None,
    show_progress: bool = True,
    device: str | None = None,
    teacher: nn.Module | None = None,
    objectives: Mapping[str, type[Objective]] = {},
) -> MIAFormer:
    """Train an adapted model through a recipe's stages, calibrate its budgets and save it in `out`/model.

    data: what `miaformer.data.open_data` takes (`digits`, a folder, a timm data set's name), or training images; then
    `calibration_data` are needed too, and must not be among them. out: gets `recipe.json`, `environment.json`,
    `metrics.jsonl`, TensorBoard files, `checkpoints/` and `model/`. resume: go on from the newest checkpoint in `out`,
    exactly. device: "cpu" to leave an accelerator alone. teacher: a static model whose soft labels all stages learn
    from, by the recipe's `distill_weight`; by default every stage after the backbone's learns from the backbone as it
    was before. Of a recipe without labels it gives what is learned, and is by default the backbone as it is given.
    objectives: of the recipe's stages that are of other kinds than ours (`miaformer.training.stages`).

    A model whose classifier answers other classes than the data's, another number of them or others by name, is given a
    new one, where the recipe learns labels.

    Returns the model, in evaluation mode. Raises ValueError where `out` holds another run, or recipe and data do not
    fit; `Interrupted` after Ctrl-C, with a checkpoint saved.
    """
    if not isinstance(model, MIAFormer):
        raise TypeError(f"train() takes what miaformer.adapt gives, not a {type(model).__name__}")
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    objectives = {**OBJECTIVES, **objectives}
    check_stages(recipe, model, objectives)
    out = Path(out)
    if isinstance(data, ImageData):
        if calibration_data is None:
            raise ValueError("train() was given images, not the name of a data set: give calibration_data too")
        train_data, held_out = data, calibration_data
    else:
        train_data = open_data(data, "train", labelled=recipe.labelled)
        held_out = calibration_data or open_data(data, "calibration", labelled=recipe.labelled)
    gets_classifier = False
    if recipe.labelled:
        check_classes(train_data)
        gets_classifier = model.answers_other_classes(train_data.classes)
        if not gets_classifier:
            train_data, held_out = model.in_own_order(train_data), model.in_own_order(held_out)
    if not gets_classifier:
        recipe = learnable(recipe, model, objectives)
    check_trainable(model)
    started = time.monotonic()
    # Where there is no accelerator several processes find each other only if told that they are on processors.
    found = None if device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    given = as_begun(recipe, out, len(train_data)) if resume else recipe
    recipe = with_precision(given, "cpu" if found is None else found.type)
    AcceleratorState._reset_state()  # of an earlier run in this process, perhaps of another precision
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=found is None,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    main = accelerator.is_main_process
    device_type = accelerator.device.type
    recipe = with_sizes(recipe, len(train_data), device_type, accelerator.num_processes)
    description = describe(recipe, train_data, data, seed)
    check_free(out, description, resume)
    accelerator.wait_for_everyone()  # all have looked before one writes
    display = Display(console, enabled=show_progress and main)

    if recipe.labelled:
        fit_classifier(model, train_data, seed, display)
        model.label_names = list(train_data.classes)
    model.to(accelerator.device)
    if recipe.data_on_device:
        display.say(f"Decoding {len(train_data):,} images ...")
    batches = training_batches(train_data, model.data_config(), recipe, seed, accelerator)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).requires_grad_(False).eval()
    trainer = Trainer(model, batches, recipe, out, seed, accelerator, display, teacher, objectives)
    had_budgets, model.calibration = model.calibration is not None, None  # of weights as they were
    for line in _plan(trainer, train_data, held_out, described(given, recipe, len(train_data), device_type)):
        display.say(line)
    with claimed(out, description, accelerator, seed):
        trainer.run(resume)
    decides = any(trainer.decides(stage) for stage in recipe.stages)
    if decides:
        model.set_price_scale(*trainer.tariff.price_scale())
    if decides or recipe.chooses_resolution or had_budgets:
        _calibrate(model, held_out, data_name(held_out, data), max(batches.batch_size, 256), seed, display)
    if main:
        model.save_pretrained(out / "model")
    display.say(
        f"Saved {out / 'model'} after {duration(time.monotonic() - started)}. {_next_command(model, out, data)}"
    )
    accelerator.end_training()
    return model.eval()


def _calibrate(model: MIAFormer, held_out: ImageData, name: str, batch_size: int, seed: int, display: Display) -> None:
    """batch_size: the larger the faster, since nothing learns here."""
    plain = build_transform(model.data_config(), training=False)
    batches = Batches(held_out, plain, batch_size, seed=seed, shuffle=False, drop_last=False)
    sized = model.adapt_config.chooses_resolution
    passes, most = (len(model.image_sizes()), "") if sized else (MOST_PASSES, "at most ")
    display.say(f"Calibrating on {len(held_out)} images of {held_out.name}, in {most}{passes} passes ...")
    display.start_stage("calibrate", passes, 0, len(held_out))
    calibrate(model, batches.epoch(0), name, on_progress=lambda _, passes: display.step(passes, {}))
    display.end_stage()


def _plan(trainer: Trainer, train_data: ImageData, held_out: ImageData, settings: str) -> list[str]:
    """What a run is going to take, in two lines."""
    steps = [span.last - span.first for span in trainer.spans]
    stages = ", ".join(f"{span.stage.kind} {n:,}" for span, n in zip(trainer.spans, steps, strict=True))
    total = f" ({sum(steps):,} in all)" if len(steps) > 1 else ""
    height, width = trainer.model.data_config()["input_size"][1:]
    parameters = list(trainer.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    part = "" if trainable == count else f", {trainable / 1e6:,.2f} M of them trainable"
    about = f" of {len(train_data.classes):,} classes" if trainer.recipe.labelled else ", labels not read"
    return [
        f"{len(train_data):,} training and {len(held_out):,} calibration images{about}; steps: {stages}{total}",
        f"{count / 1e6:,.2f} M parameters{part}, {width} x {height} px, {trainer.accelerator.device.type}; {settings}",
    ]


def _next_command(model: MIAFormer, out: Path, data: str | Path | ImageData) -> str:
    """What to try on the trained model; `--data` is left to the user where the images have no name to open them by."""
    name = "DATA" if isinstance(data, ImageData) else shlex.quote(str(data))
    if not model.num_classes:
        table = model.calibration
        budget = "" if table is None else f" --budget {max(0.5, math.ceil(100 * table.range[0]) / 100):g}"
        return f"Next: miaformer embed {shlex.quote(str(out / 'model'))} {name}{budget} --out embeddings.npz"
    command = f"miaformer eval {shlex.quote(str(out / 'model'))} --data {name}"
    if model.calibration is None:
        return f"Next: {command} --policy full"
    low, high = model.calibration.range
    budgets = sorted({math.ceil(100 * low) / 100, round((low + high) / 2, 2), math.floor(100 * high) / 100})
    return f"Next: {command} --budgets {' '.join(f'{budget:g}' for budget in budgets if low <= budget <= high)}"


def train_recipe(
    recipe: Recipe | str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    backbone: str | Path | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    console: Console | None = None,
    show_progress: bool = True,
    device: str | None = None,
) -> MIAFormer:
    """The same from the recipe alone: makes the backbone that it names, for the classes of its data, and adapts it.

    backbone: a model directory whose (trained) backbone to adapt in the place of a new one. classes: names of the
    classes that the classifier in the recipe's weights answers, in the order of labels; without them, and with as many
    classes as the data has, these are taken to be the data's.
    """
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    source = data or recipe.data
    if not source:
        raise ValueError(f"recipe {recipe.name!r} has no data of its own: give data")
    static: nn.Module
    if backbone is not None:
        if Path(backbone).is_file():
            raise ValueError(
                f"backbone {backbone} is a file, and should be a model's directory: give a checkpoint file with the "
                "name of its timm model, --model NAME --weights FILE (a recipe's model and weights)"
            )
        static = MIAFormer.from_pretrained(backbone).to_timm()
        seed_everything(seed, 0, 0)  # of its controllers
    else:
        answers = classes or (len(open_data(source, "train").classes) if recipe.labelled else 0)
        static = new_backbone(recipe, answers, seed)
    model = adapt(static, **recipe.adapt)
    return train(
        model,
        source,
        recipe,
        out,
        seed=seed,
        resume=resume,
        console=console,
        show_progress=show_progress,
        device=device,
    )
