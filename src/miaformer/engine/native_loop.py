"""The loop itself. Importing this module takes numba; the first call compiles it, in seconds, and keeps the result."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from miaformer.engine.controller import LOGIT_BOUND

_BOUND = np.float32(LOGIT_BOUND)
_EPS = np.float32(1e-5)  # layer_norm's
_ZERO, _ONE = np.float32(0), np.float32(1)


def _compiled(function: Any) -> Any:
    # Sums may be reordered, so that they become vectors; infinities keep their meaning.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to that would keep it
        return numba.njit(**options)(function)


def _float(value):  # type: ignore[no-untyped-def]
    """A float32 as it is; a bfloat16, given by its bits, as a float32."""


@overload(_float, inline="always")
def _(value):  # type: ignore[no-untyped-def]  # numba compares the two signatures
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@_compiled
def _normalise(x: Any) -> None:
    """layer_norm of x (C,), in place."""
    total = _ZERO
    for i in range(x.size):
        total += x[i]
    mean = total / np.float32(x.size)
    square = _ZERO
    for i in range(x.size):
        square += (x[i] - mean) * (x[i] - mean)
    scale = _ONE / np.sqrt(square / np.float32(x.size) + _EPS)
    for i in range(x.size):
        x[i] = (x[i] - mean) * scale


@_compiled
def _logits(
    x: Any,
    active: Any,
    prefix: int,
    pooled: Any,
    price: Any,
    outputs: Any,
    bias: Any,
    bounds: Any,
    gain: Any,
    shift: Any,
) -> Any:
    """Logits (J,) of one image x (P+N, C), and the direction (C,) that its tokens are compared with."""
    num_rows, dim = x.shape
    seen = np.zeros((2, dim), np.float32)  # means of active patch tokens and of prefix tokens
    count = 0
    for row in range(prefix, num_rows):
        if active[row - prefix]:
            count += 1
            for i in range(dim):
                seen[0, i] += _float(x[row, i])
    for row in range(prefix):
        for i in range(dim):
            seen[1, i] += _float(x[row, i])
    for i in range(dim):
        seen[0, i] /= np.float32(max(count, 1))
        seen[1, i] = seen[1, i] / np.float32(prefix) if prefix else seen[0, i]
    _normalise(seen[0])
    _normalise(seen[1])

    hidden = price.copy()
    for half in range(2):
        for i in range(dim):
            value = seen[half, i]
            weights = pooled[half * dim + i]
            for k in range(hidden.size):
                hidden[k] += value * weights[k]
    out = bias.copy()
    for k in range(hidden.size):
        # Twice GELU, as in `Formula`.
        value = hidden[k] * (_ONE + np.float32(math.erf(hidden[k] * np.float32(math.sqrt(0.5)))))
        weights = outputs[k]
        for j in range(out.size):
            out[j] += value * weights[j]
    count = gain.size
    logits = np.empty(count, np.float32)
    difficulty = np.tanh(out[count] / bounds[count])
    for j in range(count):
        logits[j] = np.tanh(out[j] / bounds[j]) * bounds[j] + difficulty * gain[j] + shift[j]
    return logits, out[count + 1 :]


@_compiled
def _score(x: Any, active: Any, prefix: int, direction: Any, shared: Any, thresholds: Any, scores: Any) -> None:
    """Logits (N,) of the active patch tokens of one image x (P+N, C)."""
    num_rows, dim = x.shape
    size = np.float32(dim)
    for row in range(prefix, num_rows):
        if active[row - prefix]:
            total = _ZERO
            for i in range(dim):
                total += _float(x[row, i])
            mean = total / size
            square = product = _ZERO
            for i in range(dim):
                value = _float(x[row, i]) - mean
                square += value * value
                product += value * direction[i]
            bounded = np.tanh(product / np.sqrt(square / size + _EPS) / _BOUND) * _BOUND
            scores[row - prefix] = bounded + shared + thresholds[row - prefix]


@_compiled
def _keep_tokens(scores: Any, active: Any, prefix: int, multiple: int, kept: Any) -> None:
    """Keep the tokens (N,) that are likelier kept than not, and round up as `deciding.rounded_up` does."""
    count = 0
    for token in range(kept.size):
        if active[token] and scores[token] > _ZERO:
            kept[token] = True
            count += 1
    if count == 0:
        return
    for _ in range(-(count + prefix) % multiple):
        best = -1
        for token in range(kept.size):
            if active[token] and not kept[token] and (best < 0 or scores[token] > scores[best]):
                best = token
        if best < 0:
            return
        kept[best] = True


@_compiled
def _keep_heads(logits: Any, nested: bool, kept: Any) -> None:
    """Keep the heads (H,) that are likelier kept than not, at least one; nested, up to the first that is not."""
    best = 0
    for head in range(kept.size):
        kept[head] = logits[head] > _ZERO
        if logits[head] > logits[best]:
            best = head
    if not nested:
        kept[best] = True
        return
    kept[0] = True
    for head in range(1, kept.size):
        kept[head] = kept[head] and kept[head - 1]


@_compiled
def decide(
    x: Any,
    active: Any,
    prefix: int,
    nested: bool,
    scores_tokens: bool,
    multiple: int,
    thresholds: Any,
    pooled: Any,
    price: Any,
    outputs: Any,
    outputs_bias: Any,
    bounds: Any,
    gain: Any,
    shift: Any,
    depth: Any,
    heads: Any,
    kept: Any,
    scores: Any,
) -> None:
    """Images x (B, P+N, C), one by one. depth: (B,), what can be paid for, and then what is decided."""
    for image in range(len(x)):
        own = image if len(price) > 1 else 0
        logits, direction = _logits(
            x[image], active[image], prefix, pooled, price[own], outputs, outputs_bias, bounds, gain, shift[own]
        )
        if not (depth[image] and logits[0] > _ZERO):
            depth[image] = False
            continue
        _keep_heads(logits[1 : 1 + heads.shape[1]], nested, heads[image])
        if scores_tokens:
            _score(x[image], active[image], prefix, direction, logits[-1], thresholds, scores[image])
            _keep_tokens(scores[image], active[image], prefix, multiple, kept[image])
        else:
            kept[image] = active[image]
