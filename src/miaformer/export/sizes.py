"""A model that chooses resolutions, as ONNX nodes: one look at an image, in the size that budget and cap allow.

The image is made smaller in the graph, so that whoever runs it prepares pictures as ever. A branch for each size gives
the embedded rows; the blocks come once, for any number of them.
"""

from __future__ import annotations

import numpy as np

from miaformer.export.blocks import BlockWriter
from miaformer.export.graph import Graph
from miaformer.export.parts import embedded
from miaformer.export.weights import Weight
from miaformer.model.looks import STEP
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size
from miaformer.vit.backbone import transformer_blocks

CAP_ROUNDING = 1e-6  # caps arrive as float32


def write(graph: Graph, model: MIAFormer, weight: type[Weight]) -> tuple[str, str, str]:
    """Rows (P, C) or (P + N, C) after the last block, MACs (1,) int64, and how many patch tokens there are (1,).

    Reads the graph's inputs `images`, `budget` and `cap`.
    """
    limit = graph.op("Add", "budget", graph.constant(STEP / 2, np.float32))
    limit = graph.op("Min", limit, graph.op("Add", "cap", graph.constant(CAP_ROUNDING, np.float32)))
    rows, macs, count = _chosen(graph, model, limit, model.image_sizes())
    cost = model.cost()
    every_head = list(range(cost.num_heads))
    for index, block in enumerate(transformer_blocks(model.backbone)):
        rows = BlockWriter.of(graph, cost, block, index, weight).write(graph, rows, every_head)
    return rows, macs, count


def _chosen(graph: Graph, model: MIAFormer, limit: str, sizes: tuple[Size, ...]) -> list[str]:
    """Of the largest of these sizes within the limit, a fraction of the MACs, or of the last one."""
    size, *smaller = sizes

    def here(inner: Graph) -> list[str]:
        cost = model.cost(size)
        rows = embedded(inner, model, size)
        return [rows, graph.ints(cost.everything), graph.ints(cost.num_patches)]

    if not smaller:
        return here(graph)
    fraction = graph.constant(model.cost(size).everything / model.cost().backbone, np.float32)
    fits = graph.op("LessOrEqual", fraction, limit)
    return graph.choose(fits, here, lambda inner: _chosen(inner, model, limit, tuple(smaller)))
