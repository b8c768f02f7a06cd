"""What a run gives: answers, and what was executed for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from miaformer.decisions import Decisions


@dataclass(frozen=True)
class Trace(Decisions):
    """The decisions that were executed, and what they cost. A skipped block shows no head and no token.

    Of an image that was looked at twice: the decisions of the second look, and the MACs of both.
    """

    macs: Tensor  # (B,) int64
    macs_fraction: Tensor  # (B,) float32, of the backbone's MACs
    looks: Tensor  # (B,) int64: 1, or 2 where the first answer was not confident


@dataclass(frozen=True)
class Output:
    logits: Tensor  # (B, classes)
    trace: Trace


def merged(first: Output, again: Tensor, second: Output) -> Output:
    """Both looks as one output. again: (n,), the images of the first one that had the second."""

    def put(one: Tensor, other: Tensor) -> Tensor:
        return one.index_copy(0, again.to(one.device), other.to(one.device))

    def added(one: Tensor, other: Tensor) -> Tensor:
        return one.index_add(0, again.to(one.device), other.to(one.device))

    one, other = first.trace, second.trace
    trace = Trace(
        put(one.depth, other.depth),
        put(one.heads, other.heads),
        put(one.tokens, other.tokens),
        added(one.macs, other.macs),
        added(one.macs_fraction, other.macs_fraction),
        added(one.looks, other.looks),
    )
    return Output(put(first.logits, second.logits), trace)
