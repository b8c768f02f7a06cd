"""Pictures without labels: what measuring speed needs, from anything that holds some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miaformer.data.images import ImageError, find_images, open_image
from miaformer.data.source import ImageData, Split
from miaformer.data.specs import open_data

_ORDER: tuple[Split, ...] = ("test", "calibration", "train")  # what a model was not trained on first


def read_pictures(spec: str | Path, transform: Callable[[Image.Image], Tensor], count: int, seed: int = 0) -> Tensor:
    """Up to `count` different pictures (n, 3, H, W), in an order that depends on the seed.

    spec: what `open_data` takes, whatever its classes - the test split first, then the others - or any folder with
    pictures somewhere below it.

    Raises ValueError where there is none, ImageError (a ValueError) naming a picture that cannot be decoded.
    """
    openers = _choose(list(_openers(spec)), count, seed)
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda opener: transform(opener()), openers)))


def _openers(spec: str | Path) -> Iterator[Sequence[Callable[[], Image.Image]]]:
    """What opens the pictures of each split, or of a folder without any."""
    reasons: list[ValueError] = []
    found = False
    for split in _ORDER:
        try:
            data = open_data(spec, split)
        except ImageError:
            raise
        except ValueError as error:
            reasons.append(error)
            continue
        found = True
        yield [_opener(data, index) for index in range(len(data))]
    if found:
        return
    if not Path(spec).is_dir():
        raise reasons[0]
    yield [_file_opener(path) for path in find_images(spec)]


def _opener(data: ImageData, index: int) -> Callable[[], Image.Image]:
    return lambda: data[index][0]


def _file_opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: open_image(path)


def _choose(groups: Sequence[Sequence[Any]], count: int, seed: int) -> list[Any]:
    """`count` of the members, of the first groups first, each group in random order."""
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen: list[Any] = []
    for group in groups:
        order = np.argsort(rng.random(len(group)), kind="stable")[: max(0, count - len(chosen))]
        chosen += [group[index] for index in order]
    return chosen
