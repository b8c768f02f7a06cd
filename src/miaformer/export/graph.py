"""Writing an ONNX graph node by node, with subgraphs for `If` that see what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # Gelu
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators


class Graph:
    """Nodes in the order in which they run. A value is the name of a node's output.

    standard_ops: only operators of the ONNX standard, for runtimes that lack ONNX Runtime's own.
    """

    def __init__(self, outer: Graph | None = None, *, standard_ops: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.outer = outer
        self.standard_ops: bool = standard_ops if outer is None else outer.standard_ops
        self.root: Graph = self if outer is None else outer.root
        if outer is None:
            self.initializers: dict[str, onnx.TensorProto] = {}
            self._names = 0
            self._constants: dict[tuple[Any, ...], str] = {}
            self._included: dict[tuple[Any, ...], str] = {}

    def name(self, stem: str) -> str:
        self.root._names += 1
        return f"{stem}_{self.root._names}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """An array as an initializer of the whole graph; equal small ones are shared."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 64 else None
        if key is not None and key in self.root._constants:
            return self.root._constants[key]
        name = self.root.name("const")
        self.root.initializers[name] = numpy_helper.from_array(array.copy(order="C"), name)
        if key is not None:
            self.root._constants[key] = name
        return name

    def ints(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant(values, np.int64)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; the name of its output, or names where there are several."""
        names = [self.name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def split(self, value: str, sizes: Sequence[int], axis: int = 0) -> list[str]:
        """Parts of these sizes, along an axis."""
        if len(sizes) == 1:
            return [value]
        return list(self.op("Split", value, self.ints(*sizes), outputs=len(sizes), axis=axis))

    def choose(self, condition: str, *branches: Callable[[Graph], list[str]]) -> list[str]:
        """`If`: the values of the first branch where the condition holds, else those of the second."""
        protos, count = [], 0
        for branch in branches:
            inner = Graph(self)
            values = branch(inner)
            own = {name for node in inner.nodes for name in node.output}
            for place, value in enumerate(values):  # an output has to be a value of the branch's own, and each another
                if value not in own:
                    values[place] = inner.op("Identity", value)
                own.discard(value)
            count = len(values)
            outputs = [onnx.ValueInfoProto(name=value) for value in values]
            protos.append(helper.make_graph(inner.nodes, self.name("branch"), [], outputs))
        names = [self.name("If") for _ in range(count)]
        self.nodes.append(helper.make_node("If", [condition], names, then_branch=protos[0], else_branch=protos[1]))
        return names

    def include(self, model: onnx.ModelProto, inputs: list[str], prefix: str) -> list[str]:
        """Add another model's nodes and weights, fed with these values; its outputs. Equal weights are shared."""
        graph = onnx.compose.add_prefix(model, prefix).graph
        renamed = {one.name: value for one, value in zip(graph.input, inputs, strict=True)}
        for initializer in graph.initializer:
            held = initializer.raw_data or initializer.SerializeToString()  # numbers of other fields, and the name
            key = initializer.data_type, tuple(initializer.dims), held
            renamed[initializer.name] = self.root._included.setdefault(key, initializer.name)
            if renamed[initializer.name] == initializer.name:
                self.root.initializers[initializer.name] = initializer
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            self.nodes.append(node)
        return [renamed.get(one.name, one.name) for one in graph.output]

    def model(
        self, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[str, int, list[Any]]]
    ) -> onnx.ModelProto:
        """The finished model. inputs: name to element type and shape; outputs: name to value, type and shape."""
        for name, (value, _, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        graph = helper.make_graph(
            self.nodes,
            "miaformer",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, kind, shape) for name, (_, kind, shape) in outputs.items()],
        )
        _place(graph, self.initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        if not self.standard_ops:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(graph, opset_imports=opsets, producer_name="miaformer", ir_version=10)


def _place(graph: onnx.GraphProto, initializers: dict[str, onnx.TensorProto]) -> None:
    """Put each initializer into the innermost graph that holds all of its readers; what nobody reads is left out.

    ONNX Runtime arranges weights for its products when it loads a file, but only those of the graph that reads them:
    weights of a branch that lie outside of it are arranged at every run (docs/log.md).
    """
    places: dict[str, list[onnx.GraphProto]] = {}  # from the outermost graph to the innermost

    def visit(path: list[onnx.GraphProto]) -> None:
        for node in path[-1].node:
            for name in node.input:
                if name in initializers:
                    together = zip(places.get(name, path), path, strict=False)
                    places[name] = [one for one, other in together if one is other]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit([*path, attribute.g])

    visit([graph])
    for name, path in places.items():
        path[-1].initializer.append(initializers[name])


def array(tensor: Any) -> NDArray[Any]:
    """A torch tensor's values, float32 where they are floating point."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


__all__ = ["MICROSOFT", "OPSET", "Graph", "TensorProto", "array"]
