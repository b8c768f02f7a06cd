"""Which samples belong to which split, the same on every machine.

Only `Generator.random` and stable sorts are used: NumPy keeps their results fixed between versions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from miaformer.data.source import ImageData, Split, Subset, spread

HELD_OUT_FRACTION = 0.1
MAX_CALIBRATION = 2000  # images: a budget table needs no more
UNSPLIT = "all"  # the one part of a source that has no parts

_SEED = 0
_PART_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "calibration": "calibration",
}

Array = NDArray[Any]


class Source(Protocol):
    """Where a data set lies, before it is known which split is wanted.

    `parts` are the names of what it holds: some of train, validation, test, calibration, or only `UNSPLIT`.
    """

    name: str

    @property
    def parts(self) -> Collection[str]: ...

    def read(self, part: str) -> ImageData: ...


def stratified_position(labels: Array, seed: int) -> Array:
    """A place in [0, 1) for each sample, so that the samples below any threshold are a stratified random
    subset.

    Within a class of n samples, shuffled by `seed`, the k-th gets (k + u) / n, u one random offset a class:
    each class then fills [0, 1) evenly, and a class of one sample is not always the first to be taken.
    """
    labels = np.asarray(labels)
    rng = np.random.Generator(np.random.PCG64(seed))
    key = rng.random(len(labels))
    position = np.empty(len(labels), dtype=np.float64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        shuffled = members[np.argsort(key[members], kind="stable")]
        position[shuffled] = (np.arange(len(members)) + rng.random()) / len(members)
    return position


def canonical_part(name: str) -> str | None:
    """The part that a folder or file called `name` holds: "train", "validation", ..., or None."""
    return _PART_NAMES.get(name.lower())


def choose_split(source: Source, split: Split) -> ImageData:
    """One of miaformer's three splits, made from the parts that `source` has.

    - test: its test part; without one, its validation part.
    - calibration: its calibration part; without one, its validation part if that is not already the test
      split; of more than 2,000 images 2,000, evenly spaced. Without either, carved out of train: 10 %, at most
      2,000, stratified, always the same images.
    - train: its train part, less what was carved out.
    - A source with no parts at all is divided 80 / 10 / 10, stratified, always in the same way.

    Raises:
        ValueError: the source has no part to make the split from, or too few images to divide.
    """
    have = source.parts
    if UNSPLIT in have:
        return _divide(source.read(UNSPLIT), split, with_test=True)
    if split == "test":
        for part in ("test", "validation"):
            if part in have:
                return source.read(part)
        raise _missing(source, split, "test' or 'validation")
    for part in ("calibration", "validation"):
        if part in have and (part == "calibration" or "test" in have):
            if split == "calibration":
                return spread(source.read(part), MAX_CALIBRATION)
            if "train" in have:
                return source.read("train")
    if "train" not in have:
        raise _missing(source, split, "train")
    return _divide(source.read("train"), split, with_test=False)


def _missing(source: Source, split: str, wanted: str) -> ValueError:
    have = ", ".join(sorted(source.parts))
    return ValueError(f"{source.name}: no {split} split: it has only {have}; it needs a part called '{wanted}'")


def _divide(whole: ImageData, split: Split, with_test: bool) -> ImageData:
    """The share of `whole` that belongs to `split`; the three shares are disjoint and cover it."""
    n = len(whole)
    n_test = max(1, round(HELD_OUT_FRACTION * n)) if with_test else 0
    n_calibration = min(max(1, round(HELD_OUT_FRACTION * n)), MAX_CALIBRATION)
    if n_test + n_calibration >= n:
        raise ValueError(f"{whole.name}: {n} images are too few to make a {split} split from")
    order = np.argsort(stratified_position(whole.labels, seed=_SEED), kind="stable")
    bounds = {
        "test": (0, n_test),
        "calibration": (n_test, n_test + n_calibration),
        "train": (n_test + n_calibration, n),
    }
    start, stop = bounds[split]
    return Subset(whole, np.sort(order[start:stop]), name=f"{whole.name} ({split} share)")
