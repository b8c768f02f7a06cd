"""What a run gives: answers, and what was executed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from miaformer.engine.decisions import Decisions


@dataclass(frozen=True)
class Trace(Decisions):
    """The decisions that were executed, and what they cost. A skipped block shows no head and no token.

    Of an image that was looked at twice: the decisions of the second look, and the MACs of both. Of an image that was
    looked at in a smaller size the first rows x columns tokens of `grid` are its own, the others are False.
    """

    macs: Tensor  # (B,) int64
    macs_fraction: Tensor  # (B,) float32, of the backbone's MACs
    looks: Tensor  # (B,) int64: 1, or 2 where the first answer was not confident
    grid: Tensor  # (B, 2) int64, rows and columns of patch tokens


@dataclass(frozen=True)
class Output:
    logits: Tensor  # (B, classes)
    trace: Trace
    features: Tensor | None = None  # (B, num_features), what the classifier reads, where they were asked for


def in_turn(parts: Sequence[tuple[Tensor, Output]]) -> Output:
    """Outputs of parts of a batch as one. parts: the images (n,) of each, every image in one of them."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([images for images, _ in parts]).argsort()

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))[order.to(values[0].device)]

    traces = [output.trace for _, output in parts]
    names = [field.name for field in fields(Trace)]
    trace = Trace(*(joined([getattr(one, name) for one in traces]) for name in names))
    features = [output.features for _, output in parts if output.features is not None]
    return Output(joined([output.logits for _, output in parts]), trace, joined(features) if features else None)


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
        put(one.grid, other.grid),
    )
    features = None
    if first.features is not None and second.features is not None:
        features = put(first.features, second.features)
    return Output(put(first.logits, second.logits), trace, features)
