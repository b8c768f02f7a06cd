"""The adaptive forward pass of one image as ONNX nodes: decide, skip by `If`, gather what is kept.

In progressive scope, where only prefix rows are read in the end, the rows that are left are carried packed and those
that were dropped are forgotten; else all rows are carried, and what a block changed is scattered back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from miaformer.export.blocks import BlockWriter
from miaformer.export.graph import Graph, TensorProto, array
from miaformer.export.weights import Weight
from miaformer.model.budget import Calibration

FLOAT, INT = np.float32, np.int64


@dataclass(frozen=True)
class Image:
    """The image on its way. Values of the graph."""

    rows: str  # (P + active, C) where packed, else (P + N, C)
    active: str  # (active,) int64, which patch tokens may be kept, ascending or as they were ranked
    macs: str  # (1,) int64, spent
    left: str  # (1,) int64, what the cap leaves; negative where the image has left


@dataclass(frozen=True)
class Done:
    """A block's trace. Values of the graph, False where it was skipped."""

    depth: str  # (1,) bool
    heads: str  # (H,) bool
    tokens: str  # (N,) bool


class AdaptiveWriter:
    """Writes the blocks of a model, each behind its controller."""

    def __init__(self, graph: Graph, model: Any, log_price: str, weight: type[Weight]) -> None:
        self.model, self.cost, self.weight = model, model.cost(), weight
        config = model.adapt_config
        self.rules = config.rules
        self.packed = self.rules.progressive and self.cost.trims_last_block
        self.multiple = config.rows_multiple(self.cost.num_patches)
        self.controllers: list[Controller] = list(model.controllers)
        self.log_price = log_price
        self.prices = self._price_parts(graph)

    def _price_parts(self, graph: Graph) -> str:
        """What the price adds to the context of each block, (L, hidden)."""
        low, high = LOG_PRICE_RANGE
        width = (high - low) / (PRICE_FEATURES - 1)
        clipped = graph.op("Clip", self.log_price, graph.constant(low, FLOAT), graph.constant(high, FLOAT))
        offsets = graph.op("Sub", clipped, graph.constant(np.linspace(low, high, PRICE_FEATURES), FLOAT))
        scaled = graph.op("Mul", graph.op("Mul", offsets, offsets), graph.constant(-0.5 / width**2, FLOAT))
        features = graph.op("Unsqueeze", graph.op("Exp", scaled), graph.ints(1))  # (features, 1)
        weights = graph.constant(np.stack([array(c.price.weight) for c in self.controllers]))
        parts = graph.op("Squeeze", graph.op("MatMul", weights, features), graph.ints(2))
        return str(graph.op("Add", parts, graph.constant(np.stack([array(c.pooled.bias) for c in self.controllers]))))

    def write(self, graph: Graph, index: int, block: Any, image: Image) -> tuple[Image, Done]:
        """One block: the image after it, and what was done."""
        controller, cost = self.controllers[index], self.cost
        writer = BlockWriter.of(graph, cost, block, index, self.weight)
        logits, direction = self._logits(graph, index, image)
        depth = graph.op("Greater", self._at(graph, logits, 0), graph.constant([0.0], FLOAT))
        scoring = self._scoring(graph, controller, image)
        least = int(cost.of_host(index, _gates(cost, 1, 0 if cost.num_prefix_tokens else 1))[0])
        needed = graph.op("Add", scoring, graph.ints(least))
        depth = graph.op("And", depth, graph.op("GreaterOrEqual", image.left, needed))
        if not cost.num_prefix_tokens and not controller.rank:  # without any row there is nothing to execute
            depth = graph.op("And", depth, graph.op("Greater", graph.op("Shape", image.active), graph.ints(0)))
        nothing = [graph.constant(np.zeros(n, bool)) for n in (cost.num_heads, cost.num_patches)]

        def execute(inner: Graph) -> list[str]:
            left = inner.op("Sub", image.left, scoring)
            macs = inner.op("Add", image.macs, scoring)
            ranked, count = self._tokens(inner, controller, image, logits, direction)
            if not cost.num_prefix_tokens:
                some = inner.op("Greater", count, inner.ints(0))
                return inner.choose(
                    some,
                    lambda g: self._execute(g, writer, replace(image, macs=macs, left=left), logits, ranked, count),
                    lambda g: [
                        image.rows,
                        image.active,
                        macs,
                        g.ints(-1) if self.rules.leaves else left,
                        g.constant([False]),
                        *nothing,
                    ],
                )
            return self._execute(inner, writer, replace(image, macs=macs, left=left), logits, ranked, count)

        def skip(inner: Graph) -> list[str]:
            left = inner.ints(-1) if self.rules.leaves else image.left  # who left can pay for no block
            return [image.rows, image.active, image.macs, left, inner.constant([False]), *nothing]

        rows, active, macs, left, *done = graph.choose(depth, execute, skip)
        return Image(rows, active, macs, left), Done(*done)

    def _logits(self, graph: Graph, index: int, image: Image) -> tuple[str, str]:
        """Logits (1, J) and the direction (1, C) that tokens are compared with: those of `Formula`."""
        c, prefix = self.controllers[index], self.cost.num_prefix_tokens
        weights: list[Tensor] = [c.gates.weight]
        biases: list[Tensor] = [c.gates.bias]
        if c.rank:
            weights.append(c.query.weight[-1:])
            biases.append(c.query.bias[-1:])
        grains = [0] + [1] * (c.gates.out_features - 1) + [2] * bool(c.rank)
        bounds = torch.tensor([LOGIT_BOUND] * len(grains) + [DIFFICULTY_BOUND])
        outputs = torch.cat([*weights, c.difficulty.weight]).float() / bounds[:, None]
        outputs_bias = torch.cat([*biases, c.difficulty.bias]).float() / bounds
        if c.rank:
            key = c.key.weight.t().float()  # what tokens are compared with is one layer of the context, as in `Formula`
            outputs = torch.cat([outputs, key @ c.query.weight[:-1].float()])
            outputs_bias = torch.cat([outputs_bias, key @ c.query.bias[:-1].float()])
        first = graph.op("Slice", image.rows, graph.ints(0), graph.ints(prefix)) if prefix else ""
        if prefix > 1:
            first = graph.op("ReduceSum", first, graph.ints(0), keepdims=1)
        if self.packed:  # a sum over all rows, less the prefix, copies nothing
            total = graph.op("Sub", graph.op("ReduceSum", image.rows, graph.ints(0), keepdims=1), first)
        else:
            total = graph.op("ReduceSum", self._active_rows(graph, image), graph.ints(0), keepdims=1)
        count = graph.op("Max", graph.op("Shape", image.active), graph.ints(1))
        pooled = means = graph.op("Div", total, graph.op("Cast", count, to=TensorProto.FLOAT))
        if prefix:
            means = first if prefix == 1 else graph.op("Mul", first, graph.constant(1 / prefix, FLOAT))
        seen = self._normalised(graph, graph.op("Concat", pooled, means, axis=0))
        seen = graph.op("Reshape", seen, graph.ints(1, -1))
        price = graph.op("Gather", self.prices, graph.ints(index), axis=0)
        read = graph.op("Gemm", seen, graph.constant(array(c.pooled.weight.t())), price)
        context = graph.op("Gelu", read)
        out = graph.op("Gemm", context, graph.constant(array(outputs.t())), graph.constant(array(outputs_bias)))
        content, direction = out, ""
        if c.rank:
            content, direction = graph.op("Split", out, graph.ints(len(bounds), c.embed_dim), outputs=2, axis=1)
        mixing = np.zeros((len(bounds), len(grains)), FLOAT)  # from bounded contents to logits
        mixing[: len(grains)] = np.eye(len(grains)) * LOGIT_BOUND
        mixing[-1] = DIFFICULTY_BOUND * array(torch.nn.functional.softplus(c.gain.float()))[grains]
        slopes = array(torch.nn.functional.softplus(c.slope.float()))[grains]
        shift = graph.op(
            "Sub",
            graph.constant(np.array(c.keep_logits)[grains], FLOAT),
            graph.op("Mul", self.log_price, graph.constant(slopes)),
        )
        return graph.op("Gemm", graph.op("Tanh", content), graph.constant(mixing), shift), direction

    def _active_rows(self, graph: Graph, image: Image) -> str:
        """Rows (active, C) of the tokens that may be kept."""
        prefix = self.cost.num_prefix_tokens
        if self.packed:
            return str(graph.op("Slice", image.rows, graph.ints(prefix), graph.ints(2**31)))
        rows = graph.op("Add", image.active, graph.ints(prefix)) if prefix else image.active
        return str(graph.op("Gather", image.rows, rows, axis=0))

    def _scoring(self, graph: Graph, controller: Controller, image: Image) -> str:
        """MACs (1,) of scoring the tokens."""
        if not controller.rank:
            return graph.ints(0)
        return str(graph.op("Mul", graph.op("Shape", image.active), graph.ints(controller.token_score_macs)))

    def _tokens(
        self, graph: Graph, controller: Controller, image: Image, logits: str, direction: str
    ) -> tuple[str, str]:
        """The active tokens, best first, by their place among the active; and how many are kept, (1,)."""
        available = graph.op("Shape", image.active)
        if not controller.rank:
            places = graph.op("Range", graph.constant(0, INT), graph.op("Squeeze", available), graph.constant(1, INT))
            return places, available
        tokens = self._normalised(graph, self._active_rows(graph, image))
        scores = graph.op("MatMul", tokens, graph.op("Squeeze", direction, graph.ints(0)))
        bounded = graph.op("Tanh", graph.op("Mul", scores, graph.constant(1 / LOGIT_BOUND, FLOAT)))
        shared = self._at(graph, logits, self.cost.num_heads + 1)
        logit = graph.op("Add", graph.op("Mul", bounded, graph.constant(LOGIT_BOUND, FLOAT)), shared)
        if controller.dithers:
            thresholds = graph.constant(controller.thresholds(self.cost.grid), FLOAT)
            logit = graph.op("Add", logit, graph.op("Gather", thresholds, image.active, axis=0))
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
        self, graph: Graph, writer: BlockWriter, image: Image, logits: str, ranked: str, count: str
    ) -> list[str]:
        cost, index = self.cost, writer.index
        heads = self._heads(graph, logits)
        num_heads = graph.op("ReduceSum", graph.op("Cast", heads, to=TensorProto.INT64), graph.ints(0), keepdims=1)
        table = graph.constant(_block_macs(cost, index))  # (H + 1, N + 1)
        num_heads, count = self._capped(graph, table, image, num_heads, count)
        macs = graph.op("GatherND", table, graph.op("Concat", num_heads, count, axis=0))
        macs = graph.op("Reshape", macs, graph.ints(1))
        if self.rules.nested_heads:
            kept_heads = graph.op("Less", graph.constant(np.arange(cost.num_heads)), num_heads)
        else:  # the first of those asked for
            order = graph.op("CumSum", graph.op("Cast", heads, to=TensorProto.INT64), graph.constant(0, INT))
            kept_heads = graph.op("And", heads, graph.op("LessOrEqual", order, num_heads))
        places = graph.op("Slice", ranked, graph.ints(0), count)

        def ordered(inner: Graph) -> list[str]:
            return [inner.op("Gather", image.active, places, axis=0), self._kept_rows(inner, image, places)]

        if self.controllers[index].rank:  # best first, from here on: a cap cuts the last ones
            active, rows = ordered(graph)
        else:
            everything = graph.op("Equal", count, graph.op("Shape", image.active))
            active, rows = graph.choose(
                everything, lambda inner: [image.active, self._kept_rows(inner, image, None)], ordered
            )
        changed = self._block(graph, writer, rows, kept_heads, num_heads)
        tokens = graph.op(
            "ScatterElements", graph.constant(np.zeros(cost.num_patches, bool)), active, self._trues(graph, active)
        )
        after = changed
        if not self.packed:
            where = graph.op("Add", active, graph.ints(cost.num_prefix_tokens))
            if cost.num_prefix_tokens:
                where = graph.op("Concat", graph.constant(np.arange(cost.num_prefix_tokens)), where, axis=0)
            if cost.trims(index):
                where = graph.constant(np.arange(cost.num_prefix_tokens))
            after = graph.op("ScatterND", image.rows, graph.op("Unsqueeze", where, graph.ints(1)), changed)
        next_active = active if self.rules.progressive else image.active
        spent = graph.op("Add", image.macs, macs)
        return [
            after,
            next_active,
            spent,
            graph.op("Sub", image.left, macs),
            graph.constant([True]),
            kept_heads,
            tokens,
        ]

    def _kept_rows(self, graph: Graph, image: Image, places: str | None) -> str:
        """Rows (P + kept, C). places: of the kept tokens among the active; None: all of them."""
        prefix = self.cost.num_prefix_tokens
        if places is None and self.packed:
            return image.rows
        if self.packed:
            rows = graph.op("Add", places or "", graph.ints(prefix))
        else:
            tokens = image.active if places is None else graph.op("Gather", image.active, places, axis=0)
            rows = graph.op("Add", tokens, graph.ints(prefix))
        if prefix:
            rows = graph.op("Concat", graph.constant(np.arange(prefix)), rows, axis=0)
        return str(graph.op("Gather", image.rows, rows, axis=0))

    def _heads(self, graph: Graph, logits: str) -> str:
        """The heads (H,) bool that are kept rather than not, at least one."""
        count = self.cost.num_heads
        own = graph.op("Slice", logits, graph.ints(1), graph.ints(1 + count), graph.ints(1))
        own = graph.op("Reshape", own, graph.ints(count))
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
        costs = graph.op("GatherND", table, graph.op("Concat", num_heads, count, axis=0))
        over = graph.op("Greater", graph.op("Reshape", costs, graph.ints(1)), image.left)

        def cut(inner: Graph) -> list[str]:
            fits = inner.op("LessOrEqual", table, image.left)
            at_fewest = inner.op("Gather", fits, inner.constant(fewest, INT), axis=1)  # (H + 1,), falling from True
            most = inner.op("Sub", self._how_many(inner, at_fewest), inner.ints(1))
            heads = inner.op("Min", num_heads, most)
            for_heads = inner.op("Squeeze", inner.op("Gather", fits, heads, axis=0), inner.ints(0))
            tokens = inner.op("Min", count, inner.op("Sub", self._how_many(inner, for_heads), inner.ints(1)))
            tokens = inner.op("Where", inner.op("Equal", heads, num_heads), tokens, inner.ints(fewest))
            return [heads, tokens]

        heads, tokens = graph.choose(over, cut, lambda _: [num_heads, count])
        return heads, tokens

    def _block(self, graph: Graph, writer: BlockWriter, rows: str, kept_heads: str, num_heads: str) -> str:
        """The block under the heads that are kept, each choice a branch with its own constants."""
        total = self.cost.num_heads
        if self.rules.nested_heads:
            return self._nested(graph, writer, rows, num_heads, total)
        return self._subset(graph, writer, rows, kept_heads, 0, [])

    def _nested(self, graph: Graph, writer: BlockWriter, rows: str, num_heads: str, most: int) -> str:
        if most == 1:
            return writer.write(graph, rows, [0])
        this = graph.op("Equal", num_heads, graph.ints(most))
        return graph.choose(
            this,
            lambda g: [writer.write(g, rows, list(range(most)))],
            lambda g: [self._nested(g, writer, rows, num_heads, most - 1)],
        )[0]

    def _subset(self, graph: Graph, writer: BlockWriter, rows: str, kept_heads: str, head: int, kept: list[int]) -> str:
        """A branch for every subset."""
        if head == self.cost.num_heads:
            return writer.write(graph, rows, kept or [0])
        this = graph.op("Gather", kept_heads, graph.ints(head), axis=0)
        return graph.choose(
            this,
            lambda g: [self._subset(g, writer, rows, kept_heads, head + 1, [*kept, head])],
            lambda g: [self._subset(g, writer, rows, kept_heads, head + 1, kept)],
        )[0]

    # Small pieces ----------------------------------------------------------------------------------------------------

    def _normalised(self, graph: Graph, rows: str) -> str:
        scale = graph.constant(np.ones(self.cost.embed_dim), FLOAT)
        return str(graph.op("LayerNormalization", rows, scale, axis=-1, epsilon=1e-5))

    @staticmethod
    def _at(graph: Graph, logits: str, column: int) -> str:
        """One of the logits, (1,)."""
        one = graph.op("Slice", logits, graph.ints(column), graph.ints(column + 1), graph.ints(1))
        return str(graph.op("Reshape", one, graph.ints(1)))

    @staticmethod
    def _how_many(graph: Graph, flags: str) -> str:
        """(1,) int64."""
        return str(graph.op("ReduceSum", graph.op("Cast", flags, to=TensorProto.INT64), graph.ints(0), keepdims=1))

    @staticmethod
    def _trues(graph: Graph, like: str) -> str:
        return str(graph.op("Expand", graph.constant([True]), graph.op("Shape", like)))


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
