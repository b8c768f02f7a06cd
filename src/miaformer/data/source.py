"""What every image data set looks like to the rest of miaformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from miaformer.data.images import open_image

Split = Literal["train", "calibration", "test"]


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of the three."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(get_args(Split))}")


class ImageData(Dataset[tuple[Image.Image, int]], ABC):
    """Labelled images with random access: `data[i]` is an RGB 8-bit picture and its label.

    `name` says where they come from, `classes` names the labels, `labels` is (n,) int64 and known without decoding.
    `pixels`, where all pictures are held decoded and in one size, is (n, H, W) uint8 grey or (n, H, W, 3) uint8 RGB.
    A picture that cannot be decoded raises an `ImageError` naming it.
    """

    name: str
    classes: list[str]
    labels: NDArray[Any]
    pixels: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class PictureFiles(ImageData):
    """Pictures in files of their own, `paths`."""

    def __init__(self, name: str, paths: Sequence[Path], labels: Sequence[int], classes: list[str]) -> None:
        self.name, self.paths, self.classes = name, list(paths), classes
        self.labels = np.asarray(labels, dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index]), int(self.labels[index])


def check_classes(data: ImageData) -> None:
    """Raises ValueError for data of one class, on which every model is right."""
    if len(data.classes) < 2:
        raise ValueError(
            f"{data.name} has one class alone, {', '.join(map(repr, data.classes))}, where every answer is right: give "
            "the folder that holds a folder for each class"
        )


def spread(images: ImageData, count: int) -> ImageData:
    """At most `count` of them, evenly spaced: of data sorted by class, as many of each."""
    if count >= len(images):
        return images
    indices = (np.arange(count) * len(images)) // count
    return Subset(images, indices, f"{images.name}, {count} evenly spaced")


class Subset(ImageData):
    """Some of the images of `whole`: those numbered `indices`, in that order."""

    def __init__(self, whole: ImageData, indices: NDArray[Any], name: str) -> None:
        self.whole, self.indices, self.name = whole, indices, name
        self.classes = whole.classes
        self.labels = whole.labels[indices]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[int(self.indices[index])]


class Relabelled(ImageData):
    """The same images, labelled by their place among `classes`, the same ones in another order."""

    def __init__(self, whole: ImageData, classes: Sequence[str]) -> None:
        self.whole, self.name, self.classes, self.pixels = whole, whole.name, list(classes), whole.pixels
        self.labels = np.array([self.classes.index(name) for name in whole.classes], dtype=np.int64)[whole.labels]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[index][0], int(self.labels[index])
