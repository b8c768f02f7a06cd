"""Data sets that timm knows by name: `torch/cifar10:ROOT`, `hfds/owner/name`."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from miaformer.data.columns import Columns
from miaformer.data.extras import require
from miaformer.data.images import ImageError, open_image
from miaformer.data.source import ImageData

NAME_PREFIXES = ("torch/", "hfds/")
STREAM_PREFIXES = ("tfds/", "hfids/", "wds/")

_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "torch/": {"train": ("train",), "test": ("validation",)},
    "hfds/": {"train": ("train",), "test": ("test", "validation")},
}
# timm asks for 'image' and 'label'; many data sets on the hub call them otherwise.
_COLUMNS: dict[str, list[dict[str, Any]]] = {
    "torch/": [{}],
    "hfds/": [
        {"input_key": image, "target_key": label}
        for image, label in (("image", "label"), ("img", "label"), ("img", "fine_label"), ("image", "labels"))
    ],
}


class TorchvisionImages(ImageData):
    """A `torchvision.datasets` data set as `ImageData`."""

    def __init__(self, name: str, dataset: Any) -> None:
        if not hasattr(dataset, "targets"):
            raise ValueError(f"{name}: {type(dataset).__name__} does not list its labels; use class folders instead")
        self.name, self._dataset = name, dataset
        self.labels = np.asarray(dataset.targets, dtype=np.int64)
        names = getattr(dataset, "classes", None) or range(int(self.labels.max()) + 1)
        # ImageNet's are tuples of synonyms
        self.classes = [
            entry if isinstance(entry, str) else ", ".join(np.atleast_1d(entry).astype(str)) for entry in names
        ]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image = self._dataset[index][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError(f"{self.name}, image {index}: {error}") from error
        return image.convert("RGB"), int(self.labels[index])


class HubImages(ImageData):
    """A data set of the Hugging Face hub, or a local one in its layout, mapped into memory by `datasets`."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self._reader = name, dataset.reader
        column = self._reader.image_key
        if len(dataset) and self._reader.dataset[0][column] is None:  # asked for a column it lacks, timm adds one
            raise ValueError(f"{name}: no image column {column!r} among {self._reader.dataset.column_names}")
        self.labels = np.asarray(list(self._reader.iter_targets()), dtype=np.int64)
        if len(self.labels) and self.labels.min() < 0:
            raise ValueError(f"{name}: row {int(self.labels.argmin())} has label {self.labels.min()}: it is unlabelled")
        by_label = {label: str(name) for name, label in (self._reader.class_to_idx or {}).items()}
        n_classes = max(len(by_label), int(self.labels.max(initial=-1)) + 1)
        self.classes = [by_label.get(label, str(label)) for label in range(n_classes)]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # Not dataset[index]: timm's puts the next image in the place of one that cannot be decoded.
        where = f"{self.name}, row {index}"
        try:
            encoded, _ = self._reader[index]
        except (OSError, TypeError, AssertionError) as error:  # what timm's reader raises for a row without bytes
            raise ImageError(f"{where}: it has no image: {error}") from error
        with encoded:
            return open_image(encoded.read(), name=where), int(self.labels[index])


class NamedData:
    """`PREFIX/NAME` or `PREFIX/NAME:ROOT` through `timm.data.create_dataset`. Nothing is downloaded by
    torchvision's.

    Parts are train and test; a hub data set's validation part is its test part where it has no other.
    """

    def __init__(self, spec: str, columns: Columns | None = None) -> None:
        self.name = spec
        self._columns = columns or Columns()
        self._dataset_name, _, root = spec.partition(":")
        self._root = root or None
        self._prefix = next(prefix for prefix in NAME_PREFIXES if spec.startswith(prefix))
        if self._prefix == "hfds/":
            require("datasets", "datasets")
        elif self._columns:
            raise ValueError(f"{spec}: columns can be named of data sets of the hub, hfds/..., not of torchvision's")
        if self._prefix == "torch/" and self._root is None:
            raise ValueError(f"{spec}: say where its files are: '{spec}:ROOT'")

    @property
    def parts(self) -> set[str]:
        return set(_PARTS[self._prefix])

    def read(self, part: str) -> ImageData:
        errors: list[str] = []
        for timm_split in _PARTS[self._prefix][part]:
            for columns in self._asked():
                try:
                    return self._create(timm_split, columns)
                except Exception as error:  # each library behind timm has its own
                    errors.append(f"{type(error).__name__}: {error}")
        raise ValueError(f"{self.name}: timm could not open its {part} part: {errors[0]}")

    def _asked(self) -> list[dict[str, Any]]:
        """The columns to try, in order: those named, else the usual ones."""
        named = {"input_key": self._columns.image, "target_key": self._columns.label}
        asked = [{**usual, **{key: name for key, name in named.items() if name}} for usual in _COLUMNS[self._prefix]]
        return [one for place, one in enumerate(asked) if one not in asked[:place]]

    def _create(self, timm_split: str, columns: dict[str, Any]) -> ImageData:
        from timm.data import create_dataset

        dataset = create_dataset(self._dataset_name, self._root, split=timm_split, **columns)
        name = f"{self.name} ({timm_split})"
        return TorchvisionImages(name, dataset) if self._prefix == "torch/" else HubImages(name, dataset)
