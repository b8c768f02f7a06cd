"""Seeds of independent streams of random numbers."""

from __future__ import annotations

import zlib

import numpy as np


def stream_seed(*names: int | str) -> int:
    """For a generator whose numbers have nothing to do with those of any other names.

    To be used in place of arithmetic: PyTorch's CPU generator takes the lowest 32 bits of its seed and drops the rest,
    without a word.
    """
    numbers = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
