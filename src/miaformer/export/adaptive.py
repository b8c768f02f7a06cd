"""The adaptive forward pass of one image as ONNX nodes: decide, skip by `If`, gather what is kept.

A small model's time in ONNX Runtime is that of its nodes, so what is known when the file is written is not left to it:
what a block does not decide is a constant, and is cut, ranked or masked in the rare branch alone where the cap is
reached. In progressive scope, where only prefix rows are read in the end, the rows that are left are carried packed and
those that were dropped are forgotten; else all rows are carried, and what a block changed is scattered back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miaformer.engine.controller import (
    DIFFICULTY_BOUND,
    LEAST_LOG_PRICE,
    LOG_PRICE_RANGE,
    LOGIT_BOUND,
    PRICE_FEATURES,
    Controller,
)
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import HostGates
from miaformer.export.blocks import Angles, BlockWriter
from miaformer.export.graph import Graph, TensorProto, array
from miaformer.export.parts import rotary_of
from miaformer.export.weights import Weight
from miaformer.model.budget import Calibration

FLOAT, INT = np.float32, np.int64
Write = Callable[[Graph, list[int]], str]  # a block under these heads: the rows that it changes, after it


@dataclass(frozen=True)
class Image:
    """The image on its way. Values of the graph."""

    rows: str  # (P + active, C) where packed, else (P + N, C)
    active: str  # (active,) int64, which patch tokens may be kept, ascending or as they were ranked
    is_active: str  # (N,) bool, the same
    macs: str  # (1,) int64, spent
    left: str  # (1,) int64, what the cap leaves; negative where the image has left


@dataclass(frozen=True)
class Done:
    """A block's trace. Values of the graph, False where it was skipped."""

    depth: str  # (1,) bool
    heads: str  # (H,) bool
    tokens: str  # (N,) bool


@dataclass(frozen=True)
class Said:
    """What a controller says. Values of the graph; None of what its block does not decide."""

    depth: str  # (1,), a logit
    heads: str | None  # (H,), logits
    tokens: str | None  # (1,), what the logits of all tokens share
    direction: str | None  # (1, C), what tokens are compared with


@dataclass(frozen=True)
class Kept:
    """What of an executed block is kept. Values of the graph."""

    heads: str  # (H,) bool
    num_heads: str  # (1,) int64
    rows: str  # (P + kept, C)
    active: str  # (kept,) int64, the patch tokens among them
    is_active: str  # (N,) bool, the same
    macs: str  # (1,) int64


class AdaptiveWriter:
    """Writes the blocks of a model, each behind its controller."""

    def __init__(self, graph: Graph, model: Any, log_price: str, weight: type[Weight]) -> None:
        self.model, self.cost, self.weight = model, model.cost(), weight
        config, self.rotary = model.adapt_config, rotary_of(model)
        self.rules = config.rules
        self.decides_heads = "heads" in config.grains
        self.packed = self.rules.progressive and self.cost.trims_last_block
        self.multiple = config.rows_multiple(self.cost.num_patches)
        self.controllers: list[Controller] = list(model.controllers)
        self.columns = [self._columns(controller) for controller in self.controllers]
        self.contexts, self.shifts = self._prices(graph, log_price)
        self.no_heads, self.no_tokens = (
            graph.constant(np.zeros(n, bool)) for n in (self.cost.num_heads, self.cost.num_patches)
        )
        self.every_head = graph.constant(np.ones(self.cost.num_heads, bool))

    def _columns(self, controller: Controller) -> list[int]:
        """The grain of each logit that is asked for: 0 depth, 1 heads, 2 what tokens share."""
        return [0] + [1] * self.cost.num_heads * self.decides_heads + [2] * bool(controller.rank)

    def _prices(self, graph: Graph, log_price: str) -> tuple[list[str], list[str]]:
        """What the price adds to the context of each block, (1, hidden), and to its logits, (J,)."""
        low, high = LOG_PRICE_RANGE
        width = (high - low) / (PRICE_FEATURES - 1)
        clipped = graph.op("Clip", log_price, graph.constant(low, FLOAT), graph.constant(high, FLOAT))
        offsets = graph.op("Sub", clipped, graph.constant(np.linspace(low, high, PRICE_FEATURES), FLOAT))
        scaled = graph.op("Mul", graph.op("Mul", offsets, offsets), graph.constant(-0.5 / width**2, FLOAT))
        features = graph.op("Unsqueeze", graph.op("Exp", scaled), graph.ints(1))  # (features, 1)
        weights = graph.constant(np.stack([array(c.price.weight) for c in self.controllers]))
        parts = graph.op("Squeeze", graph.op("MatMul", weights, features), graph.ints(2))  # (L, hidden)
        contexts = graph.op("Add", parts, graph.constant(np.stack([array(c.pooled.bias) for c in self.controllers])))
        each = list(zip(self.controllers, self.columns, strict=True))
        slopes = np.concatenate([array(torch.nn.functional.softplus(c.slope.float()))[grains] for c, grains in each])
        keep = np.concatenate([np.array(c.keep_logits)[grains] for c, grains in each])
        shift = graph.op("Sub", graph.constant(keep, FLOAT), graph.op("Mul", log_price, graph.constant(slopes)))
        return graph.split(contexts, [1] * len(each)), graph.split(shift, [len(grains) for _, grains in each])

    def write(self, graph: Graph, index: int, block: Any, image: Image) -> tuple[Image, Done]:
        """One block: the image after it, and what was done."""
        controller, cost = self.controllers[index], self.cost
        writer = BlockWriter.of(graph, cost, block, index, self.weight)
        said = self._said(graph, index, image)
        needed = graph.ints(int(cost.of_host(index, _gates(cost, 1, 0 if cost.num_prefix_tokens else 1))[0]))
        scoring = None  # MACs (1,)
        if controller.rank:
            available = graph.op("Shape", image.active)
            scoring = graph.op("Mul", available, graph.ints(controller.token_score_macs))
            needed = graph.op("Add", scoring, needed)
        depth = graph.op("Greater", said.depth, graph.constant([0.0], FLOAT))
        depth = graph.op("And", depth, graph.op("GreaterOrEqual", image.left, needed))
        if not cost.num_prefix_tokens and not controller.rank:  # without any row there is nothing to execute
            depth = graph.op("And", depth, graph.op("Greater", graph.op("Shape", image.active), graph.ints(0)))

        def skip(inner: Graph, image: Image = image) -> list[str]:
            left = inner.ints(-1) if self.rules.leaves else image.left  # who left can pay for no block
            return [*astuple(replace(image, left=left)), inner.constant([False]), self.no_heads, self.no_tokens]

        def execute(inner: Graph) -> list[str]:
            paid = image
            if scoring is not None:
                left, macs = inner.op("Sub", image.left, scoring), inner.op("Add", image.macs, scoring)
                paid = replace(image, left=left, macs=macs)
            if not controller.rank:
                return self._execute(inner, writer, paid, said, None, inner.op("Shape", image.active))
            ranked, count = self._tokens(inner, controller, image, said)
            if cost.num_prefix_tokens:
                return self._execute(inner, writer, paid, said, ranked, count)
            return inner.choose(
                inner.op("Greater", count, inner.ints(0)),
                lambda g: self._execute(g, writer, paid, said, ranked, count),
                lambda g: skip(g, paid),
            )

        *after, depth, heads, tokens = graph.choose(depth, execute, skip)
        return Image(*after), Done(depth, heads, tokens)

    def _said(self, graph: Graph, index: int, image: Image) -> Said:
        """As `Formula` has it."""
        c, grains = self.controllers[index], self.columns[index]
        heads = self.cost.num_heads if self.decides_heads else 0
        layers = [(c.gates.weight[: 1 + heads], c.gates.bias[: 1 + heads])]
        if c.rank:
            layers.append((c.query.weight[-1:], c.query.bias[-1:]))
        layers.append((c.difficulty.weight, c.difficulty.bias))
        weight, bias = (torch.cat(parts).float() for parts in zip(*layers, strict=True))
        bounds = torch.tensor([LOGIT_BOUND] * len(grains) + [DIFFICULTY_BOUND])
        weight, bias = weight / bounds[:, None], bias / bounds
        compares = c.rank and not c.even  # else all tokens have the same content
        if compares:
            key = c.key.weight.t().float()  # what tokens are compared with is one layer of the context, as in `Formula`
            weight = torch.cat([weight, key @ c.query.weight[:-1].float()])
            bias = torch.cat([bias, key @ c.query.bias[:-1].float()])
        seen = self._normalised(graph, graph.op("Concat", *self._means(graph, image), axis=0))
        seen = graph.op("Reshape", seen, graph.ints(1, -1))
        read = graph.op("Gemm", seen, graph.constant(array(c.pooled.weight.t())), self.contexts[index])
        content = graph.op(
            "Gemm", graph.op("Gelu", read), graph.constant(array(weight.t())), graph.constant(array(bias))
        )
        direction = None
        if compares:
            content, direction = graph.split(content, [len(bounds), c.embed_dim], axis=1)
        mixing = np.zeros((len(bounds), len(grains)), FLOAT)  # from bounded contents to logits
        mixing[: len(grains)] = np.eye(len(grains)) * LOGIT_BOUND
        mixing[-1] = DIFFICULTY_BOUND * array(torch.nn.functional.softplus(c.gain.float()))[grains]
        logits = graph.op("Gemm", graph.op("Tanh", content), graph.constant(mixing), self.shifts[index])
        sizes = [size for size in (1, heads, int(bool(c.rank))) if size]
        parts = graph.split(graph.op("Reshape", logits, graph.ints(-1)), sizes)
        return Said(parts[0], parts[1] if heads else None, parts[-1] if c.rank else None, direction)

    def _means(self, graph: Graph, image: Image) -> tuple[str, str]:
        """Of the active patch tokens and of the prefix tokens, (1, C) each."""
        prefix = self.cost.num_prefix_tokens
        first = graph.op("Slice", image.rows, graph.ints(0), graph.ints(prefix)) if prefix else ""
        if prefix > 1:
            first = graph.op("ReduceSum", first, graph.ints(0), keepdims=1)
        if self.packed:  # a sum over all rows, less the prefix, copies nothing
            total = graph.op("Sub", graph.op("ReduceSum", image.rows, graph.ints(0), keepdims=1), first)
        else:
            total = graph.op("ReduceSum", self._active_rows(graph, image), graph.ints(0), keepdims=1)
        count = graph.op("Max", graph.op("Shape", image.active), graph.ints(1))
        pooled = graph.op("Div", total, graph.op("Cast", count, to=TensorProto.FLOAT))
        if prefix > 1:
            first = graph.op("Mul", first, graph.constant(1 / prefix, FLOAT))
        return pooled, first or pooled

    def _active_rows(self, graph: Graph, image: Image) -> str:
        """Rows (active, C) of the tokens that may be kept."""
        prefix = self.cost.num_prefix_tokens
        if self.packed:
            return str(graph.op("Slice", image.rows, graph.ints(prefix), graph.ints(2**31)))
        rows = graph.op("Add", image.active, graph.ints(prefix)) if prefix else image.active
        return str(graph.op("Gather", image.rows, rows, axis=0))

    def _tokens(self, graph: Graph, controller: Controller, image: Image, said: Said) -> tuple[str, str]:
        """The active tokens, best first, by their place among the active; and how many are kept, (1,)."""
        available, logit = graph.op("Shape", image.active), said.tokens or ""
        if controller.dithers:
            thresholds = graph.constant(controller.thresholds(self.cost.grid), FLOAT)
            logit = graph.op("Add", logit, graph.op("Gather", thresholds, image.active, axis=0))
        if said.direction is not None:
            tokens = self._normalised(graph, self._active_rows(graph, image))
            scores = graph.op("MatMul", tokens, graph.op("Squeeze", said.direction, graph.ints(0)))
            bounded = graph.op("Tanh", graph.op("Mul", scores, graph.constant(1 / LOGIT_BOUND, FLOAT)))
            logit = graph.op("Add", graph.op("Mul", bounded, graph.constant(LOGIT_BOUND, FLOAT)), logit)
        _, places = graph.op("TopK", logit, available, outputs=2, axis=0)
        count = self._how_many(graph, graph.op("Greater", logit, graph.constant(0.0, FLOAT)))
        if self.multiple > 1:
            count = self._rounded_up(graph, count, available)
        return places, count

    def _rounded_up(self, graph: Graph, count: str, available: str) -> str:
        """As `deciding.rounded_up`: rows up to a multiple, where any token is kept."""
        prefix, multiple = self.cost.num_prefix_tokens, graph.ints(self.multiple)
        rows = graph.op("Add", count, graph.ints(prefix + self.multiple - 1))
        wanted = graph.op("Sub", graph.op("Mul", graph.op("Div", rows, multiple), multiple), graph.ints(prefix))
        wanted = graph.op("Min", wanted, available)
        return str(graph.op("Where", graph.op("Greater", count, graph.ints(0)), wanted, count))

    def _execute(
        self, graph: Graph, writer: BlockWriter, image: Image, said: Said, ranked: str | None, count: str
    ) -> list[str]:
        """ranked: the active tokens, best first, by their place among the active; None: none is to be dropped."""
        cost, index = self.cost, writer.index
        heads, num_heads = self.every_head, graph.ints(cost.num_heads)
        if said.heads is not None:
            heads = self._heads(graph, said.heads)
            num_heads = graph.op("ReduceSum", graph.op("Cast", heads, to=TensorProto.INT64), graph.ints(0), keepdims=1)
        table = _block_macs(cost, index)  # (H + 1, N + 1)
        macs = self._macs(graph, table, num_heads if said.heads is not None else None, count)

        def cut(inner: Graph) -> list[str]:
            fewer_heads, fewer = self._capped(inner, inner.constant(table), image, num_heads, count)
            last = inner.op("Range", inner.constant(0, INT), inner.op("Squeeze", count), inner.constant(1, INT))
            places = inner.op("Slice", ranked or last, inner.ints(0), fewer)
            cheaper = self._macs(inner, table, fewer_heads, fewer)
            return [self._first(inner, heads, fewer_heads), fewer_heads, *self._kept(inner, image, places), cheaper]

        def as_asked(inner: Graph) -> list[str]:
            if ranked is None:
                rows = image.rows if self.packed else self._rows(inner, image, None)
                return [heads, num_heads, rows, image.active, image.is_active, macs]
            places = inner.op("Slice", ranked, inner.ints(0), count)
            return [heads, num_heads, *self._kept(inner, image, places), macs]

        kept = Kept(*graph.choose(graph.op("Greater", macs, image.left), cut, as_asked))
        angles = None
        if self.rotary is not None:
            where = self._places_in_all(graph, kept.active)
            angles = Angles.of(graph, self.rotary, writer.block, index).at(where)
        after = self._block(graph, writer, kept, angles)
        if not self.packed:
            where = graph.constant(np.arange(cost.num_prefix_tokens))
            if not cost.trims(index):
                where = self._places_in_all(graph, kept.active)
            after = graph.op("ScatterND", image.rows, graph.op("Unsqueeze", where, graph.ints(1)), after)
        spent, left = graph.op("Add", image.macs, kept.macs), graph.op("Sub", image.left, kept.macs)
        image = replace(image, rows=after, macs=spent, left=left)
        if self.rules.progressive:
            image = replace(image, active=kept.active, is_active=kept.is_active)
        return [*astuple(image), graph.constant([True]), kept.heads, kept.is_active]

    @staticmethod
    def _macs(graph: Graph, table: Any, num_heads: str | None, count: str) -> str:
        """MACs (1,) of so many heads, None: all, and tokens."""
        if num_heads is None:
            return str(graph.op("Gather", graph.constant(table[-1]), count))
        found = graph.op("GatherND", graph.constant(table), graph.op("Concat", num_heads, count, axis=0))
        return str(graph.op("Reshape", found, graph.ints(1)))

    def _first(self, graph: Graph, heads: str, count: str) -> str:
        """The first `count` of those asked for, (H,) bool."""
        if self.rules.nested_heads:
            return str(graph.op("Less", graph.constant(np.arange(self.cost.num_heads)), count))
        order = graph.op("CumSum", graph.op("Cast", heads, to=TensorProto.INT64), graph.constant(0, INT))
        return str(graph.op("And", heads, graph.op("LessOrEqual", order, count)))

    def _kept(self, graph: Graph, image: Image, places: str) -> tuple[str, str, str]:
        """Rows, active and is_active of the tokens in these places among the active."""
        active = graph.op("Gather", image.active, places, axis=0)
        trues = graph.op("Expand", graph.constant([True]), graph.op("Shape", active))
        is_active = graph.op("ScatterElements", self.no_tokens, active, trues)
        return self._rows(graph, image, places), active, is_active

    def _rows(self, graph: Graph, image: Image, places: str | None) -> str:
        """Rows (P + kept, C). places: of the kept tokens among the active; None: all of them."""
        if self.packed:
            where = self._places_in_all(graph, places or "")
        else:
            active = image.active if places is None else graph.op("Gather", image.active, places, axis=0)
            where = self._places_in_all(graph, active)
        return str(graph.op("Gather", image.rows, where, axis=0))

    def _places_in_all(self, graph: Graph, patches: str) -> str:
        """The prefix rows and these patch rows."""
        prefix = self.cost.num_prefix_tokens
        if not prefix:
            return patches
        rows = graph.op("Add", patches, graph.ints(prefix))
        return str(graph.op("Concat", graph.constant(np.arange(prefix)), rows, axis=0))

    def _heads(self, graph: Graph, own: str) -> str:
        """The heads (H,) bool that are kept rather than not, at least one, by their logits."""
        count = self.cost.num_heads
        kept = graph.op("Greater", own, graph.constant(0.0, FLOAT))
        if self.rules.nested_heads:
            first = graph.constant(np.arange(count) == 0)
            stops = graph.op("Not", graph.op("Or", kept, first))
            stops = graph.op("CumSum", graph.op("Cast", stops, to=TensorProto.INT64), graph.constant(0, INT))
            return str(graph.op("Equal", stops, graph.ints(0)))
        best = graph.op("ArgMax", own, axis=0, keepdims=1)
        return str(graph.op("Or", kept, graph.op("Equal", graph.constant(np.arange(count)), best)))

    def _capped(self, graph: Graph, table: str, image: Image, num_heads: str, count: str) -> tuple[str, str]:
        """Heads and tokens (1,) cut to what is left: fewer tokens first, then fewer heads (`cap.RemainingMacs`)."""
        fewest = 0 if self.cost.num_prefix_tokens else 1
        fits = graph.op("LessOrEqual", table, image.left)
        at_fewest = graph.op("Gather", fits, graph.constant(fewest, INT), axis=1)  # (H + 1,), falling from True
        most = graph.op("Sub", self._how_many(graph, at_fewest), graph.ints(1))
        heads = graph.op("Min", num_heads, most)
        for_heads = graph.op("Squeeze", graph.op("Gather", fits, heads, axis=0), graph.ints(0))
        tokens = graph.op("Min", count, graph.op("Sub", self._how_many(graph, for_heads), graph.ints(1)))
        tokens = graph.op("Where", graph.op("Equal", heads, num_heads), tokens, graph.ints(fewest))
        return heads, tokens

    def _block(self, graph: Graph, writer: BlockWriter, kept: Kept, angles: Angles | None) -> str:
        """The block under the heads that are kept, each choice a branch with its own constants."""

        def write(graph: Graph, heads: list[int]) -> str:
            return writer.write(graph, kept.rows, heads, angles)

        if self.rules.nested_heads:
            return self._nested(graph, write, kept.num_heads, self.cost.num_heads)
        return self._subset(graph, write, kept.heads, 0, [])

    def _nested(self, graph: Graph, write: Write, num_heads: str, most: int) -> str:
        if most == 1:
            return write(graph, [0])
        this = graph.op("Equal", num_heads, graph.ints(most))
        return graph.choose(
            this,
            lambda g: [write(g, list(range(most)))],
            lambda g: [self._nested(g, write, num_heads, most - 1)],
        )[0]

    def _subset(self, graph: Graph, write: Write, kept_heads: str, head: int, kept: list[int]) -> str:
        """A branch for every subset."""
        if head == self.cost.num_heads:
            return write(graph, kept or [0])
        this = graph.op("Gather", kept_heads, graph.ints(head), axis=0)
        return graph.choose(
            this,
            lambda g: [self._subset(g, write, kept_heads, head + 1, [*kept, head])],
            lambda g: [self._subset(g, write, kept_heads, head + 1, kept)],
        )[0]

    # Small pieces ----------------------------------------------------------------------------------------------------

    def _normalised(self, graph: Graph, rows: str) -> str:
        scale = graph.constant(np.ones(self.cost.embed_dim), FLOAT)
        return str(graph.op("LayerNormalization", rows, scale, axis=-1, epsilon=1e-5))

    @staticmethod
    def _how_many(graph: Graph, flags: str) -> str:
        """(1,) int64."""
        return str(graph.op("ReduceSum", graph.op("Cast", flags, to=TensorProto.INT64), graph.ints(0), keepdims=1))


def write_log_price(graph: Graph, budget: str, table: Calibration, scale: Tensor) -> str:
    """What controllers see at a budget, (1,): `Calibration.price`, and the model's unit of prices."""
    slope, shift = scale.tolist()
    seen = np.clip(slope * np.log(np.array(table.prices)) + shift, LEAST_LOG_PRICE, LOG_PRICE_RANGE[1])
    fractions = np.array(table.fractions)  # falling
    apart = np.diff(fractions.astype(np.float32), append=-np.inf) < 0  # in the file's precision, as divisors must be
    seen, fractions = seen[apart], fractions[apart]
    if len(fractions) == 1:
        return graph.constant(seen, FLOAT)
    clipped = graph.op("Clip", budget, graph.constant(fractions[-1], FLOAT), graph.constant(fractions[0], FLOAT))
    above = graph.op("Less", clipped, graph.constant(fractions, FLOAT))  # a run of True from the start
    place = AdaptiveWriter._how_many(graph, above)
    upper = graph.op("Max", graph.op("Min", place, graph.ints(len(fractions) - 1)), graph.ints(1))
    lower = graph.op("Sub", upper, graph.ints(1))
    f0, f1, p0, p1 = (
        graph.op("Gather", graph.constant(values, FLOAT), where)
        for values, where in ((fractions, lower), (fractions, upper), (seen, lower), (seen, upper))
    )
    share = graph.op("Div", graph.op("Sub", f0, clipped), graph.op("Sub", f0, f1))
    return str(graph.op("Add", p0, graph.op("Mul", share, graph.op("Sub", p1, p0))))


def _gates(cost: Cost, num_heads: int, num_tokens: int) -> HostGates:
    heads, tokens = np.arange(cost.num_heads)[None] < num_heads, np.arange(cost.num_patches)[None] < num_tokens
    return HostGates(np.ones(1, bool), heads, tokens)


def _block_macs(cost: Cost, index: int) -> Any:
    """MACs of a block by how many of its first heads and how many tokens it keeps: (H + 1, N + 1) int64."""
    return np.array(
        [
            [int(cost.of_host(index, _gates(cost, k, n))[0]) for n in range(cost.num_patches + 1)]
            for k in range(cost.num_heads + 1)
        ]
    )
