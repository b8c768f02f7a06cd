"""A model that chooses resolutions, as ONNX nodes: one look at an image, in the size that budget and cap allow.

The image is made smaller in the graph, so that whoever runs it prepares pictures as ever. A branch for each size gives
the embedded rows; the blocks come once, for any number of them.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from miaformer.export.blocks import BlockWriter
from miaformer.export.graph import Graph
from miaformer.export.parts import exported
from miaformer.model.looks import STEP
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size, resized
from miaformer.vit.backbone import transformer_blocks

CAP_ROUNDING = 1e-6  # caps arrive as float32


def write(graph: Graph, model: MIAFormer, size: Size | None = None) -> tuple[str, str, str]:
    """Rows (P, C) or (P + N, C) after the last block, MACs (1,) int64, and how many patch tokens there are (1,).

    Reads the graph's inputs `images`, `budget` and `cap`. size: always this one; the last two are not read then.
    """
    limit, sizes = "", model.image_sizes()
    if size is None:
        limit = graph.op("Add", "budget", graph.constant(STEP / 2, np.float32))
        limit = graph.op("Min", limit, graph.op("Add", "cap", graph.constant(CAP_ROUNDING, np.float32)))
    else:
        sizes = (size,)
    rows, macs, count = _chosen(graph, model, limit, sizes)
    cost = model.cost()
    every_head = list(range(cost.num_heads))
    for index, block in enumerate(transformer_blocks(model.backbone)):
        rows = BlockWriter.of(graph, cost, block, index).write(graph, rows, every_head)
    return rows, macs, count


def _chosen(graph: Graph, model: MIAFormer, limit: str, sizes: tuple[Size, ...]) -> list[str]:
    """Of the largest of these sizes within the limit, a fraction of the MACs, or of the last one."""
    size, *smaller = sizes

    def here(inner: Graph) -> list[str]:
        cost = model.cost(size)
        images = torch.zeros(1, model.backbone.in_chans, *model.image_size())
        embed = exported(_Embed(model, size), images)
        rows = inner.include(embed, ["images"], f"embed_{size[0]}x{size[1]}_")[0]
        return [rows, graph.ints(cost.everything), graph.ints(cost.num_patches)]

    if not smaller:
        return here(graph)
    fraction = graph.constant(model.cost(size).everything / model.cost().backbone, np.float32)
    fits = graph.op("LessOrEqual", fraction, limit)
    return graph.choose(fits, here, lambda inner: _chosen(inner, model, limit, tuple(smaller)))


class _Embed(nn.Module):
    """Rows (P + N, C) of an image (1, 3, H, W) looked at in this size, position embeddings resampled before."""

    def __init__(self, model: MIAFormer, size: Size) -> None:
        super().__init__()
        self.size = size
        blocks, model.backbone.blocks = model.backbone.blocks, nn.Sequential()
        try:
            self.backbone = copy.deepcopy(model.backbone)
        finally:
            model.backbone.blocks = blocks
        self.backbone.set_input_size(img_size=size)

    def forward(self, images: Tensor) -> Tensor:
        backbone = self.backbone
        small = resized(images, self.size)
        rows: Tensor = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(small)))[0]
        return rows
