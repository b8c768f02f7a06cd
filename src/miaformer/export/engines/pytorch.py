"""PyTorch: operation by operation, with packed weights, or compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaformer.export.engines.engine import Engine, EngineUnavailableError, first_line
from miaformer.model.model import MIAFormer
from miaformer.model.output import Output
from miaformer.model.policy import Full


class Eager(Engine):
    """Operation by operation."""

    name = "eager"

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None = None) -> Output:
        return self.model.run(images, budget=_shared(budgets), cap=None if caps is None else _shared(caps))

    def everything(self, images: Tensor) -> Output:
        """By the sparse engine, which on a CPU executes everything in less time than the backbone does."""
        return self.model.run(images, policy=Full())


def _shared(values: Sequence[float]) -> float | Sequence[float]:
    """One for all where they are the same: what controllers make of it is then computed once."""
    return values[0] if len(set(values)) == 1 else values


class Packed(Eager):
    """The same after `MIAFormer.prepack`: copies of the sparse model's weights in the layout that products read."""

    name = "packed"

    def __init__(self, model: MIAFormer, folder: Path | None = None) -> None:
        if next(model.parameters()).device.type != "cpu":
            raise EngineUnavailableError("weights are packed for processors only")
        with torch.inference_mode(False):
            twin = copy.deepcopy(model, {id(model.backbone): model.backbone})
        super().__init__(twin.prepack(), folder)


class Compiled(Engine):
    """torch.compile, dense: the whole backbone, for one batch shape after another."""

    name = "compile"
    mode: str | None = None
    warm_up = 1

    def dense(self, images: Tensor) -> Tensor:
        if images.shape not in self._compiled_for:
            try:
                for _ in range(self.warm_up):
                    self._compiled(images)
            except Exception as error:  # compilers have many errors
                raise EngineUnavailableError(f"torch.compile failed: {first_line(error)}") from error
            self._compiled_for.add(images.shape)
        logits: Tensor = self._compiled(images)
        return logits

    @cached_property
    def _compiled(self) -> Callable[[Tensor], Any]:
        return torch.compile(self.model.backbone, mode=self.mode, dynamic=False)

    @cached_property
    def _compiled_for(self) -> set[torch.Size]:
        return set()


class CudaGraphs(Compiled):
    """torch.compile's CUDA graphs, dense: all kernels of a batch launched at once."""

    name = "graphs"
    mode = "reduce-overhead"
    warm_up = 3  # compiled, recorded, replayed

    def __init__(self, model: MIAFormer, folder: Path | None = None) -> None:
        if next(model.parameters()).device.type != "cuda":
            raise EngineUnavailableError("CUDA graphs are run on CUDA only")
        super().__init__(model, folder)

    def dense(self, images: Tensor) -> Tensor:
        return super().dense(images).clone()  # the next call writes where this one's answer lies
