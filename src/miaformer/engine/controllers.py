"""The controllers of a model, and their formulas at the prices that were asked for last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from miaformer.engine.changes import Seen
from miaformer.engine.controller import Controller, Formula


class Controllers(nn.ModuleList):
    """The controllers of all blocks, which remember their formulas at the last prices while their weights stay."""

    _known: tuple[list[float], Seen, list[Formula]] | None = None

    def __iter__(self) -> Iterator[Controller]:
        return cast(Iterator[Controller], super().__iter__())

    def formulas(self, log_price: Tensor) -> list[Formula]:
        prices, parameters = log_price.tolist(), self._now()
        known = self._known  # once: another thread may ask at other prices meanwhile
        if known is None or known[0] != prices or not known[1].still(parameters):
            known = (prices, Seen(parameters), _formulas(list(self), log_price))
            self._known = known
        return known[2]

    def _now(self) -> list[Tensor]:
        """The parameters, whoever has put them there; `parameters()` takes ten times as long."""
        found: list[Tensor] = []
        left: list[nn.Module] = [self]
        while left:
            module = left.pop()
            found += [p for p in module._parameters.values() if p is not None]
            left += [m for m in module._modules.values() if m is not None]
        return found

    def train(self, mode: bool = True) -> Self:
        self._known = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_known"}


@torch.no_grad()
def _formulas(controllers: Sequence[Controller], log_price: Tensor) -> list[Formula]:
    return Formula.of(controllers, log_price)
