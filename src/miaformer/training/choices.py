"""What a recipe leaves open, chosen to fit the data and the machine: batch size, workers and precision.

`recipe.json` records what was chosen, and a resumed run takes it from there: it is the same run on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from miaformer.data.files import holds_run, read_json
from miaformer.engine.processor import processor_cores
from miaformer.training.recipes import Precision, Recipe

MOST_PICTURES = {"cpu": 64}  # in a batch that is chosen; on a CPU a larger one takes memory and is no faster
MOST_PICTURES_ON_ACCELERATOR = 256
FEWEST_PICTURES = 8  # budgets are kept on the mean of a batch, so it needs several pictures
STEPS_PER_EPOCH = 20  # at least, of a batch that is chosen, where there are pictures enough

MOST_WORKERS = 8
CORES_PER_WORKER_ON_CPU = 4  # the model needs the others


def batch_size(given: int | None, num_images: int, device_type: str, processes: int) -> int:
    """The pictures in a step, of all processes together: `given`, if there are as many.

    Chosen, it is at most 256 (on a CPU 64), and at most a twentieth of the pictures, so that an epoch has 20 steps, but
    at least 8. It is never more than the pictures, always even, and shared equally by the processes.

    Raises ValueError where there are too few pictures for any.
    """
    if given is not None and given <= num_images:
        return given
    unit = math.lcm(2, processes)
    most = given or MOST_PICTURES.get(device_type, MOST_PICTURES_ON_ACCELERATOR)
    wanted = min(most, num_images)
    if given is None:
        wanted = min(wanted, max(num_images // STEPS_PER_EPOCH, FEWEST_PICTURES))
    if num_images < unit:
        several = "" if processes == 1 else f" shared by {processes} processes"
        raise ValueError(f"{num_images} training pictures are too few: a step takes at least {unit}{several}")
    return max(wanted // unit * unit, unit)


def num_workers(num_images: int, size: int, device_type: str, processes: int, cores: int) -> int:
    """The processes that decode for one process that trains.

    Beside an accelerator all cores but one, at most 8. On a CPU one for every four cores, since the model is trained
    on them too: with fewer cores, pictures are decoded between steps. Never more than an epoch has batches.
    """
    share = cores // processes
    workers = share // CORES_PER_WORKER_ON_CPU if device_type == "cpu" else share - 1
    return max(0, min(workers, MOST_WORKERS, num_images // size))


def has_fast_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU multiplies matrices in bfloat16 faster than in float32.

    Without instructions for it, bfloat16 takes six to eight times as long.

    capabilities: what `torch.cpu.get_capabilities` gives.
    """
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def precision(device_type: str, capabilities: Mapping[str, Any]) -> Precision:
    """bf16 where it is fast, else float32. capabilities: of the CPU, as `has_fast_bf16` takes them."""
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device_type == "cpu" and has_fast_bf16(capabilities) else "no"


def with_precision(recipe: Recipe, device_type: str) -> Recipe:
    """The recipe with its precision. First, since the accelerator is made with it."""
    if recipe.precision != "auto":
        return recipe
    return replace(recipe, precision=precision(device_type, torch.cpu.get_capabilities()))


def with_sizes(recipe: Recipe, num_images: int, device_type: str, processes: int) -> Recipe:
    """The recipe with batch size and workers."""
    size = batch_size(recipe.batch_size, num_images, device_type, processes)
    workers = recipe.num_workers
    if workers is None:
        workers = num_workers(num_images, size, device_type, processes, processor_cores())
    return replace(recipe, batch_size=size, num_workers=workers)


def described(given: Recipe, recipe: Recipe, num_images: int, device_type: str) -> str:
    """Batch size, workers and precision of `recipe`, and why where `given` left them open or was not followed."""
    size, why_size = recipe.batch_size or 0, ""
    if given.batch_size is None:
        why_size = f" ({num_images // size} steps an epoch)"
    elif given.batch_size != size:
        why_size = f" (not {given.batch_size}: there are {num_images:,} training images)"
    workers, why_workers = usable_workers(recipe), ""
    if given.num_workers is None or workers != recipe.num_workers:
        why_workers = f" ({processor_cores()} cores)"
    bf16_is_fast = precision(device_type, torch.cpu.get_capabilities()) == "bf16"
    why_precision = ""
    if given.precision == "auto":
        why_precision = " (fast on this device)" if bf16_is_fast else " (bf16 is not fast on this device)"
    elif recipe.precision == "bf16" and device_type in ("cpu", "cuda") and not bf16_is_fast:
        why_precision = " (slow: this device has no instructions for it; --set precision=no is faster)"
    elif recipe.precision == "fp16" and device_type == "cpu":
        why_precision = " (without effect on a CPU, which trains in float32)"
    count = f"{workers or 'no'} decoding worker{'s' * (workers != 1)}"
    return f"batch size {size}{why_size}, {count}{why_workers}, precision {recipe.precision}{why_precision}"


def usable_workers(recipe: Recipe) -> int:
    """A recipe's workers, or as many as there are cores: more only slow each other down, and change no batch."""
    return 0 if recipe.data_on_device else min(recipe.num_workers or 0, processor_cores())


def as_begun(recipe: Recipe, out: Path, num_images: int) -> Recipe:
    """The recipe with what was chosen for it when the run in `out` began, if there is one."""
    if not holds_run(out):
        return recipe
    begun = read_json(out / "recipe.json").get("recipe", {})
    left_open = {
        "batch_size": recipe.batch_size is None or recipe.batch_size > num_images,
        "num_workers": recipe.num_workers is None,
        "precision": recipe.precision == "auto",
    }
    return replace(recipe, **{name: begun[name] for name, is_open in left_open.items() if is_open and name in begun})
