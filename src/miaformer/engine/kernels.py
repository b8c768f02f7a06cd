"""Which kernels compute float32 products fastest on this processor, PyTorch's own or oneDNN's: measured, not guessed.

It depends on the processor, on the number of threads and on the shapes (docs/log.md). So it is raced at a few shapes
when a machine first runs a model, which takes a second or two, and what was found is kept in the user's cache.
MIAFORMER_PRODUCTS says it instead: `pytorch` or `onednn`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.races import cache_folder, remembered

POINTWISE: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None where PyTorch was built without oneDNN
GIVEN = ("pytorch", "onednn")
LEAST_MACS = 6_000_000  # of a product with a plain weight: below, a call's 30 us against 6 are not regained
WIDTHS, ROWS = (192, 384, 768), (16, 64, 196)  # that are raced: the MLPs of ViT-Ti, -S and -B
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 25  # of calls of each kind: until the two fastest of each agree
_AGREE = 1.1
_COLD = 48 << 20  # bytes of weights that the layers of one race have: more than caches hold
_GAIN = 0.97  # oneDNN's time against PyTorch's, from which it is taken


@lru_cache(maxsize=4096)
def onednn_pays(rows: int, size: int, packed: bool, threads: int) -> bool:
    """Whether oneDNN is the faster one for float32 products of `rows` with a weight of `size` elements.

    packed: the weight is in the layout that oneDNN reads. Raises ValueError for an unknown MIAFORMER_PRODUCTS.
    """
    if not packed and rows * size < LEAST_MACS:
        return False
    given = os.environ.get("MIAFORMER_PRODUCTS")
    if given:
        if given not in GIVEN:
            raise ValueError(f"MIAFORMER_PRODUCTS must be one of {', '.join(GIVEN)}, got {given!r}")
        return given == "onednn"
    taken, shape = _measured(threads), f"{_nearest(WIDTHS, math.sqrt(size / 4))} x {_nearest(ROWS, max(rows, 1))}"
    return taken[f"{shape}, packed" if packed else f"{shape}, plain"] < _GAIN * taken[f"{shape}, pytorch"]


def _nearest(values: tuple[int, ...], value: float) -> int:
    return min(values, key=lambda one: abs(math.log(one / value)))


@cache
def _measured(threads: int) -> dict[str, float]:
    """Seconds by width, rows and kind, of what each kind makes of an MLP."""
    names = {f"{width} x {rows}, {kind}" for width in WIDTHS for rows in ROWS for kind in _KINDS}

    def measured() -> dict[str, float]:
        torch.set_num_threads(threads)  # each thread of Python's has a number of its own
        return remembered(cache_folder() / "products.json", "products", names, race)

    with ThreadPoolExecutor(1) as thread:  # where nobody counts operations, and none of the caller's modes holds
        return thread.submit(measured).result()


@torch.inference_mode()
def race() -> dict[str, float]:
    """Least seconds of several calls, in turn, each with another layer's weights: a model's are never in a cache.

    A machine that is busy elsewhere makes calls longer, never shorter: so they are repeated until the least is sure.
    """
    taken: dict[str, float] = {}
    for width in WIDTHS:
        weights = 2 * 4 * width**2
        layers = [_layer(width) for _ in range(max(len(_KINDS) + 1, _COLD // (4 * weights)))]
        packed = [(*_packed(first), *_packed(second)) for first, second in layers]
        for rows in ROWS:
            x, turn = torch.rand(rows, width), 0
            times: dict[str, list[float]] = {kind: [] for kind in _KINDS}
            while turn < _LEAST_ROUNDS * len(_KINDS) or (turn < _MOST_ROUNDS * len(_KINDS) and not _steady(times)):
                for kind, mlp in _KINDS.items():
                    first, second = layers[turn % len(layers)]
                    layer = packed[turn % len(layers)] if kind == "packed" else (*first, *second)
                    start = time.perf_counter()
                    mlp(x, *layer)
                    times[kind].append(time.perf_counter() - start)
                    turn += 1
            taken |= {f"{width} x {rows}, {kind}": min(own) for kind, own in times.items()}
    return taken


def _steady(times: dict[str, list[float]]) -> bool:
    return all(second < _AGREE * first for first, second in (sorted(own)[:2] for own in times.values()))


Layer = tuple[Tensor, Tensor]  # weight and bias


def _layer(width: int) -> tuple[Layer, Layer]:
    first, second = torch.rand(4 * width, width), torch.rand(width, 4 * width)
    return (first, torch.rand(4 * width)), (second, torch.rand(width))


def _packed(layer: Layer) -> Layer:
    weight, bias = layer
    return torch.ops.mkldnn._reorder_linear_weight(weight), bias


def _in_pytorch(x: Tensor, weight: Tensor, bias: Tensor, second: Tensor, other: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, weight, bias)), second, other).add_(x)


def _in_onednn(x: Tensor, weight: Tensor, bias: Tensor, second: Tensor, other: Tensor) -> Tensor:
    hidden = POINTWISE.default(x, weight, bias, "gelu", [], "none")
    out: Tensor = POINTWISE.binary(hidden, x, second, other, "add")
    return out


_KINDS: dict[str, Callable[..., Tensor]] = {"pytorch": _in_pytorch, "plain": _in_onednn, "packed": _in_onednn}
