"""What a model answers in, and whether data is labelled so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miaformer.data.source import Relabelled

if TYPE_CHECKING:
    from miaformer.data import ImageData


def read_class_names(file: str | Path) -> list[str]:
    """Names of classes in a text file, one a line, in the order of labels. Raises ValueError where it is not UTF-8."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()  # Windows' editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not valid UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def in_own_order(data: ImageData, num_classes: int, own: list[str] | None) -> ImageData:
    """The data, labelled by a classifier of so many classes, in the order of its own names where it has some."""
    if len(data.classes) != num_classes or (own is not None and set(own) != set(data.classes)):
        raise ValueError(
            f"the model has {num_classes} classes, {data.name} has {len(data.classes)}"
            + ("" if own is None else f": {_difference(own, data.classes)}")
        )
    return data if own is None or own == data.classes else Relabelled(data, own)


def _difference(own: Sequence[str], others: Sequence[str]) -> str:
    """Which classes the model alone has, and which the data alone."""
    sides = (("the model alone", own, others), ("the data alone", others, own))
    found = []
    for whose, here, there in sides:
        alone = [name for name in here if name not in set(there)]
        if alone:
            found.append(f"{whose} has {', '.join(map(repr, alone[:5]))}{' ...' if len(alone) > 5 else ''}")
    return ", ".join(found)
