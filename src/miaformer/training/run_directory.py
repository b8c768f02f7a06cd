"""A run's directory: what it says that it holds, so that no run is mixed with another, and what is left in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator

from miaformer.data import ImageData, open_data
from miaformer.data.files import check_holds_no_run, holds_run, locked, read_json
from miaformer.evaluation.environment import describe_environment
from miaformer.model.model import MIAFormer
from miaformer.training.choices import as_begun
from miaformer.training.recipes import Recipe, with_defaults
from miaformer.vit.checkpoint_files import identity


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
    if not holds_run(out):
        return False
    source = data or recipe.data
    images = open_data(source, "train", labelled=recipe.labelled)
    check_free(out, describe(as_begun(recipe, out, len(images)), images, source, seed), resume=True)
    return (out / "model" / "config.json").exists()  # written last


def describe(recipe: Recipe, images: ImageData, data: str | Path | ImageData, seed: int) -> dict[str, Any]:
    """What a run is, as JSON, of images opened as `data`."""
    known = {"data": data_name(images, data), "num_images": len(images)}
    settings = recipe.to_json()
    if recipe.weights:
        settings["weights"] = identity(recipe.weights)  # wherever the file lies
    description = {"recipe": settings, **known, "seed": seed}
    return cast(dict[str, Any], json.loads(json.dumps(description)))


def data_name(images: ImageData, data: str | Path | ImageData) -> str:
    """What images opened as `data` are called, wherever their folder lies: a run is the same on another machine."""
    if isinstance(data, ImageData) or not Path(data).exists():
        return images.name
    return images.name.replace(str(Path(data)), Path(data).resolve().name, 1)


def check_free(out: Path, description: dict[str, Any], resume: bool) -> None:
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


@contextmanager
def claimed(out: Path, description: dict[str, Any], accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Record in `out` which run it holds, once training starts; a run that fails earlier leaves nothing behind."""
    with ExitStack() as stack:
        if accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            (out / "recipe.json").write_text(json.dumps(description, indent=2) + "\n")
            environment = describe_environment(accelerator.device, seed)
            (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        accelerator.init_trackers("tensorboard")
        yield
