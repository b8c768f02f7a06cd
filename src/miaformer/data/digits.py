"""`digits`: a small, real, embedded data set whose images differ in difficulty.

Scikit-learn's 1,797 handwritten digits (8 x 8, Alpaydin & Kaynak 1998) are each drawn several times,
off-centre, at two sizes, on a grey 32 x 32 canvas with light clutter: fragments of *train* digits, fainter
than the digit, and a little noise. Small, faint and cluttered ones are hard; big and clear ones are easy.
That is what an adaptive model needs to be tested on.

Everything is drawn from fixed seeds. Splits are by digit, so no digit is seen in two splits, and use only
operations that are exact on every machine; rendering is integer arithmetic but for Pillow's placing of the
digit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from miaformer.data.extras import require
from miaformer.data.source import ImageData, Split, check_split
from miaformer.data.splits import stratified_position

SIZE = 32  # canvas side, px
RENDERINGS_TRAIN = 16  # per digit
SIZES_HELD_OUT = (14, 20)  # px; calibration and test digits are drawn once at each
MAX_OFFSET = 5.0  # px, of a digit from the centre of its canvas, along each axis
FRACTION_TEST, FRACTION_CALIBRATION = 0.25, 0.15  # of the 1,797 digits; train has the other 60 %

_SEED = 1797
_MARGIN = 2  # empty px around the 8 x 8 digit, so that bicubic taps fall off smoothly
_MAX_ANGLE = math.radians(12)
_BACKGROUND = (64, 112)  # grey levels, one draw a canvas
_CONTRAST = (45, 135)  # grey levels from background to full ink, one draw a canvas
_NOISE = 7  # grey levels, either way, one draw a pixel
_FRAGMENT = 8  # px, side of a clutter fragment on the canvas
_N_FRAGMENTS = 4  # drawn per canvas, of which some have zero strength
_N_BANK = 512  # distinct fragments
_STREAM = {"train": 1, "calibration": 2, "test": 3}

Array = NDArray[Any]


class Digits(ImageData):
    """Rendered digits of one split, held as one uint8 array.

    `pixels` is (n, 32, 32) uint8, grey; `labels` (n,) int64; `digit` (n,) int64 says which of the 1,797
    digits is shown; `size_px` (n,) float64 is its drawn size in pixels.
    """

    def __init__(self, split: Split) -> None:
        check_split(split)
        digits, labels = _load()
        self.name = f"digits/{split}"
        self.classes = [str(c) for c in range(10)]
        members = digit_split(labels)
        per_digit = RENDERINGS_TRAIN if split == "train" else len(SIZES_HELD_OUT)
        self.digit: Array = np.repeat(members[split], per_digit)
        self.labels = labels[self.digit]
        rng = np.random.Generator(np.random.PCG64([_SEED, _STREAM[split]]))
        if split == "train":
            smallest, largest = SIZES_HELD_OUT[0] - 1, SIZES_HELD_OUT[1] + 1
            self.size_px: Array = smallest + (largest - smallest) * rng.random(len(self.digit))
        else:
            self.size_px = np.tile(np.asarray(SIZES_HELD_OUT, dtype=np.float64), len(members[split]))
        self.pixels = _render(digits, self.digit, self.size_px, _fragment_bank(digits[members["train"]]), rng)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])


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


def _render(digits: Array, which: Array, size_px: Array, bank: Array, rng: np.random.Generator) -> Array:
    """Draw digit `which[i]` at `size_px[i]` on canvas i, over clutter. Returns (n, 32, 32) uint8."""
    n = len(which)
    glyphs = [Image.fromarray(glyph) for glyph in np.pad(digits, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))]
    reach = np.minimum((SIZE - size_px) / 2, MAX_OFFSET)
    centre = SIZE / 2 + reach[:, None] * (2 * rng.random((n, 2)) - 1)
    angle = _MAX_ANGLE * (2 * rng.random(n) - 1)
    ink = np.empty((n, SIZE, SIZE), dtype=np.uint8)
    for i in range(n):
        placement = _inverse_affine(size_px[i] / 8, angle[i], centre[i], source_centre=4 + _MARGIN)
        ink[i] = glyphs[which[i]].transform((SIZE, SIZE), Image.Transform.AFFINE, placement, Image.Resampling.BICUBIC)
    np.maximum(ink, _clutter(bank, n, rng), out=ink)

    # In 1/256 grey levels, as integers: exact everywhere. The sum stays below 255.
    background = _uniform(rng, (n, 1, 1), *_BACKGROUND)
    contrast = _uniform(rng, (n, 1, 1), *_CONTRAST) >> 8
    canvas = ink * contrast
    canvas += background
    canvas += _uniform(rng, (n, SIZE, SIZE), -_NOISE, _NOISE)
    return (canvas >> 8).astype(np.uint8)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Uniform grey levels in [low, high), as int32 in units of 1/256 level."""
    drawn: Array = (rng.random(shape, dtype=np.float32) * np.float32((high - low) * 256)).astype(np.int32)
    return drawn + np.int32(low * 256)


def _inverse_affine(scale: float, angle: float, centre: Array, source_centre: float) -> tuple[float, ...]:
    """Pillow's AFFINE coefficients for a glyph scaled, turned by `angle` rad and moved to `centre` (x, y)."""
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = float(centre[0]), float(centre[1])
    return (cos, sin, source_centre - cos * x - sin * y, -sin, cos, source_centre + sin * x - cos * y)


def _fragment_bank(train_digits: Array) -> Array:
    """Pieces of train digits, 4 x 4 enlarged to 8 x 8 px: (_N_BANK, _FRAGMENT, _FRAGMENT) uint8."""
    rng = np.random.Generator(np.random.PCG64([_SEED, 0]))
    bank = np.empty((_N_BANK, _FRAGMENT, _FRAGMENT), dtype=np.uint8)
    for fragment, (digit, y, x) in zip(
        bank, (rng.random((_N_BANK, 3)) * [len(train_digits), 5, 5]).astype(int), strict=True
    ):
        piece = Image.fromarray(np.pad(train_digits[digit, y : y + 4, x : x + 4], 1))
        fragment[:] = np.asarray(piece.resize((_FRAGMENT, _FRAGMENT), Image.Resampling.BICUBIC))
    return bank


def _clutter(bank: Array, n: int, rng: np.random.Generator) -> Array:
    """Fragments strewn over n canvases, each at 0 to 45 % of full ink: (n, 32, 32) uint8."""
    canvas = np.zeros((n, SIZE, SIZE), dtype=np.uint8)
    image = np.arange(n)[:, None, None]
    offset = np.arange(_FRAGMENT)
    for _ in range(_N_FRAGMENTS):
        strength = np.maximum(0, 172 * rng.random(n) - 57).astype(np.uint16)  # of 256; a third of them are absent
        picked = bank[(rng.random(n) * len(bank)).astype(np.int64)] * strength[:, None, None] >> 8
        corner = (rng.random((n, 2)) * (SIZE - _FRAGMENT + 1)).astype(np.int64)
        where = (
            image,
            corner[:, :1, None] + offset[None, :, None],
            corner[:, 1:, None] + offset[None, None, :],
        )
        canvas[where] = np.maximum(canvas[where], picked)
    return canvas
