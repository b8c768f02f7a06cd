"""The fastest engine of those that a predictor can use, timed on the first images that it is given.

Which one is faster depends on model, machine and batch. Executing everything is timed too: where that is faster than
the requested budget, the budget saves MACs and no time, and whoever asked should know.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from miaformer.engine.races import cache_folder, faster, remembered
from miaformer.export.engines.engine import Engine, EngineUnavailableError
from miaformer.export.engines.onnx_runtime import OnnxRuntime, model_key
from miaformer.export.engines.pytorch import Eager
from miaformer.model.model import MIAFormer
from miaformer.model.output import Output

SECONDS = 0.4  # that timing a candidate may take
TIMED = "engines.json"
_DENSE = ", dense"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was timed: milliseconds an image of each engine, at a budget and dense."""

    kind: str  # of call: "single images" or "batches"
    ms: Mapping[str, float]
    dense_ms: Mapping[str, float]
    budget: float | None = None  # the mean of those that it was timed at

    @property
    def engine(self) -> str:
        """The fastest at the budget."""
        return _fastest(self.ms)

    @property
    def dense_engine(self) -> str:
        return _fastest(self.dense_ms)

    @property
    def saves_time(self) -> bool:
        """Whether the budget takes less time than executing everything; where no budget was given, it is not known."""
        return not self.ms or min(self.ms.values()) < min(self.dense_ms.values())

    def lines(self) -> list[str]:
        """In words."""
        said = [f"engine for {self.kind}: {_listed(self.ms or self.dense_ms)}"]
        if not self.saves_time:
            said.append(
                f"engine for {self.kind}: the dense model is faster, {_listed(self.dense_ms)}: budget "
                f"{self.budget:.2g} saves MACs here, not time"
            )
        return said


OnChoice = Callable[[Choice], None]


class Auto(Engine):
    """The fastest engine, for single images and for batches: chosen on the first of each, and remembered.

    on_choice: is told what was timed.
    """

    name = "auto"

    def __init__(self, model: MIAFormer, folder: Path | None = None, on_choice: OnChoice | None = None) -> None:
        super().__init__(model, folder)
        self.engines: dict[str, Engine] = {"eager": Eager(model)}
        with suppress(EngineUnavailableError):
            self.engines["onnx"] = OnnxRuntime(model, folder)
        self.on_choice = on_choice
        self._choices: dict[tuple[bool, bool], Choice] = {}  # by: several images, at a budget

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None = None) -> Output:
        return self.engines[self._choice(images, budgets, caps).engine].run(images, budgets, caps)

    def dense(self, images: Tensor) -> Tensor:
        return self.everything(images).logits

    def everything(self, images: Tensor) -> Output:
        return self.engines[self._choice(images).dense_engine].everything(images)

    def _choice(
        self, images: Tensor, budgets: Sequence[float] | None = None, caps: Sequence[float] | None = None
    ) -> Choice:
        several = len(images) > 1
        known = self._choices.get((several, budgets is not None))
        if known is None and budgets is None:
            known = self._choices.get((several, True))  # knows the dense ones as well
        if known is None:
            known = self._choices[several, budgets is not None] = self._timed(images, budgets, caps)
        return known

    def _timed(self, images: Tensor, budgets: Sequence[float] | None, caps: Sequence[float] | None) -> Choice:
        calls: dict[str, Callable[[], object]] = {}
        for name, engine in self.engines.items():
            if budgets is not None:
                calls[name] = lambda engine=engine: engine.run(images, budgets, caps)  # type: ignore[misc]
            calls[name + _DENSE] = lambda engine=engine: engine.everything(images)  # type: ignore[misc]
        kind = "batches" if len(images) > 1 else "single images"
        budget = None if budgets is None else statistics.fmean(budgets)
        spent = "" if budget is None else f" at {budget:.2f}" + (f" under {statistics.fmean(caps):.2f}" if caps else "")

        def race() -> dict[str, float]:
            for name, call in list(calls.items()):
                try:
                    call()
                except EngineUnavailableError as error:  # not every model can be exported
                    _log.warning("the engine %s is left out: %s", name, error)
                    del calls[name]
            return {name: 1000 * taken / len(images) for name, taken in faster(calls, SECONDS).items()}

        file = (self.folder or cache_folder()) / TIMED
        found = remembered(file, f"{model_key(self.model)}, {kind}{spent}", set(calls), race)
        sparse = {name: ms for name, ms in found.items() if not name.endswith(_DENSE)}
        dense = {name.removesuffix(_DENSE): ms for name, ms in found.items() if name.endswith(_DENSE)}
        choice = Choice(kind, sparse, dense, budget)
        if self.on_choice is not None:
            self.on_choice(choice)
        return choice


def _fastest(ms: Mapping[str, float]) -> str:
    return min(ms, key=lambda name: ms[name])


def _listed(ms: Mapping[str, float]) -> str:
    """`onnx, 3.5 ms an image (eager 8.1)`"""
    best, *others = sorted(ms, key=lambda name: ms[name])
    slower = ", ".join(f"{name} {ms[name]:.2g}" for name in others)
    return f"{best}, {ms[best]:.2g} ms an image" + (f" ({slower})" if slower else "")
