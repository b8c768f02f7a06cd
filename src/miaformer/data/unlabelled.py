"""Pictures without labels: what measuring speed needs, from anything that holds some."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miaformer.data.images import ImageError, find_images
from miaformer.data.source import ImageData, PictureFiles, Split
from miaformer.data.specs import open_data

_ORDER: tuple[Split, ...] = ("test", "calibration", "train")  # what a model was not trained on first


def read_pictures(spec: str | Path, transform: Callable[[Image.Image], Tensor], count: int, seed: int = 0) -> Tensor:
    """Up to `count` different pictures (n, 3, H, W), in an order that depends on the seed.

    spec: what `open_data` takes, whatever its classes - the test split first, then the others - or any folder with
    pictures somewhere below it.

    Raises ValueError where there is none, ImageError (a ValueError) naming a picture that cannot be decoded.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen: list[tuple[ImageData, int]] = []
    for data in _splits(spec):
        order = np.argsort(rng.random(len(data)), kind="stable")[: count - len(chosen)]
        chosen += [(data, index) for index in order.tolist()]
    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(lambda one: transform(one[0][one[1]][0]), chosen)))


def _splits(spec: str | Path) -> list[ImageData]:
    """All splits that there are, or a folder's pictures where there is none."""
    found: list[ImageData] = []
    reasons: list[ValueError] = []
    for split in _ORDER:
        try:
            found.append(open_data(spec, split, labelled=False))
        except ImageError:
            raise
        except ValueError as error:
            reasons.append(error)
    if found:
        return found
    if not Path(spec).is_dir():
        raise reasons[0]
    paths = find_images(spec)
    return [PictureFiles(str(spec), paths, [0] * len(paths), ["unlabelled"])]
