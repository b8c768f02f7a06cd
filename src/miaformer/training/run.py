"""A whole run: recipe and data in; trained, calibrated and saved model out."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from rich.console import Console
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from miaformer.data import Augmentation, Batches, DeviceBatches, ImageData, build_transform, open_data
from miaformer.data.files import check_holds_no_run, holds_run, locked
from miaformer.data.seeds import seed_everything
from miaformer.data.source import check_classes
from miaformer.engine.block import check_plain
from miaformer.evaluation.calibration import calibrate
from miaformer.evaluation.environment import describe_environment
from miaformer.model.adapt import adapt
from miaformer.model.budget import MOST_PASSES
from miaformer.model.model import NOT_SAVED, MIAFormer
from miaformer.model.saved import read_json
from miaformer.training.choices import as_begun, described, usable_workers, with_precision, with_sizes
from miaformer.training.probe import classifiers
from miaformer.training.progress import Display, duration
from miaformer.training.recipes import Recipe, Stage, get_recipe, with_defaults
from miaformer.training.trainer import Trainer
from miaformer.vit.backbone import check_supported, transformer_blocks
from miaformer.vit.checkpoint_files import identity
from miaformer.vit.pretrained import load_backbone
from miaformer.vit.stem import ConvPatchEmbed


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
) -> MIAFormer:
    """Train an adapted model through a recipe's stages, calibrate its budgets and save it in `out`/model.

    data: what `miaformer.data.open_data` takes (`digits`, a folder, a timm data set's name), or training images; then
    `calibration_data` are needed too, and must not be among them. out: gets `recipe.json`, `environment.json`,
    `metrics.jsonl`, TensorBoard files, `checkpoints/` and `model/`. resume: go on from the newest checkpoint in `out`,
    exactly. device: "cpu" to leave an accelerator alone. teacher: a static model whose soft labels all stages learn
    from, by the recipe's `distill_weight`; by default every stage after the backbone's learns from the backbone as it
    was before.

    A model whose classifier answers other classes than the data's, another number of them or others by name, is given a
    new one.

    Returns the model, in evaluation mode. Raises ValueError where `out` holds another run, or recipe and data do not
    fit; `Interrupted` after Ctrl-C, with a checkpoint saved.
    """
    if not isinstance(model, MIAFormer):
        raise TypeError(f"train() takes what miaformer.adapt gives, not a {type(model).__name__}")
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    if any(stage.kind == "resolution" for stage in recipe.stages) and not model.adapt_config.chooses_resolution:
        raise ValueError(
            f"recipe {recipe.name!r} has a stage resolution: adapt the model with grains=('resolution',), or take one "
            "for controllers, 'imagenet' say"
        )
    out = Path(out)
    if isinstance(data, ImageData):
        if calibration_data is None:
            raise ValueError("train() was given images, not the name of a data set: give calibration_data too")
        train_data, held_out = data, calibration_data
    else:
        train_data = open_data(data, "train")
        held_out = calibration_data or open_data(data, "calibration")
    check_classes(train_data)
    if not model.answers_other_classes(train_data.classes):
        recipe = _learnable(recipe, model)
        train_data, held_out = model.in_own_order(train_data), model.in_own_order(held_out)
    check_trainable(model)
    started = time.monotonic()
    # Where there is no accelerator several processes find each other only if told that they are on processors.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    given = as_begun(recipe, out, len(train_data)) if resume else recipe
    recipe = with_precision(given, _device_type(on_cpu))
    AcceleratorState._reset_state()  # of an earlier run in this process, perhaps of another precision
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        cpu=on_cpu,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    main = accelerator.is_main_process
    device_type = accelerator.device.type
    recipe = with_sizes(recipe, len(train_data), device_type, accelerator.num_processes)
    description = _description(recipe, train_data, data, seed)
    _check_free(out, description, resume)
    accelerator.wait_for_everyone()  # all have looked before one writes
    display = Display(console, enabled=show_progress and main)

    data_config = model.data_config()
    _fit_classifier(model, train_data, seed, display)
    model.label_names = list(train_data.classes)
    model.to(accelerator.device)
    if recipe.data_on_device:
        display.say(f"Decoding {len(train_data):,} images ...")
    batches = _training_batches(train_data, data_config, recipe, seed, accelerator)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).requires_grad_(False).eval()
    trainer = Trainer(model, batches, recipe, out, seed, accelerator, display, teacher)
    had_budgets, model.calibration = model.calibration is not None, None  # of weights as they were
    for line in _plan(trainer, train_data, held_out, described(given, recipe, len(train_data), device_type)):
        display.say(line)
    with _claimed(out, description, accelerator, seed):
        trainer.run(resume)
    if any(stage.decides for stage in recipe.stages):
        model.set_price_scale(*trainer.tariff.price_scale())
    if recipe.calibrates or had_budgets:
        plain = build_transform(data_config, training=False)
        size = max(batches.batch_size, 256)  # nothing learns from them: the larger the faster
        held_out_batches = Batches(held_out, plain, size, seed=seed, shuffle=False, drop_last=False)
        sized = model.adapt_config.chooses_resolution
        passes, most = (len(model.image_sizes()), "") if sized else (MOST_PASSES, "at most ")
        display.say(f"Calibrating on {len(held_out)} images of {held_out.name}, in {most}{passes} passes ...")
        display.start_stage("calibrate", passes, 0, len(held_out))
        calibrate(
            model,
            held_out_batches.epoch(0),
            _name(held_out, data),
            on_progress=lambda _, passes: display.step(passes, {}),
        )
        display.end_stage()
    if main:
        model.save_pretrained(out / "model")
    display.say(
        f"Saved {out / 'model'} after {duration(time.monotonic() - started)}. {_next_command(model, out, data)}"
    )
    accelerator.end_training()
    return model.eval()


def _learnable(recipe: Recipe, model: MIAFormer) -> Recipe:
    """Without the stages in which nothing learns: those of the backbone, where it is frozen."""

    def is_free(*parts: nn.Module) -> bool:
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def learns(stage: Stage) -> bool:
        if stage.kind == "probe":
            return is_free(*classifiers(model.backbone))
        return is_free(model.backbone) or (stage.trains_controllers and is_free(model.controllers))

    stages = tuple(filter(learns, recipe.stages))
    if recipe.stages and not stages:
        raise ValueError(
            f"what recipe {recipe.name!r} trains is frozen: nothing would learn. Let some of it, "
            "model.requires_grad_(True)"
        )
    return replace(recipe, stages=stages)


def check_trainable(model: MIAFormer) -> None:
    """Raises ValueError for weights that optimisers cannot change, or would lose steps of by rounding, and for layers
    whose model could not be saved in the end.
    """
    check_plain(transformer_blocks(model.backbone), NOT_SAVED)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode(), and cannot learn: make the model outside of it"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}: train in float32, model.float(), which keeps small steps; the recipe's "
                "`precision` says what products are computed in"
            )


def _fit_classifier(model: MIAFormer, data: ImageData, seed: int, display: Display) -> None:
    """Give a model that answers other classes than the data's a new classifier, drawn by `seed`."""
    if not model.answers_other_classes(data.classes):
        return
    had = f"its own is for {model.num_classes} other classes" if model.num_classes else "it had none"
    display.say(f"The model gets a new classifier for the {len(data.classes)} classes of {data.name}; {had}")
    seed_everything(seed, 0, 0)
    model.reset_classifier(len(data.classes))


@contextmanager
def _claimed(out: Path, description: dict[str, Any], accelerator: Accelerator, seed: int) -> Iterator[None]:
    """`out` says what run it holds, from when training starts: what failed before leaves nothing behind."""
    with ExitStack() as stack:
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            (out / "recipe.json").write_text(json.dumps(description, indent=2) + "\n")
            environment = describe_environment(accelerator.device, seed)
            (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        accelerator.init_trackers("tensorboard")
        yield


def _device_type(on_cpu: bool) -> str:
    accelerator = None if on_cpu else torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


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
    return [
        f"{len(train_data):,} training and {len(held_out):,} calibration images of {len(train_data.classes):,} "
        f"classes; steps: {stages}{total}",
        f"{count / 1e6:,.2f} M parameters{part}, {width} x {height} px, {trainer.accelerator.device.type}; {settings}",
    ]


def _next_command(model: MIAFormer, out: Path, data: str | Path | ImageData) -> str:
    """What to try on the trained model; `--data` is left to the user where the images have no name to open them by."""
    name = "DATA" if isinstance(data, ImageData) else shlex.quote(str(data))
    command = f"miaformer eval {shlex.quote(str(out / 'model'))} --data {name}"
    if model.calibration is None:
        return f"Next: {command} --policy full"
    low, high = model.calibration.range
    budgets = sorted({math.ceil(100 * low) / 100, round((low + high) / 2, 2), math.floor(100 * high) / 100})
    return f"Next: {command} --budgets {' '.join(f'{budget:g}' for budget in budgets if low <= budget <= high)}"


def _training_batches(
    data: ImageData, data_config: dict[str, Any], recipe: Recipe, seed: int, accelerator: Accelerator
) -> Batches | DeviceBatches:
    assert recipe.batch_size is not None  # chosen by now
    augment = Augmentation(**recipe.augmentation)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if recipe.data_on_device:
        return DeviceBatches(
            data, data_config, augment, recipe.batch_size, seed=seed, device=accelerator.device, **share
        )
    return Batches(
        data,
        build_transform(data_config, training=True, augment=augment),
        recipe.batch_size,
        seed=seed,
        shuffle=True,
        drop_last=True,
        num_workers=usable_workers(recipe),
        **share,
    )


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
        static = new_backbone(recipe, classes or len(open_data(source, "train").classes), seed)
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


def new_backbone(recipe: Recipe, classes: int | Sequence[str], seed: int) -> nn.Module:
    """The timm model that a recipe names, with the weights that it names; what these leave open is drawn by `seed`."""
    seed_everything(seed, 0, 0)
    stem: dict[str, Any] = (
        {"embed_layer": partial(ConvPatchEmbed, stem_channels=recipe.conv_stem)} if recipe.conv_stem else {}
    )
    backbone = load_backbone(
        recipe.model, recipe.weights or None, recipe.image_size, classes, **recipe.model_args, **stem
    )
    if recipe.sincos_pos_embed and not recipe.weights:
        _start_from_sincos(check_supported(backbone))
    return backbone


def trained_model(recipe: Recipe, out: str | Path, *, seed: int = 0) -> MIAFormer | None:
    """What `train_recipe` left in `out`: its model, or None where it has not come to its end.

    Raises ValueError where `out` holds another run.
    """
    out = Path(out)
    if not is_trained(recipe, out, seed=seed):
        return None
    return MIAFormer.from_pretrained(out / "model")


def is_trained(recipe: Recipe, out: str | Path, *, data: str | Path | None = None, seed: int = 0) -> bool:
    """Whether the training of `recipe` in `out` has come to its end.

    Raises ValueError where `out` holds another run.
    """
    out = Path(out)
    last_written = "calibration.json" if recipe.calibrates else "model.safetensors"
    if not holds_run(out):
        return False
    source = data or recipe.data
    images = open_data(source, "train")
    _check_free(out, _description(as_begun(recipe, out, len(images)), images, source, seed), resume=True)
    return (out / "model" / last_written).exists()


@torch.no_grad()
def _start_from_sincos(backbone: VisionTransformer) -> None:
    """Learned position embeddings start from sines and cosines of both coordinates.

    From scratch on few images this is most of what a small ViT has to find out about space (Beyer et al. 2022); on
    digits it reached in 600 steps what noise had not reached in 1,200.
    """
    table = build_sincos2d_pos_embed(list(backbone.patch_embed.grid_size), backbone.embed_dim, temperature=100.0)
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    if backbone.pos_embed is not None:
        backbone.pos_embed[0, prefix:] = 0.3 * table


def _description(recipe: Recipe, images: ImageData, data: str | Path | ImageData, seed: int) -> dict[str, Any]:
    """What a run is, as JSON, of images opened as `data`."""
    known = {"data": _name(images, data), "num_images": len(images)}
    settings = recipe.to_json()
    if recipe.weights:
        settings["weights"] = identity(recipe.weights)  # wherever the file lies
    description = {"recipe": settings, **known, "seed": seed}
    return cast(dict[str, Any], json.loads(json.dumps(description)))


def _name(images: ImageData, data: str | Path | ImageData) -> str:
    """What images opened as `data` are called, wherever their folder lies: a run is the same on another machine."""
    if isinstance(data, ImageData) or not Path(data).exists():
        return images.name
    return images.name.replace(str(Path(data)), Path(data).resolve().name, 1)


def _check_free(out: Path, description: dict[str, Any], resume: bool) -> None:
    """Refuse to mix a run with another one in `out`."""
    if not resume:
        check_holds_no_run(out)
    if not holds_run(out):
        return
    before = read_json(out / "recipe.json")
    before["recipe"] = with_defaults(before.get("recipe", {}))
    if before != description:
        changed = _differences(before, description)
        raise ValueError(
            f"{out} holds another run, different in {', '.join(changed)}: it cannot be resumed as this one"
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names
