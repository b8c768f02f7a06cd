"""Sparse against dense execution, engine by engine: what skipped compute saves in time.

A cell is a dtype and a batch size. All its contenders - every engine's dense execution, and its sparse one at every
budget - are timed in turn within the same rounds, over several batches of pictures; a round's times are compared with
each other and with nothing else.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaformer.evaluation.calibration import OnProgress
from miaformer.evaluation.timing import Race
from miaformer.export.engines import Engine, EngineUnavailableError, open_engine
from miaformer.model.budget import check_fraction
from miaformer.model.model import MIAFormer

TIMED_ENGINES = ("eager", "packed", "compile", "graphs", "onnx")
FULL = 1.0  # the budget at which controllers run and everything is kept
_REHEARSED_MS = 50.0  # calls shorter than this are rehearsed: what is left in caches is worth a few ms
_FEWEST_SWEEPS = 5  # that batches of pictures are given up for
_PICTURES = 96  # of a cell, about: at most 16 batches, at least 2
_FEWEST_PICTURES = 8  # however long they take: images differ in compute


@dataclass
class Report:
    """What was measured, cell by cell, ready for JSON."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dense: list[dict[str, Any]] = field(default_factory=list)  # every engine's dense execution
    left_out: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def leave_out(self, engine: str, execution: str, dtype: str, batch: int, reason: str) -> None:
        same = {"engine": engine, "execution": execution, "dtype": dtype, "reason": reason}
        for entry in self.left_out:
            if entry | {"batches": None} == same | {"batches": None}:
                entry["batches"] = sorted({*entry["batches"], batch})
                return
        self.left_out.append({**same, "batches": [batch]})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def batches_of_size(batch: int) -> int:
    """How many different batches of pictures a cell times, where there are as many pictures and enough time."""
    return max(2, min(16, _PICTURES // batch))


def stage_of(dtype: str, batch: int) -> str:
    """What progress calls a cell."""
    return f"{dtype}, batch {batch}"


def bench(
    models: Mapping[str, MIAFormer],
    pictures: Tensor,
    engines: Sequence[str] = TIMED_ENGINES,
    dtypes: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 8, 32),
    budgets: Sequence[float] = (0.35, 0.5, 0.7),
    repeats: int = 15,
    seconds: float = 20.0,
    on_progress: OnProgress | None = None,
    on_cell: Callable[[Report], None] | None = None,
) -> Report:
    """Time every engine, dense and sparse, at every dtype, batch size and budget; and with everything kept.

    models: float32, calibrated, by the grains that they decide (see `drawn_models`); they share a backbone. pictures:
    (n, 3, H, W) float32, normalised; repeated where they do not fill a batch. repeats: sweeps over a cell's batches
    of pictures, at most; seconds: the time after which a cell ends, once each of its batches was timed. on_cell: is
    told after each dtype and batch size what there is. Ctrl-C ends it with that.

    Raises ValueError for models without calibration, and for settings out of range.
    """
    _check(models, pictures, engines, batch_sizes, budgets, repeats, seconds)
    device = next(next(iter(models.values())).parameters()).device
    budgets = sorted({*budgets} - {FULL})
    report = Report()
    with tempfile.TemporaryDirectory() as folder:  # exported once for all cells
        try:
            for dtype in dict.fromkeys(dtypes):
                converted = _in_dtype(models, getattr(torch, dtype))
                for batch in sorted(set(batch_sizes)):
                    cell = _Cell(models, converted, dtype, batch, device, report, Path(folder))
                    cell.prepare(list(dict.fromkeys(engines)), budgets, pictures)
                    cell.time(pictures, repeats, seconds, on_progress)
                    if on_cell is not None:
                        on_cell(report)
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def _check(
    models: Mapping[str, MIAFormer],
    pictures: Tensor,
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    budgets: Sequence[float],
    repeats: int,
    seconds: float,
) -> None:
    unknown = sorted(set(engines) - set(TIMED_ENGINES))
    if unknown:
        raise ValueError(f"unknown engine {', '.join(unknown)}: use some of {', '.join(TIMED_ENGINES)}")
    for grains, model in models.items():
        if model.calibration is None:
            raise ValueError(f"the model of grains {grains!r} is not calibrated, so it knows no budget to be timed at")
    for budget in budgets:
        check_fraction("budget", budget)
    if not models or not len(pictures):
        raise ValueError(f"bench() was given {len(models)} models and {len(pictures)} pictures: give at least one")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={list(batch_sizes)!r} must be at least 1")
    if repeats < 1 or not seconds > 0:
        raise ValueError(f"repeats={repeats!r} and seconds={seconds!r} must be positive")


def _in_dtype(models: Mapping[str, MIAFormer], dtype: torch.dtype) -> dict[str, MIAFormer]:
    """The models in this dtype, still sharing a backbone; the same ones where they are in it already."""
    found: dict[str, MIAFormer] = {}
    backbones: dict[int, Any] = {}  # by the id of the one that they were converted from: what deepcopy calls a memo
    for grains, model in models.items():
        if next(model.parameters()).dtype == dtype:
            found[grains] = model
            continue
        found[grains] = copy.deepcopy(model, dict(backbones)).to(dtype).eval()
        backbones[id(model.backbone)] = found[grains].backbone
    return found


@dataclass(frozen=True)
class _Contender:
    """A call of a race. `dtype` is that of the images that it takes; budget None: dense."""

    engine: str
    dtype: str
    call: Callable[[Mapping[str, Tensor]], Any]
    grains: str = ""
    budget: float | None = None
    spent: dict[int, Tensor] = field(default_factory=dict)  # macs_fraction (B,), by the id of the batch


class _Cell:
    """One dtype and batch size."""

    def __init__(
        self,
        precise: Mapping[str, MIAFormer],
        models: Mapping[str, MIAFormer],
        dtype: str,
        batch: int,
        device: torch.device,
        report: Report,
        folder: Path,
    ) -> None:
        self.precise, self.models, self.dtype, self.batch = precise, models, dtype, batch
        self.device, self.report, self.folder = device, report, folder
        self.contenders: list[_Contender] = []

    @torch.inference_mode()
    def prepare(self, engines: Sequence[str], budgets: Sequence[float], pictures: Tensor) -> None:
        """Compile, export and so on, whatever takes its time once."""
        torch.compiler.reset()  # each shape is compiled anew; past a number of shapes it would silently run eager
        images = next(self._inputs(pictures, 1))
        for name in engines:
            self._prepare_engine(name, budgets, images)
        if self.dtype != "float32":  # a dense model of full precision is a baseline too, where it is faster
            for name in engines:
                self._add_dense(name, "float32", next(iter(self.precise.values())), images)

    def _prepare_engine(self, name: str, budgets: Sequence[float], images: Mapping[str, Tensor]) -> None:
        first = next(iter(self.models))
        engine = self._add_dense(name, self.dtype, self.models[first], images)
        if engine is None:
            return
        for grains, model in self.models.items():
            assert model.calibration is not None
            try:
                if grains != first:
                    engine = open_engine(name, model, self.folder)
                engine.run(images[self.dtype], [model.calibration.range[1]] * self.batch)
            except EngineUnavailableError as error:
                self._leave_out(name, "sparse", str(error))
                return
            for budget in (*budgets, *([FULL] if grains == first else [])):
                try:
                    model.check_budget(budget)
                except ValueError as error:
                    self._leave_out(name, f"sparse, {grains} at {budget:g}", str(error))
                    continue
                self._add_sparse(engine, grains, budget)

    def _add_dense(self, name: str, dtype: str, model: MIAFormer, images: Mapping[str, Tensor]) -> Engine | None:
        try:
            engine = open_engine(name, model, self.folder)
            engine.dense(images[dtype])
        except EngineUnavailableError as error:
            self._leave_out(name, "dense and sparse" if dtype == self.dtype else f"{dtype} dense", str(error))
            return None
        self.contenders.append(_Contender(name, dtype, lambda batch: engine.dense(batch[dtype])))
        return engine

    def _add_sparse(self, engine: Engine, grains: str, budget: float) -> None:
        spent: dict[int, Tensor] = {}
        budgets = [budget] * self.batch

        def call(batch: Mapping[str, Tensor]) -> None:
            spent[id(batch)] = engine.run(batch[self.dtype], budgets).trace.macs_fraction

        self.contenders.append(_Contender(engine.name, self.dtype, call, grains, budget, spent))

    def _leave_out(self, engine: str, execution: str, reason: str) -> None:
        self.report.leave_out(engine, execution, self.dtype, self.batch, reason)

    def _inputs(self, pictures: Tensor, count: int) -> Iterator[dict[str, Tensor]]:
        """Batches of pictures, in this cell's dtype and in float32, where the model is."""
        numbers = cycle(range(len(pictures)))
        for _ in range(count):
            images = pictures[list(islice(numbers, self.batch))].to(self.device)
            yield {"float32": images, self.dtype: images.to(getattr(torch, self.dtype))}

    @torch.inference_mode()
    def time(self, pictures: Tensor, repeats: int, seconds: float, on_progress: OnProgress | None) -> None:
        """Sweep until the repeats or the seconds are over, and report."""
        if not self.contenders:
            return
        stage = stage_of(self.dtype, self.batch)
        calls = [contender.call for contender in self.contenders]
        trial = Race(calls, list(self._inputs(pictures, 1)))
        for _ in range(2):  # the first one warms up
            trial.sweep()
        rehearse = min(trial.last_ms) < _REHEARSED_MS
        round_seconds = sum(trial.last_ms) / 1000 * (2 if rehearse else 1)
        affordable = int(seconds / (round_seconds * min(repeats, _FEWEST_SWEEPS)))
        different = -(-len(pictures) // self.batch)
        count = max(
            min(affordable, different, batches_of_size(self.batch)), min(different, -(-_FEWEST_PICTURES // self.batch))
        )
        race = Race(calls, list(self._inputs(pictures, count)), rehearse)
        start = time.perf_counter()
        try:
            while race.sweeps < repeats and (not race.sweeps or time.perf_counter() - start < seconds):
                race.sweep()
                if on_progress is not None:
                    on_progress(stage, race.sweeps)
        finally:  # also of what Ctrl-C left
            if race.sweeps:
                self._report(race, min(count * self.batch, len(pictures)))
        if on_progress is not None:
            on_progress(stage, repeats)

    def _report(self, race: Race[dict[str, Tensor]], images: int) -> None:
        dense = [place for place, contender in enumerate(self.contenders) if contender.budget is None]
        best = min(dense, key=race.ms)
        own = {self.contenders[place].engine: place for place in reversed(dense)}  # this dtype's stand first
        shared = {"batch": self.batch, "images": images, "repeats": race.sweeps}
        for place in dense:
            contender = self.contenders[place]
            if contender.dtype == self.dtype:
                row = {"engine": contender.engine, "dtype": self.dtype, "ms": race.ms(place)}
                self.report.dense.append({**row, "variation": race.variation(place), **shared})
        for place, contender in enumerate(self.contenders):
            if contender.budget is None:
                continue
            against = own[contender.engine]
            spent = torch.cat([contender.spent[id(batch)].double().cpu() for batch in race.inputs])
            macs_fraction, time_fraction = spent.mean().item(), race.fraction(place, against)
            row = {
                "engine": contender.engine,
                "dtype": self.dtype,
                "grains": contender.grains,
                "budget": contender.budget,
                "macs_fraction": macs_fraction,
                "macs_fraction_std": spent.std(correction=0).item(),
                "ms": race.ms(place),
                "dense_ms": race.ms(against),
                "time_fraction": time_fraction,
                "efficiency": macs_fraction / time_fraction,
                "spread": race.spread(place, against),
                "best_dense_engine": self.contenders[best].engine,
                "best_dense_dtype": self.contenders[best].dtype,
                "best_dense_ms": race.ms(best),
                "best_time_fraction": race.fraction(place, best),
                "best_spread": race.spread(place, best),
            }
            self.report.rows.append({**row, **shared})
