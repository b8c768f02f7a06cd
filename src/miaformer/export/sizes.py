"""A model that chooses resolutions, as ONNX nodes: one look at an image, in the size that budget and cap allow.

The image is made smaller in the graph, so that whoever runs it prepares pictures as ever. A branch for each size gives
the embedded rows; the blocks come once, for any number of them. Where an early answer is as confident as `leave` says,
the blocks that are left are skipped (`model.early_exit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from miaformer.export.blocks import Angles, BlockWriter
from miaformer.export.graph import Graph
from miaformer.export.parts import Head, exported, rotary_of, write_embedding
from miaformer.export.weights import Weight
from miaformer.model.early_exit import NEVER, answers_early, asking_macs, exit_blocks, macs_of_leaving
from miaformer.model.looks import STEP
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size
from miaformer.vit.backbone import transformer_blocks

CAP_ROUNDING = 1e-6  # caps arrive as float32


@dataclass(frozen=True)
class Looked:
    """What a look gives. Values of the graph."""

    rows: str  # (P, C), or (P + n, C), after the last block that was executed
    macs: str  # (1,) int64
    num_patches: str  # (1,) int64
    executed: str  # (L,) bool, the blocks
    answers: str  # (K, classes), early ones where they were asked for


class SizesWriter:
    """Writes one look of a model that chooses resolutions."""

    def __init__(self, model: MIAFormer, weight: type[Weight]) -> None:
        self.model, self.weight, self.cost = model, weight, model.cost()
        self.blocks = transformer_blocks(model.backbone)
        self.angles: Angles | None = None  # of the size that was chosen
        self.exits = exit_blocks(self.cost.depth) if answers_early(model.backbone) else ()
        rows = self.cost.num_prefix_tokens + (0 if self.cost.trims_last_block else self.cost.num_patches)
        varies = None if self.cost.trims_last_block else 1
        self.head = exported(Head(model), torch.zeros(1, rows, self.cost.embed_dim), varies)

    def write(self, graph: Graph) -> Looked:
        """Reads the graph's inputs `images`, `budget`, `cap` and `leave`."""
        largest = graph.op("Add", "budget", graph.constant(STEP / 2, np.float32))
        most = graph.op("Add", "cap", graph.constant(CAP_ROUNDING, np.float32))
        asks = graph.op("Less", "leave", graph.constant(NEVER, np.float32))
        asking = self._fraction(asking_macs(self.cost, self.exits))
        pays = graph.constant(self._fraction(self.model.least_macs()) + asking, np.float32)
        asks = graph.op("And", asks, graph.op("LessOrEqual", pays, most))
        spared = graph.op("Where", asks, graph.constant(asking, np.float32), graph.constant(0.0, np.float32))
        limit = graph.op("Min", largest, graph.op("Sub", most, spared))
        rows, staying, leaving, count, *turning = self._chosen(graph, limit, self.model.image_sizes())
        if turning:
            sin, cos = turning
            half = bool(getattr(self.blocks[0].attn, "rotate_half", False))
            self.angles = Angles(sin, cos, each_head=False, half=half)
        # No answers yet: OpenVINO takes a constant without elements for one without dimensions.
        none = graph.constant(np.zeros((1, self.model.num_classes or self.model.num_features)), np.float32)
        nothing = graph.op("Slice", none, graph.ints(0), graph.ints(0))
        rows, place, answers = self._from(graph, 0, rows, asks, nothing)
        macs = graph.op("Gather", graph.op("Where", asks, leaving, staying), place)
        executed = np.arange(self.cost.depth) < np.array([*self.exits, self.cost.depth])[:, None]
        executed = graph.op("Squeeze", graph.op("Gather", graph.constant(executed), place), graph.ints(0))
        return Looked(rows, macs, count, executed, answers)

    def _fraction(self, macs: int) -> float:
        return macs / self.cost.backbone

    def _chosen(self, graph: Graph, limit: str, sizes: tuple[Size, ...]) -> list[str]:
        """Of the largest of these sizes within the limit, a fraction of the MACs, or of the last: rows; MACs (K,) of
        each place to leave and of the end, without early answers and with them; how many patch tokens there are; and
        sines and cosines of rotary position embeddings, where there are any.
        """
        size, *smaller = sizes
        cost = self.model.cost(size)

        def here(inner: Graph) -> list[str]:
            leaving = macs_of_leaving(cost, self.exits)
            staying = [cost.everything] * len(leaving)
            rows = write_embedding(inner, self.model, size)
            rotary, turning = rotary_of(self.model, size), []
            if rotary is not None:
                angles = Angles.of(inner, rotary, self.blocks[0], 0)
                turning = [angles.sin, angles.cos]
            return [rows, inner.ints(*staying), inner.ints(*leaving), inner.ints(cost.num_patches), *turning]

        if not smaller:
            return here(graph)
        fits = graph.op("LessOrEqual", graph.constant(self._fraction(cost.everything), np.float32), limit)
        return graph.choose(fits, here, lambda inner: self._chosen(inner, limit, tuple(smaller)))

    def _from(self, graph: Graph, place: int, rows: str, asks: str, answers: str) -> list[str]:
        """From one place to leave at to the end: rows, the place (1,) that was left at, and answers (K, classes)."""
        ends = [0, *self.exits, self.cost.depth]
        every_head = list(range(self.cost.num_heads))
        for index in range(ends[place], ends[place + 1]):
            writer = BlockWriter.of(graph, self.cost, self.blocks[index], index, self.weight)
            rows = writer.write(graph, rows, every_head, self.angles)
        if place == len(self.exits):
            return [rows, graph.ints(place), answers]
        leaves, answers = graph.choose(
            asks, lambda inner: self._asked(inner, rows, answers), lambda inner: [inner.constant([False]), answers]
        )
        return graph.choose(
            leaves,
            lambda inner: [self._read(inner, rows), inner.ints(place), answers],
            lambda inner: self._from(inner, place + 1, rows, asks, answers),
        )

    def _asked(self, graph: Graph, rows: str, answers: str) -> list[str]:
        """Whether the answer that these rows give is confident enough (1,), and all answers so far."""
        logits = self.answer(graph, rows)
        confidence = graph.op("ReduceMax", graph.op("Softmax", logits, axis=1), graph.ints(1), keepdims=0)
        return [graph.op("GreaterOrEqual", confidence, "leave"), graph.op("Concat", answers, logits, axis=0)]

    def answer(self, graph: Graph, rows: str) -> str:
        """Logits (1, classes)."""
        rows = graph.op("Unsqueeze", self._read(graph, rows), graph.ints(0))
        return graph.include(self.head, [rows], graph.name("head") + "_")[0]

    def _read(self, graph: Graph, rows: str) -> str:
        """The rows that the classifier reads."""
        if not self.cost.trims_last_block:
            return rows
        return str(graph.op("Slice", rows, graph.ints(0), graph.ints(self.cost.num_prefix_tokens)))
