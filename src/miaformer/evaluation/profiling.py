"""Measuring latency tables, calibrating budgets in ms on them, and checking them against the clock.

Everything timed is what runs: `MIAFormer.run`, the walk through the blocks, sparse execution, the learned policy.
Points are measured in turn, round by round in a new order, and a round in which the machine was slow counts as if
it had been as fast as the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

import miaformer
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import HostGates
from miaformer.engine.walk import State
from miaformer.evaluation.calibration import LabelledBatch, OnProgress
from miaformer.evaluation.environment import device_name
from miaformer.evaluation.latency import Grid, LatencyCalibration, LatencyTable, ModelShape
from miaformer.model import budget
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Learned

Point = tuple[int, int]  # of the grid: kept rows, kept heads
Part = tuple[Any, ...]  # of a run: its name, and where on the grid

_SHARES = (0.0, 0.06, 0.15, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of all rows
_MOST_HEADS = 6  # numbers of heads in the grid, and one more


def measure_latency(
    model: MIAFormer, batch_size: int = 1, repeats: int = 7, on_progress: OnProgress | None = None
) -> LatencyTable:
    """Time the model's parts where it is, in its dtype, with torch's number of threads.

    repeats: rounds, after one that warms up; on_progress is called with "profile" and the rounds done.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if model.adapt_config.chooses_resolution:
        raise ValueError(
            "a profile tells what kept heads and tokens take; this model chooses among sizes, which `miaformer bench` "
            "times"
        )
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rehearsal = _Rehearsal(model, batch_size)
            rounds = []
            for number in range(repeats + 1):
                rounds.append(rehearsal.round())
                if on_progress is not None:
                    on_progress("profile", number + 1)
    finally:
        model.train(training)
    parameter = next(model.parameters())
    return LatencyTable(
        shape=rehearsal.shape,
        device=device_name(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        engine="eager",
        batch_size=batch_size,
        versions={"miaformer": miaformer.__version__, "torch": torch.__version__, "timm": timm.__version__},
        **rehearsal.parts(_medians(rounds[1:])),
    )


class _Rehearsal:
    """Runs through the model in which each block carries out another point of the grid, with times of every part.

    Blocks are mixed on purpose: where all were alike, kernels and caches would be warmer than decisions leave them.
    """

    def __init__(self, model: MIAFormer, batch_size: int) -> None:
        self.model, self.batch = model, batch_size
        self.shape, self.cost = ModelShape.of(model), model.cost()
        self.rows, self.heads = grid_rows(self.shape), grid_heads(self.shape)
        self.points: list[Point | None] = [(rows, heads) for rows in self.rows for heads in self.heads]
        self.draw = np.random.default_rng(0)
        # Of batches most blocks are skipped: their time is not that of reading weights, and there is more of it.
        self.executed = max(0.8 / batch_size, 1.5 / self.cost.depth) if batch_size > 1 else 0.8
        parameter = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, model.backbone.in_chans, *model.image_size())
        self.images = torch.randn(size, generator=generator).to(parameter)

    def round(self) -> dict[Part, float]:
        """The median ms of each part over one run a point: each point once in the last block, and in the others."""
        samples: dict[Part, list[float]] = {}
        depth, count = self.cost.depth, len(self.points)
        places = np.stack([self.draw.permutation(count) for _ in range(depth)], axis=1)
        extra = self.draw.integers(count, size=(max(count // 4, 1), depth))  # runs whose last block is skipped
        for number, chosen in enumerate(np.concatenate([places, extra])):
            executes = self.draw.random(depth) < self.executed
            executes[-1] = number < count
            points = [self.points[place] if run else None for place, run in zip(chosen, executes, strict=True)]
            for part, ms in self._run(points):
                samples.setdefault(part, []).append(ms)
        while missing := self._missing(samples):  # chance leaves parts out, of shallow models above all
            kind, *at = missing[0]
            point = cast(Point, tuple(at)) if kind in ("block", "last") else self.points[-1]
            for part, ms in self._run([point] * depth, at[0] if kind == "decide" else None):
                samples.setdefault(part, []).append(ms)
        return {part: float(np.median(ms)) for part, ms in samples.items()}

    def _missing(self, samples: Mapping[Part, list[float]]) -> list[Part]:
        """Parts of a table that were not timed yet."""
        kinds = ("block", "last") if self.cost.depth > 1 else ("last",)
        wanted: list[Part] = [(kind, *point) for kind in kinds for point in self.points if point is not None]
        wanted += [("decide", rows) for rows in self.rows]
        return [part for part in wanted if part not in samples]

    def _run(self, points: Sequence[Point | None], rows: int | None = None) -> Iterator[tuple[Part, float]]:
        """Time each block on its point. rows: that controllers see; None: drawn."""
        ranks = self.shape.controller_ranks
        asked_rows = [rows] * len(points) if rows else self.draw.choice(self.rows, size=len(points)).tolist()
        scored = [bool(rank) and self.draw.random() < 0.6 for rank in ranks]
        policy = _Given(
            [self._gates(point) for point in points],
            [self._active(rows) for rows in asked_rows],
            [torch.full((self.batch,), bool(score)) for score in scored],
        )
        low, _ = self.model.price_range()  # at which controllers keep everything
        start = _now()
        policy.asked = self.model.learned(low)
        self.model.run(self.images, policy=policy)
        end = _now()
        stamps = policy.stamps
        yield ("before",), stamps[0][0] - start
        following = [asked for asked, _ in stamps[1:]]
        for index, point in enumerate(points):
            asked, answered = stamps[index]
            yield ("score" if scored[index] else "decide", asked_rows[index]), answered - asked
            if index == len(points) - 1:
                yield ("last", *(point or ())), end - answered
            elif point is None:
                yield ("skip",), following[index] - answered
            else:
                yield ("block", *point), following[index] - answered

    def _gates(self, point: Point | None) -> HostGates:
        cost = self.cost
        heads, tokens = np.zeros(cost.num_heads, dtype=bool), np.zeros(cost.num_patches, dtype=bool)
        if point is not None:
            rows, num_heads = point
            first = 0 if self.shape.head_choice == "nested" else cost.num_heads - num_heads  # gathers, not slices
            heads[first : first + num_heads] = True
            tokens = _spread_tokens(cost, rows)
        depth = np.full(self.batch, point is not None)
        heads, tokens = (np.repeat(part[None], self.batch, axis=0) for part in (heads, tokens))
        return HostGates(depth, heads, tokens, None, is_effective=True)

    def _active(self, rows: int) -> Tensor:
        """Active patch tokens (B, N) that controllers are asked about."""
        if self.shape.token_multiple > 1 and rows < self.rows[-1]:
            rows -= 1  # one token too few: what is kept has to be rounded up, as it mostly has to be
        return torch.from_numpy(np.repeat(_spread_tokens(self.cost, rows)[None], self.batch, axis=0))

    def parts(self, ms: dict[Part, float]) -> dict[str, Any]:
        """The grids and numbers of a table, in ms per image, of the parts' times in ms."""
        image = 1 / self.batch

        def grid(name: str, besides: float) -> Grid:
            return tuple(
                tuple(max(ms[name, rows, heads] - besides, 0.0) * image for heads in self.heads) for rows in self.rows
            )

        after = max(ms["last",] - ms.get(("skip",), 0.0), 0.0)
        last = grid("last", after)
        block = grid("block", 0.0) if self.cost.depth > 1 else last
        decide = tuple(ms["decide", rows] for rows in self.rows)
        score = tuple(max(ms.get(("score", rows), 0.0) - ms["decide", rows], 0.0) for rows in self.rows)
        return {
            "rows": self.rows,
            "heads": self.heads,
            "block_ms": block,
            "last_block_ms": last if self.cost.trims_last_block else block,
            "skipped_ms": ms.get(("skip",), 0.0) * image,
            "decide_ms": tuple(part * image for part in decide),
            "score_ms": tuple(part * image for part in score),
            "fixed_ms": (ms["before",] + after) * image,
        }


@dataclass
class _Given:
    """A policy that asks the learned one, does something else, and notes when it was asked and answered, in ms."""

    gates: Sequence[HostGates]  # L
    active: Sequence[Tensor]  # L of (B, N): the tokens that the learned policy is asked about
    affordable: Sequence[Tensor]  # L of (B,): whether it may execute the block; only then it scores tokens
    asked: Learned | None = None
    stamps: list[tuple[float, float]] = field(default_factory=list)

    def decide(self, state: State) -> HostGates:
        assert self.asked is not None
        index = state.index
        before = _now()
        self.asked.decide(replace(state, active=self.active[index], affordable=self.affordable[index]))
        self.stamps.append((before, _now()))
        return self.gates[index]

    def context_macs(self, cost: Cost, index: int) -> int:
        return 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return 0


def grid_rows(shape: ModelShape) -> tuple[int, ...]:
    """The numbers of kept rows to measure, from none but prefix rows to all: such as the learned policy keeps."""
    least, most = max(shape.num_prefix_tokens, 1), shape.num_prefix_tokens + shape.num_patches
    multiple = shape.token_multiple
    rows = {least, most, (most - 1) // multiple * multiple}
    for share in _SHARES:
        wanted = math.ceil(share * most / multiple) * multiple
        # Where nothing is rounded, most numbers of rows are not those that fast kernels are kept for: odd ones.
        rows.add(wanted if multiple > 1 else wanted | 1)
    return tuple(sorted(number for number in rows if least <= number <= most))


def grid_heads(shape: ModelShape) -> tuple[int, ...]:
    """The numbers of kept heads to measure: all, one less, and others evenly spaced down to one."""
    most = shape.num_heads
    spaced = {round(number) for number in np.linspace(1, most, min(most, _MOST_HEADS))}
    return tuple(sorted(spaced | {max(most - 1, 1)}))


def _spread_tokens(cost: Cost, rows: int) -> NDArray[np.bool_]:
    """Patch tokens (N,): as many as make up `rows` with the prefix rows, evenly spread."""
    count = min(max(rows - cost.num_prefix_tokens, 0), cost.num_patches)
    tokens = np.zeros(cost.num_patches, dtype=bool)
    tokens[np.arange(count) * cost.num_patches // max(count, 1)] = True
    return tokens


def _medians(rounds: Sequence[dict[Part, float]]) -> dict[Part, float]:
    """The median of each part over rounds, each divided by its pace: the machine's speed drifts."""
    parts = sorted(set().union(*rounds), key=str)
    times = np.array([[one.get(part, np.nan) for part in parts] for one in rounds])
    pace = np.nanmedian(times / np.nanmedian(times, axis=0), axis=1)
    return dict(zip(parts, np.nanmedian(times / pace[:, None], axis=0).tolist(), strict=True))


def _now() -> float:
    """Milliseconds, when what was started has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1000


def calibrate_latency(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    table: LatencyTable,
    data: str = "",
    tolerance: float = 0.02,
    on_progress: OnProgress | None = None,
) -> LatencyCalibration:
    """The table from mean predicted ms per image to price, on calibration images, which are run 13 to 48 times.

    tolerance: how far neighbouring points may be apart, as a fraction of the most. on_progress is called with
    "calibrate" and the passes done. Raises ValueError for no images, and for a table of another model.
    """
    table.check_fits(model)
    parameter = next(model.parameters())
    images = [batch.images.to(parameter) for batch in batches]
    if not images:
        raise ValueError("calibrate_latency() was given no images")
    known: dict[float, tuple[float, float]] = {}  # price: mean ms and mean MACs fraction

    def mean_ms(price: float) -> float:
        if price not in known:
            traces = [model.run(batch, price=price).trace for batch in images]
            ms = torch.cat([table.predict(trace) for trace in traces]).mean().item()
            known[price] = ms, torch.cat([trace.macs_fraction for trace in traces]).double().mean().item()
            if on_progress is not None:
                on_progress("calibrate", len(known))
        return known[price][0]

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            # The ends exactly as `budget.calibrate` will ask for them.
            prices = tuple(math.exp(math.log(price)) for price in model.price_range())
            most = mean_ms(prices[0])
            num_images = sum(map(len, images))
            found = budget.calibrate(
                lambda price: mean_ms(price) / most, num_images, data, tolerance, (prices[0], prices[1])
            )
    finally:
        model.train(training)
    spent = [known[price] for price in found.prices]
    return LatencyCalibration(found.prices, tuple(ms for ms, _ in spent), tuple(f for _, f in spent), num_images, data)


@torch.inference_mode()
def check_latency(
    model: MIAFormer,
    batches: Sequence[Tensor],
    prices: Sequence[float],
    table: LatencyTable,
    repeats: int = 3,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Predicted against measured ms per image, a row a price.

    batches: (B, 3, H, W) each, of the table's batch size; each gives a point, the median of `repeats` rounds.
    A row holds `price`, `predicted_ms` and `measured_ms` (a number a batch), the mean absolute relative error
    `error`, `bias` (sum of predicted over sum of measured, minus 1), and `correlation` (None where nothing varies).
    """
    if not batches or any(len(batch) != table.batch_size for batch in batches):
        raise ValueError(f"check_latency() needs batches of {table.batch_size} images, as the table was measured")
    table.check_fits(model)
    predicted = np.empty((len(prices), len(batches)))
    measured = np.empty((repeats + 1, len(prices), len(batches)))
    done = 0
    for number in range(repeats + 1):  # the first warms up, and gives the traces
        for column, images in enumerate(batches):
            for row, price in enumerate(prices):
                start = _now()
                trace = model.run(images, price=price).trace
                measured[number, row, column] = (_now() - start) / len(images)
                if number == 0:
                    predicted[row, column] = table.predict(trace).mean().item()
            done += 1
            if on_progress is not None:
                on_progress("check", done)
    found = np.median(measured[1:], axis=0)
    return [
        {
            "price": price,
            **_agreement(of_price, taken),
            "predicted_ms": of_price.tolist(),
            "measured_ms": taken.tolist(),
        }
        for price, of_price, taken in zip(prices, predicted, found, strict=True)
    ]


def _agreement(predicted: NDArray[Any], measured: NDArray[Any]) -> dict[str, Any]:
    varies = min(predicted.std(), measured.std()) > 1e-9
    return {
        "mean_predicted_ms": float(predicted.mean()),
        "mean_measured_ms": float(measured.mean()),
        "error": float(np.abs(predicted / measured - 1).mean()),
        "bias": float(predicted.sum() / measured.sum() - 1),
        "correlation": float(np.corrcoef(predicted, measured)[0, 1]) if varies else None,
    }
