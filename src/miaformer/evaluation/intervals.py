"""Bootstrap intervals over images: 95 %, of means."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RESAMPLES = 2000


def resampled(num_images: int, seed: int = 0) -> Array:
    """How often (RESAMPLES, n) each image is drawn in each resample: of one call, differences are paired."""
    counts = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES)
    return counts.astype(np.float32)


def interval(values: Array, weights: Array, among: Array | None = None) -> list[float]:
    """Of the mean of values (n,), over the images that weights (RESAMPLES, n) draw, or those of them `among` (n,)."""
    if among is not None:
        weights, values = weights[:, among], values[among]
    means = weights @ values.astype(np.float32) / np.maximum(weights.sum(axis=1), 1)
    return [float(end) for end in np.quantile(means, (0.025, 0.975))]
