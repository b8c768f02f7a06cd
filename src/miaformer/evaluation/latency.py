"""What decisions cost in milliseconds on one machine: a measured table, and budgets in ms that are read off it.

A table holds the time of one executed block over kept rows and kept heads, of a skipped block, of deciding, and of
what every image pays. `predict` adds these up for the decisions of a trace; `LatencyCalibration` turns the mean of
that over calibration images into the controllers' price. `evaluation.profiling` measures tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.engine.decisions import Decisions
from miaformer.evaluation.environment import device_name
from miaformer.model.budget import Calibration
from miaformer.model.model import MIAFormer

Floats = NDArray[np.float64]
Numbers = tuple[float, ...]
Grid = tuple[Numbers, ...]  # a row for each number of kept rows, a column for each number of kept heads


@dataclass(frozen=True)
class ModelShape:
    """What a model's time depends on, its weights aside: two models of one shape share a table."""

    image_size: tuple[int, ...]  # (H, W)
    depth: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_hidden: int
    mlp_inputs: int
    mlp_width: str
    num_prefix_tokens: int
    num_patches: int
    trims_last_block: bool
    embed_macs: int
    head_macs: int
    head_choice: str
    token_scope: str
    token_multiple: int  # rows kept by the learned policy are rounded up to this
    controller_hidden: int
    controller_ranks: tuple[int, ...]  # (L,): 0 where a block's tokens are not decided

    @staticmethod
    def of(model: MIAFormer) -> ModelShape:
        cost, config = model.cost(), model.adapt_config
        controllers: list[Any] = list(model.controllers)
        return ModelShape(
            image_size=model.image_size(),
            head_choice=config.head_choice,
            token_scope=config.token_scope,
            token_multiple=config.rows_multiple(cost.num_patches),
            controller_hidden=controllers[0].pooled.out_features,
            controller_ranks=tuple(controller.rank for controller in controllers),
            **{name: getattr(cost, name) for name in _OF_COST},
        )


_OF_COST = (
    *("depth", "embed_dim", "num_heads", "head_dim", "mlp_hidden", "mlp_inputs", "mlp_width", "num_prefix_tokens"),
    *("num_patches", "trims_last_block", "embed_macs", "head_macs"),
)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per image on one device, measured in batches of `batch_size` images that are treated alike.

    With one image a batch that is its latency; with more it is the batch's time shared out, and images that keep
    different heads or numbers of rows share fewer calls than those measured: the table is then a little too small.
    """

    shape: ModelShape
    device: str
    dtype: str
    threads: int
    engine: str  # "eager": this package's sparse execution in PyTorch
    batch_size: int
    rows: tuple[int, ...]  # rising, kept rows, prefix rows too
    heads: tuple[int, ...]  # rising, kept heads
    block_ms: Grid  # (rows, heads), of an executed block, what leads to it in the walk too
    last_block_ms: Grid  # the same of the last block, which may compute prefix rows only
    skipped_ms: float  # of a skipped block
    decide_ms: Numbers  # (rows,), of the controller of a block, over the rows that are still active
    score_ms: Numbers  # (rows,), what scoring the tokens among these rows adds
    fixed_ms: float  # of patch embedding, final norm, classifier, and everything around the blocks
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rows", "heads"):
            steps = getattr(self, name)
            if not steps or any(a >= b for a, b in pairwise(steps)):
                raise ValueError(f"{name}={steps!r} must be rising numbers")
        size = (len(self.rows), len(self.heads))
        wanted_shapes = {"block_ms": size, "last_block_ms": size, "decide_ms": size[:1], "score_ms": size[:1]}
        for name, wanted in wanted_shapes.items():
            found = _array(name, getattr(self, name))
            if found.shape != wanted:
                raise ValueError(f"{name} has shape {found.shape}, rows and heads make it {wanted}")
        for name in ("skipped_ms", "fixed_ms"):
            _array(name, getattr(self, name))
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be at least 1")

    def predict(self, decisions: Decisions, learned: bool = True) -> Tensor:
        """Milliseconds (B,) float64 of each image whose trace this is.

        learned: whether controllers made the decisions; other policies are taken to decide in no time.
        """
        self._check(decisions)
        prefix = self.shape.num_prefix_tokens
        depth = decisions.depth.cpu().numpy()  # (B, L)
        rows = prefix + decisions.tokens.sum(dim=2).cpu().numpy()  # (B, L)
        heads = decisions.heads.sum(dim=2).cpu().numpy()
        last = len(depth[0]) - 1
        ms = self.skipped_ms + depth * (self._block(self.block_ms, rows, heads) - self.skipped_ms)
        of_last = self._block(self.last_block_ms, rows[:, last], heads[:, last])
        ms[:, last] = np.where(depth[:, last], of_last, self.skipped_ms)
        if learned:
            active = prefix + self._active(depth, rows - prefix)
            scores = depth & (np.array(self.shape.controller_ranks) > 0)
            ms += _along(self.rows, self.decide_ms, active) + scores * _along(self.rows, self.score_ms, active)
        return torch.from_numpy(self.fixed_ms + ms.sum(axis=1))

    def _active(self, depth: NDArray[Any], tokens: NDArray[Any]) -> NDArray[Any]:
        """Active patch tokens (B, L) before each block: in progressive scope, what the last executed block kept."""
        active = np.full(tokens.shape, self.shape.num_patches)
        if self.shape.token_scope == "progressive":
            for index in range(1, tokens.shape[1]):
                before = index - 1
                active[:, index] = np.where(depth[:, before], tokens[:, before], active[:, before])
        return active

    def _block(self, grid: Grid, rows: NDArray[Any], heads: NDArray[Any]) -> Floats:
        """Bilinear between the points of the grid, linear beyond its ends."""
        of_rows = np.array(grid)
        low, high, share = _between(self.heads, heads)
        below, above, up = _between(self.rows, rows)

        def at(row: NDArray[Any]) -> NDArray[Any]:
            return of_rows[row, low] * (1 - share) + of_rows[row, high] * share

        ms: Floats = at(below) * (1 - up) + at(above) * up
        return ms

    def _check(self, decisions: Decisions) -> None:
        shape = self.shape
        found = (*decisions.heads.shape[1:], decisions.tokens.shape[2])
        if found != (shape.depth, shape.num_heads, shape.num_patches):
            raise ValueError(
                f"decisions for (blocks, heads, patch tokens) = {found} do not fit this latency table, which is for "
                f"{(shape.depth, shape.num_heads, shape.num_patches)}"
            )

    def check_fits(self, model: MIAFormer) -> None:
        """Raises ValueError naming what differs where this table was measured for another model, or run otherwise."""
        own = ModelShape.of(model)
        parameter = next(model.parameters())
        pairs = [(part.name, getattr(self.shape, part.name), getattr(own, part.name)) for part in fields(ModelShape)]
        pairs.append(("dtype", self.dtype, _dtype(parameter)))
        pairs.append(("device", self.device, device_name(parameter.device)))
        if parameter.device.type == "cpu":
            pairs.append(("threads", self.threads, torch.get_num_threads()))
        differing = [f"{name} {there} (here {here})" for name, there, here in pairs if there != here]
        if differing:
            raise ValueError(
                f"this latency table was measured for {', '.join(differing)}: measure one for this model and "
                "machine with `miaformer profile`"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: Any) -> LatencyTable:
        """Raises ValueError naming what is missing or wrong."""
        try:
            shape = ModelShape(**{name: _hashable(value) for name, value in dict(content["shape"]).items()})
            parts = {part.name: content[part.name] for part in fields(LatencyTable) if part.name != "shape"}
            numbers = {name: _hashable(value) for name, value in parts.items()}
            return LatencyTable(shape, **{**numbers, "versions": dict(content["versions"])})
        except KeyError as error:
            raise ValueError(f"the latency table lacks {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"this is not a latency table: {error}") from error


@dataclass(frozen=True)
class LatencyCalibration:
    """Prices, and the mean predicted ms and MACs fraction that each led to on the calibration images."""

    prices: Numbers  # rising
    ms: Numbers  # falling
    macs_fractions: Numbers
    num_images: int
    data: str = ""

    def __post_init__(self) -> None:
        if not len(self.prices) == len(self.ms) == len(self.macs_fractions):
            raise ValueError("a latency calibration needs as many prices as milliseconds and MACs fractions")
        self._fractions()  # raises where they are not monotone

    def _fractions(self) -> Calibration:
        """The same with fractions of the most ms, whose look-up serves here too."""
        return Calibration(self.prices, tuple(ms / self.ms[0] for ms in self.ms), self.num_images, self.data)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most mean ms per image that prices reach."""
        return self.ms[-1], self.ms[0]

    def price(self, budget_ms: float) -> float:
        """The price that brings a mean of `budget_ms` per image. More than everything takes is everything.

        Raises ValueError for what is no positive number, and for less than the model can reach.
        """
        if isinstance(budget_ms, bool) or not isinstance(budget_ms, int | float) or not 0 < budget_ms < math.inf:
            raise ValueError(f"budget_ms={budget_ms!r} must be a positive number of milliseconds")
        least, most = self.range
        if budget_ms < least:
            raise ValueError(
                f"budget_ms={budget_ms:g} is out of reach: on average this model takes {least:.4g} to {most:.4g} ms an "
                "image here"
            )
        return self._fractions().price(min(budget_ms / most, 1.0))

    def macs_fraction(self, price: float) -> float:
        """The mean MACs fraction at a price, interpolated in log-price."""
        return float(np.interp(math.log(price), np.log(self.prices), self.macs_fractions))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: Any) -> LatencyCalibration:
        try:
            prices, ms, fractions = (tuple(map(float, content[name])) for name in ("prices", "ms", "macs_fractions"))
            return LatencyCalibration(prices, ms, fractions, int(content["num_images"]), str(content["data"]))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"this is not a latency calibration: {error!r}") from error


def _between(steps: tuple[int, ...], at: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], Floats]:
    """The places of the steps below and above, and how far between them (beyond 0 and 1 outside of the steps)."""
    grid = np.array(steps, dtype=np.float64)
    if len(grid) == 1:
        zero = np.zeros(at.shape, dtype=np.int64)
        return zero, zero, zero.astype(np.float64)
    low = np.clip(np.searchsorted(grid, at, side="right") - 1, 0, len(grid) - 2)
    return low, low + 1, (at - grid[low]) / (grid[low + 1] - grid[low])


def _along(steps: tuple[int, ...], values: Numbers, at: NDArray[Any]) -> Floats:
    low, high, share = _between(steps, at)
    numbers = np.array(values)
    ms: Floats = numbers[low] * (1 - share) + numbers[high] * share
    return ms


def _array(name: str, value: Any) -> Floats:
    numbers = np.array(value, dtype=np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise ValueError(f"{name} must be milliseconds, finite and not negative")
    return numbers


def _hashable(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _dtype(parameter: Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")
