"""`digits`: a small, real, built-in data set whose images differ in difficulty.

Scikit-learn's 1,797 handwritten digits (8 x 8, Alpaydin & Kaynak 1998) are each drawn several times on a grey
canvas: off-centre, slightly turned, at different sizes and contrasts, with noise and light clutter, faint
fragments of *train* digits. Train images are drawn harder than the others, as augmentation makes them elsewhere: what
decides how much compute an image gets has to have seen images that need it. How much training a small ViT needs is set
by the styles below, above all by how far a digit may lie from the centre (docs/log.md has the trials).

Everything is drawn from fixed seeds. Splits are by digit, so no digit is seen in two splits, and use only
operations that are exact on every machine; rendering is integer arithmetic but for Pillow's placing of the digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from miaformer.data.extras import require
from miaformer.data.source import ImageData, Split, check_split
from miaformer.data.splits import stratified_position

SIZE = 20  # canvas side, px
RENDERINGS_TRAIN = 24  # per digit
SIZES_HELD_OUT = (16, 17)  # px; calibration and test digits are drawn once at each
FRACTION_TEST, FRACTION_CALIBRATION = 0.25, 0.15  # of the 1,797 digits; train has the other 60 %

_SEED = 1797
_MARGIN = 2  # empty px around the 8 x 8 digit, so that bicubic taps fall off smoothly
_BACKGROUND = (64, 112)  # grey levels, one draw a canvas
_FRAGMENT = 6  # px, side of a clutter fragment on the canvas
_N_BANK = 512  # distinct fragments
_STREAM = {"train": 1, "calibration": 2, "test": 3}

Array = NDArray[Any]


@dataclass(frozen=True)
class _Style:
    """How a split is drawn."""

    contrast: tuple[int, int]  # grey levels from background to full ink, one draw a canvas
    noise: int  # grey levels, either way, one draw a pixel
    n_fragments: int  # drawn per canvas, of which a third have zero strength
    strength: int  # of a fragment at most, in 256ths of full ink
    angle: float  # degrees at most, either way
    stretch: float  # of width against height at most, either way
    shear: float  # at most, either way


_SIZES_TRAIN = (12, 18)  # px
_TRAIN = _Style(contrast=(45, 140), noise=5, n_fragments=2, strength=140, angle=14, stretch=0.15, shear=0.2)
_HELD_OUT = _Style(contrast=(110, 140), noise=4, n_fragments=1, strength=70, angle=2, stretch=0, shear=0)


class Digits(ImageData):
    """Rendered digits of one split, held as one uint8 array.

    `pixels` is (n, SIZE, SIZE) uint8, grey; `labels` (n,) int64; `digit` (n,) int64 says which of the 1,797
    digits is shown; `size_px` (n,) float64 is its drawn size in pixels.
    """

    def __init__(self, split: Split) -> None:
        check_split(split)
        self.name = f"digits/{split}"
        self.classes = [str(c) for c in range(10)]
        self.pixels: Array
        self.pixels, self.labels, self.digit, self.size_px = (array.copy() for array in _drawn(split))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


@cache
def _drawn(split: Split) -> tuple[Array, Array, Array, Array]:
    """Pixels, labels, digits and sizes of a split. Kept, for drawing the train split takes over a second."""
    digits, labels = _load()
    members = digit_split(labels)
    rng = np.random.Generator(np.random.PCG64([_SEED, _STREAM[split]]))
    if split == "train":
        which = np.repeat(members[split], RENDERINGS_TRAIN)
        style, (smallest, largest) = _TRAIN, _SIZES_TRAIN
        size_px: Array = smallest + (largest - smallest) * rng.random(len(which))
    else:
        which = np.repeat(members[split], len(SIZES_HELD_OUT))
        style = _HELD_OUT
        size_px = np.tile(np.asarray(SIZES_HELD_OUT, dtype=np.float64), len(members[split]))
    bank = _fragment_bank(digits[members["train"]])
    return _render(digits, which, size_px, bank, style, rng), labels[which], which, size_px


def digit_split(labels: Array) -> dict[str, Array]:
    """Which of the 1,797 digits belong to each split, stratified: name -> sorted digit numbers, int64."""
    order = np.argsort(stratified_position(labels, seed=_SEED), kind="stable")
    n_test = round(FRACTION_TEST * len(labels))
    n_held_out = n_test + round(FRACTION_CALIBRATION * len(labels))
    parts = {"test": order[:n_test], "calibration": order[n_test:n_held_out], "train": order[n_held_out:]}
    return {name: np.sort(part) for name, part in parts.items()}


def _load() -> tuple[Array, Array]:
    """The 1,797 digits as (1797, 8, 8) uint8 in 0..255, and their labels (1797,) int64."""
    bunch = require("sklearn.datasets", "miaformer[digits]").load_digits()
    return np.minimum(bunch.images * 16, 255).astype(np.uint8), bunch.target.astype(np.int64)


def _render(digits: Array, which: Array, size_px: Array, bank: Array, style: _Style, rng: np.random.Generator) -> Array:
    """Draw digit `which[i]` at `size_px[i]` on canvas i, over clutter. Returns (n, SIZE, SIZE) uint8."""
    n = len(which)
    glyphs = [Image.fromarray(glyph) for glyph in np.pad(digits, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))]
    reach = np.abs(SIZE - size_px) / 2
    centre = SIZE / 2 + reach[:, None] * (2 * rng.random((n, 2)) - 1)
    angle, stretch, shear = (
        most * (2 * rng.random(n) - 1) for most in (math.radians(style.angle), style.stretch, style.shear)
    )
    ink = np.empty((n, SIZE, SIZE), dtype=np.uint8)
    for i in range(n):
        placement = _inverse_affine(size_px[i] / 8, angle[i], stretch[i], shear[i], centre[i], 4 + _MARGIN)
        ink[i] = glyphs[which[i]].transform((SIZE, SIZE), Image.Transform.AFFINE, placement, Image.Resampling.BICUBIC)
    np.maximum(ink, _clutter(bank, n, style, rng), out=ink)

    # In 1/256 grey levels, as integers: exact everywhere.
    background = _uniform(rng, (n, 1, 1), *_BACKGROUND)
    contrast = _uniform(rng, (n, 1, 1), *style.contrast) >> 8
    canvas = ink * contrast
    canvas += background
    canvas += _uniform(rng, (n, SIZE, SIZE), -style.noise, style.noise)
    return np.clip(canvas >> 8, 0, 255).astype(np.uint8)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Uniform grey levels in [low, high), as int32 in units of 1/256 level."""
    drawn: Array = (rng.random(shape, dtype=np.float32) * np.float32((high - low) * 256)).astype(np.int32)
    return drawn + np.int32(low * 256)


def _inverse_affine(
    scale: float, angle: float, stretch: float, shear: float, centre: Array, source_centre: float
) -> tuple[float, ...]:
    """Pillow's AFFINE coefficients for a glyph scaled, stretched, sheared, turned by `angle` rad, moved to (x, y)."""
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    wide = 1 + stretch
    xx, xy = (cos - shear * sin) / wide, (sin + shear * cos) / wide
    yx, yy = -sin * wide, cos * wide
    x, y = float(centre[0]), float(centre[1])
    return (xx, xy, source_centre - xx * x - xy * y, yx, yy, source_centre - yx * x - yy * y)


def _fragment_bank(train_digits: Array) -> Array:
    """Pieces of train digits, 4 x 4 enlarged: (_N_BANK, _FRAGMENT, _FRAGMENT) uint8."""
    rng = np.random.Generator(np.random.PCG64([_SEED, 0]))
    bank = np.empty((_N_BANK, _FRAGMENT, _FRAGMENT), dtype=np.uint8)
    for fragment, (digit, y, x) in zip(
        bank, (rng.random((_N_BANK, 3)) * [len(train_digits), 5, 5]).astype(int), strict=True
    ):
        piece = Image.fromarray(np.pad(train_digits[digit, y : y + 4, x : x + 4], 1))
        fragment[:] = np.asarray(piece.resize((_FRAGMENT, _FRAGMENT), Image.Resampling.BICUBIC))
    return bank


def _clutter(bank: Array, n: int, style: _Style, rng: np.random.Generator) -> Array:
    """Fragments strewn over n canvases, each at its own strength: (n, SIZE, SIZE) uint8."""
    canvas = np.zeros((n, SIZE, SIZE), dtype=np.uint8)
    image = np.arange(n)[:, None, None]
    offset = np.arange(_FRAGMENT)
    for _ in range(style.n_fragments):
        strength = np.maximum(0, style.strength * (1.5 * rng.random(n) - 0.5)).astype(np.uint16)
        picked = bank[(rng.random(n) * len(bank)).astype(np.int64)] * strength[:, None, None] >> 8
        corner = (rng.random((n, 2)) * (SIZE - _FRAGMENT + 1)).astype(np.int64)
        where = (
            image,
            corner[:, :1, None] + offset[None, :, None],
            corner[:, 1:, None] + offset[None, None, :],
        )
        canvas[where] = np.maximum(canvas[where], picked)
    return canvas
