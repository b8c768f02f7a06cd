"""Seeds of independent streams of random numbers."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def stream_seed(*names: int | str) -> int:
    """For a generator whose numbers have nothing to do with those of any other names.

    To be used in place of arithmetic: PyTorch's CPU generator takes the lowest 32 bits of its seed and drops the rest,
    without a word. Raises ValueError for numbers below 0.
    """
    negative = [name for name in names if isinstance(name, int) and name < 0]
    if negative:
        raise ValueError(f"seed {negative[0]} must be a whole number, 0 or more")
    numbers = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*names: int | str) -> None:
    """Python's, numpy's and torch's global generators, for what draws from them: new weights, dropout, mixup."""
    seed = stream_seed(*names)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup draws from the global generator
    torch.manual_seed(seed)
