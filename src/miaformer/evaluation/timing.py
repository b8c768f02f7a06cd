"""Time against dense: in turn, pair by pair, so that a machine that slows down slows both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from miaformer.model import MIAFormer
from miaformer.policy import Policy


@dataclass(frozen=True)
class PairTimes:
    """Medians over the pairs, in ms; `time_fraction` is the median of each pair's own sparse / dense."""

    dense_ms: float
    sparse_ms: float
    time_fraction: float


def time_pairs(
    dense_call: Callable[[], Any], sparse_call: Callable[[], Any], repeats: int = 5, warm_up: int = 2
) -> PairTimes:
    """Time two calls in turn, `repeats` pairs after `warm_up` untimed ones. Waits for CUDA's work to end."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r} must be at least 1")
    for _ in range(warm_up):
        dense_call()
        sparse_call()
    pairs = [(_milliseconds(dense_call), _milliseconds(sparse_call)) for _ in range(repeats)]
    return PairTimes(
        median(dense for dense, _ in pairs),
        median(sparse for _, sparse in pairs),
        median(sparse / dense for dense, sparse in pairs),
    )


def _milliseconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1000


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_against_dense(
    model: MIAFormer, batches: Sequence[Tensor], policy: Policy, cap: float | None = None, repeats: int = 5
) -> dict[str, float]:
    """How a policy's compute and time compare with the static backbone's, eager, on the same batches.

    batches: (B, 3, H, W) each, of equal size. Images differ in compute, so every batch is timed for itself
    and the times of all are added up: `ms` and `dense_ms` a batch, `time_fraction` their quotient,
    `macs_fraction` the mean over images, `efficiency` = MACs fraction / time fraction (1.0: saved MACs became
    saved time).
    """
    if not batches:
        raise ValueError("time_against_dense() was given no batches")
    training = model.training
    model.eval()
    dense_ms = sparse_ms = macs_fraction = 0.0
    with torch.inference_mode():
        for images in batches:

            def dense(images: Tensor = images) -> Tensor:
                return cast(Tensor, model.backbone(images))

            def sparse(images: Tensor = images) -> Tensor:
                return model.run(images, policy=policy, cap=cap).trace.macs_fraction

            times = time_pairs(dense, sparse, repeats, warm_up=1)
            macs_fraction += sparse().double().mean().item()
            dense_ms += times.dense_ms
            sparse_ms += times.sparse_ms
    model.train(training)
    count, time_fraction = len(batches), sparse_ms / dense_ms
    return {
        "batch": len(batches[0]),
        "ms": sparse_ms / count,
        "dense_ms": dense_ms / count,
        "time_fraction": time_fraction,
        "macs_fraction": macs_fraction / count,
        "efficiency": macs_fraction / count / time_fraction,
    }
