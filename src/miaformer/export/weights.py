"""Weights of linear layers in an ONNX graph, in float32 or in 8-bit integers, and products with parts of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaformer.export.graph import Graph, TensorProto, array

# Sums of two products of 8 bits each saturate at 16 bits on processors without VNNI; with 7-bit weights they cannot.
# The processor that will run a file is not known when it is written.
LARGEST = 63


class Weight:
    """A layer's weight (in, out), float32, stored once whatever parts of it are used."""

    def __init__(self, graph: Graph, layer: Any) -> None:
        self.value = graph.constant(array(layer.weight.t()))

    def product(self, graph: Graph, x: str, bias: NDArray[np.float32] | None, inputs: Any, outputs: Any) -> str:
        """x (n, inputs) times a part of the weight, plus bias (outputs,). inputs, outputs: indices; None: all."""
        weight = _cut(graph, self.value, inputs, outputs)
        if bias is None:
            return str(graph.op("MatMul", x, weight))
        return str(graph.op("Gemm", x, weight, graph.constant(bias)))


class Int8Weight(Weight):
    """The same in 8-bit integers with a scale for each output. Inputs are quantized as they come, by their range.

    The nodes are those that ONNX Runtime's own quantizer writes, which it fuses when a file is loaded.
    """

    def __init__(self, graph: Graph, layer: Any) -> None:
        weight = array(layer.weight.t())
        self.scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * LARGEST) / LARGEST  # (out,)
        self.value = graph.constant(np.rint(weight / self.scale).astype(np.int8))

    def product(self, graph: Graph, x: str, bias: NDArray[np.float32] | None, inputs: Any, outputs: Any) -> str:
        weight, scale = _cut(graph, self.value, inputs, outputs), self.scale if outputs is None else self.scale[outputs]
        rounded, step, zero = graph.op("DynamicQuantizeLinear", x, outputs=3)
        sums = graph.op("MatMulInteger", rounded, weight, zero, graph.constant(0, np.int8))
        out = graph.op(
            "Mul", graph.op("Cast", sums, to=TensorProto.FLOAT), graph.op("Mul", step, graph.constant(scale))
        )
        return str(out if bias is None else graph.op("Add", out, graph.constant(bias)))


def _cut(graph: Graph, weight: str, inputs: Any, outputs: Any) -> str:
    """Rows and columns of a stored weight: slices of it, joined, which are folded when the file is loaded."""
    for axis, part in ((0, inputs), (1, outputs)):
        if part is not None:
            breaks = np.flatnonzero(np.diff(part) != 1) + 1
            pieces = [
                graph.op("Slice", weight, graph.ints(int(run[0])), graph.ints(int(run[-1]) + 1), graph.ints(axis))
                for run in np.split(part, breaks)
            ]
            weight = pieces[0] if len(pieces) == 1 else graph.op("Concat", *pieces, axis=axis)
    return weight
