"""The interface of engines, and the error of one that cannot run something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from miaformer.model.model import MIAFormer
from miaformer.model.output import Output, Trace


class EngineUnavailableError(ValueError):
    """Why an engine cannot run something here."""


class Engine:
    """Runs one model: at budgets, or dense. Some can do only the latter.

    What takes its time once, such as compiling and exporting, is done by the first call of a kind.
    """

    name: ClassVar[str]

    def __init__(self, model: MIAFormer, folder: Path | None = None) -> None:
        """folder: where files that it makes are kept; None: the user's cache.

        Raises EngineUnavailableError where it cannot run the model at all.
        """
        self.model, self.folder = model, folder

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None = None) -> Output:
        """The learned policy. images: (B, 3, H, W), normalised, in the model's dtype; budgets, caps: (B,), fractions of
        the dense MACs. Raises EngineUnavailableError.
        """
        raise EngineUnavailableError("what to compute is decided on the host, block by block: no graph holds it")

    def dense(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the backbone: everything executed and no controller. Raises EngineUnavailableError."""
        return cast(Tensor, self.model.backbone(images))

    def everything(self, images: Tensor) -> Output:
        """The same logits by the fastest way that this engine has, and what that executes."""
        cost, batch = self.model.cost(), len(images)
        logits = self.dense(images)
        trace = Trace(
            torch.ones(batch, cost.depth, dtype=torch.bool),
            torch.ones(batch, cost.depth, cost.num_heads, dtype=torch.bool),
            torch.ones(batch, cost.depth, cost.num_patches, dtype=torch.bool),
            macs=torch.full((batch,), cost.backbone),
            macs_fraction=torch.ones(batch),
            looks=torch.ones(batch, dtype=torch.int64),
            grid=torch.tensor([cost.grid] * batch),
        )
        return Output(logits, trace)


def first_line(error: Exception) -> str:
    """Its kind and what it says first: compilers and exporters say much."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
