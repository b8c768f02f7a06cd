"""A shared backbone that was trained elsewhere: copied into the comparison, so that nothing else can take its place."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from miaformer.data import ImageData
from miaformer.data.files import whole_file
from miaformer.model.model import MIAFormer
from miaformer.training.progress import DURATIONS

WEIGHTS = "model.safetensors"


def is_copied(given: Path, to: Path) -> bool:
    """Raises ValueError where another backbone lies there, and where `given` is no model directory."""
    if not (given / WEIGHTS).exists():
        raise ValueError(f"{given} is no model directory: it holds no {WEIGHTS}")
    if not (to / WEIGHTS).exists():
        return False
    if not filecmp.cmp(given / WEIGHTS, to / WEIGHTS, shallow=False):
        raise ValueError(f"{to} holds another backbone than {given}: compare in another directory")
    return True


def copy_backbone(given: Path, to: Path, data: ImageData) -> None:
    """With how long its training took, where its run directory says so.

    Raises ValueError where it was trained for other classes than those of the data.
    """
    model = MIAFormer.from_pretrained(given)
    try:
        model.in_own_order(data)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from error
    to.mkdir(parents=True, exist_ok=True)
    if (durations := given.parent / DURATIONS).exists():
        shutil.copy(durations, to.parent)
    for path in sorted(filter(Path.is_file, given.iterdir()), key=lambda path: path.name == WEIGHTS):
        with whole_file(to / path.name) as unfinished:  # weights come last: they say that all is there
            shutil.copyfile(path, unfinished)
