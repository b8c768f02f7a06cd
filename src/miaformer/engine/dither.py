"""Ordered dithering of tokens (Bayer 1973): where an image keeps a share of its tokens, they lie evenly over it.

Controllers say with what probability a token is kept. Decided token by token, equal probabilities would keep all or
none, and independent draws leave gaps: on CIFAR-10 a third of the tokens says 3 points less if drawn at random than if
spread evenly (docs/log.md). So a token is kept where its probability is above a threshold of its own, and thresholds
are spread evenly, over 0 to 1 and over the image.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray


@cache
def dither(rows: int, columns: int) -> NDArray[np.float32]:
    """What the threshold of each token adds to its logit: (rows * columns,), in the order of patch tokens.

    A token is kept where logit + dither > 0: its probability is above its threshold.
    """
    rank = _ranks(rows, columns)
    threshold = (rank + 0.5) / len(rank)
    found: NDArray[np.float32] = (np.log1p(-threshold) - np.log(threshold)).astype(np.float32)
    found.flags.writeable = False
    return found


def evenly(rows: int, columns: int, share: float) -> NDArray[np.bool_]:
    """The tokens (rows * columns,) of which a share is kept, the lowest thresholds first."""
    rank = _ranks(rows, columns)
    kept: NDArray[np.bool_] = rank < round(share * len(rank))
    return kept


@cache
def _ranks(rows: int, columns: int) -> NDArray[np.int64]:
    """The place of each token in the order of thresholds, by Bayer's matrix."""
    matrix = np.zeros((1, 1))
    while len(matrix) < max(rows, columns):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    order = matrix[:rows, :columns].ravel()
    return order.argsort().argsort()
