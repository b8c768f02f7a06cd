"""Deciding a block as one loop over its images, compiled by numba: what `controller.Formula` and `deciding` say in some
forty operations, each of which takes longer to call than to compute where one image is run at a time.

Installed with the extra `fast`; without it PyTorch and numpy decide. `miaformer.engine.native.enabled = False`, or
MIAFORMER_NATIVE=0 in the environment, keeps to those.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from miaformer.engine.controller import Formula

Array = NDArray[Any]

enabled = os.environ.get("MIAFORMER_NATIVE", "1") != "0"


def can_decide(x: Tensor) -> bool:
    """Whether images x can be decided here: in memory, in a dtype that processors run models in."""
    return (
        enabled
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not is_in_torch_dispatch_mode()  # whoever watches operations, to count them, is shown PyTorch's
        and _loop() is not None
    )


def decide(
    x: Tensor,
    active: Array,
    affordable: Array | None,
    num_prefix_tokens: int,
    num_heads: int,
    token_multiple: int,
    formula: Formula,
    grid: tuple[int, int],
) -> tuple[Array, Array, Array, Array | None]:
    """Depth (B,), heads (B, H) and tokens (B, N) bool, and logits (B, N) of the tokens: -inf where none was asked for,
    None where the block decides none.

    x: (B, P+N, C); active: (B, N) bool; affordable: (B,) bool, None for all; formula: of the block's controller;
    grid: rows and columns of the patch tokens.
    """
    loop = _loop()
    assert loop is not None
    batch, patches = active.shape
    rows = x.detach().contiguous()
    depth = np.ones(batch, bool) if affordable is None else affordable.copy()
    heads = np.zeros((batch, num_heads), bool)
    kept = np.zeros((batch, patches), bool)
    scores = np.full((batch, patches), -np.inf, np.float32)
    loop(
        (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy(),
        np.ascontiguousarray(active),
        num_prefix_tokens,
        formula.nested,
        formula.decides_tokens,
        token_multiple,
        formula.thresholds(grid),
        *formula.arrays,
        depth,
        heads,
        kept,
        scores,
    )
    return depth, heads, kept, scores if formula.decides_tokens else None


@cache
def _loop() -> Callable[..., None] | None:
    try:
        found: Callable[..., None] = import_module("miaformer.engine.native_loop").decide
    except ImportError:
        return None
    return found
