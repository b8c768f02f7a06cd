"""From what a controller says to gates, block by block, at inference.

Twice: as a loop compiled for processors (`native`), and by operations of PyTorch and numpy, on any device, in any
dtype, where decisions are drawn, and where somebody counts operations. Products run where the tokens are; the rules, a
dozen numbers an image, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from miaformer.engine import native
from miaformer.engine.controller import Formula, token_scores
from miaformer.engine.decisions import Booleans, HostGates, from_host, likelier_heads
from miaformer.engine.walk import State

Noise = Callable[..., NDArray[np.float32]]  # of a shape, to be added to logits


def decide(state: State, formula: Formula, token_multiple: int, noise: Noise | None) -> HostGates:
    """The gates of a block. formula: of its controller. token_multiple: rows of an image are rounded up to it, with the
    likeliest of the other tokens, as far as there are any. noise: None takes what is likelier kept than not.
    """
    active = state.active.numpy()
    affordable = None if state.affordable is None else state.affordable.numpy()
    prefix = state.num_prefix_tokens
    effective = bool(prefix) and affordable is None  # otherwise an image may have no row left, or not pay
    if noise is not None or not native.can_decide(state.x):
        return HostGates(*_by_operations(state, formula, active, affordable, token_multiple, noise), effective)
    looped = native.decide(state.x, active, affordable, prefix, state.num_heads, token_multiple, formula, state.grid)
    return HostGates(*looped, effective)


@torch.no_grad()
def _by_operations(
    state: State,
    formula: Formula,
    active: Booleans,
    affordable: Booleans | None,
    token_multiple: int,
    noise: Noise | None,
) -> tuple[Booleans, Booleans, Booleans, NDArray[Any] | None]:
    """Depth (B,), heads (B, H), tokens (B, N) and the logits of these, -inf where none was asked for."""
    x, prefix = state.x.to(formula.pooled.dtype), state.num_prefix_tokens
    everything = bool(active.all())
    if len(x) == 1:  # one gather serves twice
        rows = x[0, prefix:] if everything else _rows(x, active, prefix)
        pooled = rows.sum(dim=0, keepdim=True) / max(len(rows), 1)
    else:
        pooled = x[:, prefix:].mean(dim=1) if everything else _mean_of_active(x, active, prefix)
    prefix_mean = pooled if not prefix else x[:, 0] if prefix == 1 else x[:, :prefix].mean(dim=1)
    content, direction = formula.content(pooled, prefix_mean)
    logits = formula.logits(content).cpu().numpy()
    if noise is not None:  # not of what tokens share: they are drawn one by one
        logits[:, : 1 + state.num_heads] += noise(len(logits), 1 + state.num_heads)
    depth = logits[:, 0] > 0
    if affordable is not None:
        depth &= affordable
    heads = likelier_heads(logits[:, 1 : 1 + state.num_heads], formula.nested)
    if not depth.all():
        heads, active = heads & depth[:, None], active & depth[:, None]
    if not formula.decides_tokens or not depth.any():
        return depth, heads, active, None
    image, token = active.nonzero()
    if len(x) > 1:
        rows, direction = _rows(x, active, prefix)[:, None], direction[from_host(image, x.device)]
    else:
        direction = direction[0]
    shared = logits[image, -1] + formula.thresholds(state.grid)[token]
    if noise is not None:
        shared = shared + noise(*active.shape)[image, token]
    scores = np.full(active.shape, -np.inf, dtype=logits.dtype)
    scores[active] = token_scores(rows, direction).flatten().cpu().numpy() + shared
    kept = scores > 0
    if token_multiple > 1:
        kept = rounded_up(kept, scores, prefix, token_multiple)
    return depth, heads, kept, scores


def _rows(x: Tensor, patches: Booleans, num_prefix_tokens: int) -> Tensor:
    """Rows (T, C) of the patch tokens (B, N) that are True. x: (B, P+N, C)."""
    image, token = patches.nonzero()
    rows = from_host(image * x.shape[1] + token + num_prefix_tokens, x.device)
    return x.reshape(-1, x.shape[2]).index_select(0, rows)


def _mean_of_active(x: Tensor, active: Booleans, num_prefix_tokens: int) -> Tensor:
    """Mean (B, C) of the active patch tokens (B, N), zero where there is none. x: (B, P+N, C)."""
    image, token = active.nonzero()
    rows = from_host(image * x.shape[1] + token + num_prefix_tokens, x.device)
    counts = active.sum(axis=1)
    starts = from_host(counts.cumsum() - counts, x.device)
    return F.embedding_bag(rows, x.reshape(-1, x.shape[2]), starts, mode="mean")


def rounded_up(kept: Booleans, scores: NDArray[Any], num_prefix_tokens: int, multiple: int) -> Booleans:
    """`kept` (B, N) and the best of the other tokens that have a score, as many as make the rows a multiple."""
    count = kept.sum(axis=1)
    wanted = -(-(count + num_prefix_tokens) // multiple) * multiple - num_prefix_tokens
    short = np.flatnonzero((wanted > count) & (count > 0))
    if not len(short):
        return kept
    kept = kept.copy()
    for image in short:
        best = np.argsort(-scores[image], kind="stable")[: max(int(wanted[image]), 0)]
        kept[image, best] = np.isfinite(scores[image, best])
    return kept
