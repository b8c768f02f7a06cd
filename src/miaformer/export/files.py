"""The two files that a model is exported to: one that skips at run time, or one policy without control flow."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from timm.models.eva import Eva

import miaformer
from miaformer.data.files import whole_file
from miaformer.engine.block import check_plain
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions
from miaformer.export.adaptive import AdaptiveWriter, Image, write_log_price
from miaformer.export.graph import Graph, TensorProto
from miaformer.export.parts import Head, exported, write_embedding
from miaformer.export.session import NO_CAP
from miaformer.export.sizes import SizesWriter
from miaformer.export.static import StaticModel
from miaformer.export.weights import Int8Weight, Weight
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size
from miaformer.vit.backbone import transformer_blocks

MOST_SUBSET_HEADS = 4  # a branch for every subset of heads: 16


def export_onnx(
    model: MIAFormer,
    path: str | Path,
    *,
    price: float | None = None,
    trace: bool = False,
    standard_ops: bool = False,
    int8: bool = False,
) -> None:
    """Write the adaptive model to one ONNX file, weights within, that skips at run time.

    Inputs: `images` (1, 3, H, W) float32, normalised; `budget` and `cap`, float32 scalars. Blocks are skipped by `If`,
    tokens by gathering, heads by branches over slices of weights that are folded when the file is loaded. Without a
    cap, give one above 1; a budget out of the calibrated range counts as the nearest end. A cap below `least_macs` of
    the file's metadata cannot be kept: everything is skipped then. A model that chooses resolutions looks at the image
    in the largest size that budget and cap allow, and in the smallest at least (`export.sizes`); its file has a third
    scalar, `leave`: an early answer of at least this confidence is final, and from 2 on none is computed. Outputs:
    `logits` (1, classes), of a model without a classifier its features, `macs_fraction` (1,), with `trace` also `depth`
    (1, L), `heads` (1, L, H), `tokens` (1, L, N), bool, `macs` (1,) int64, and of a model that chooses resolutions the
    early `answers` (K, classes).
    price: decide at this price, whatever budget is given; a model that is not calibrated needs one. standard_ops: only
    operators of the ONNX standard, for other runtimes; by default attention is ONNX Runtime's fused operator. int8:
    products of the blocks in 8-bit integers, their inputs quantized as they come; controllers, embedding and classifier
    stay float32. Rounding moves decisions, so calibrate such a file (`evaluation.int8.calibrated_int8`).

    Raises ValueError, naming it, for what cannot be exported.
    """
    _check_exportable(model)
    _check_subsets(model)
    if model.calibration is None and price is None:
        raise ValueError("the model is not calibrated, so its file would know no budget: calibrate it, or give price=")
    graph, cost, weight = Graph(standard_ops=standard_ops), model.cost(), Int8Weight if int8 else Weight
    if model.adapt_config.chooses_resolution:
        _export_sizes(graph, model, path, price, trace, weight)
        return
    log_price = _log_price(graph, model, price)
    writer = AdaptiveWriter(graph, model, log_price, weight)
    rows = write_embedding(graph, model)
    spent = graph.ints(model.least_macs())
    cap = graph.op("Clip", "cap", graph.constant(0.0, np.float32), graph.constant(NO_CAP, np.float32))
    cap = graph.op("Mul", graph.op("Cast", cap, to=TensorProto.DOUBLE), graph.constant(float(cost.backbone)))
    left = graph.op("Sub", graph.op("Cast", cap, to=TensorProto.INT64), spent)
    every_token = np.arange(cost.num_patches)
    image = Image(rows, graph.constant(every_token), graph.constant(every_token >= 0), spent, left)
    blocks = []
    for index, block in enumerate(model.backbone.blocks):
        image, done = writer.write(graph, index, block, image)
        blocks.append(done)
    outputs = _outputs(graph, model, image.rows, image.macs)
    if trace:
        outputs["macs"] = (image.macs, TensorProto.INT64, [1])
        for name, shape in _trace_shapes(cost).items():
            parts = [getattr(done, name) for done in blocks]
            if shape:
                parts = [graph.op("Unsqueeze", part, graph.ints(0)) for part in parts]
            value = graph.op("Unsqueeze", graph.op("Concat", *parts, axis=0), graph.ints(0))
            outputs[name] = (value, TensorProto.BOOL, [1, cost.depth, *shape])
    _save(_finished(graph, model, outputs), model, path, {"price": "" if price is None else repr(price)})


def _export_sizes(
    graph: Graph, model: MIAFormer, path: str | Path, price: float | None, trace: bool, weight: type[Weight]
) -> None:
    if price is not None:
        raise ValueError("this model chooses resolutions and has no prices")
    if isinstance(model.backbone, Eva) and model.backbone.rope_mixed:
        raise ValueError(
            "rotary position embeddings that differ from head to head ('mixed') are exported in one size alone: "
            "export_static takes a size"
        )
    cost = model.cost()
    done = SizesWriter(model, weight).write(graph)
    outputs = _outputs(graph, model, done.rows, done.macs)
    if trace:
        outputs["macs"] = (done.macs, TensorProto.INT64, [1])
        outputs["answers"] = (done.answers, TensorProto.FLOAT, [None, model.num_classes or model.num_features])
        executed = graph.op("Unsqueeze", done.executed, graph.ints(0, 2))  # (1, L, 1)
        kept = graph.op("Less", graph.constant(np.arange(cost.num_patches)), done.num_patches)
        values = {
            "depth": graph.op("Unsqueeze", done.executed, graph.ints(0)),
            "heads": graph.op("And", executed, graph.constant(np.ones(cost.num_heads, bool))),
            "tokens": graph.op("And", executed, kept),
        }
        for name, shape in _trace_shapes(cost).items():
            outputs[name] = (values[name], TensorProto.BOOL, [1, cost.depth, *shape])
    fractions = [macs / cost.backbone for macs in model.macs_of_sizes().values()]
    proto = _finished(graph, model, outputs, "leave")
    _save(proto, model, path, {"price": "", "sizes": json.dumps(fractions), "leaves": "true"})


def _trace_shapes(cost: Cost) -> dict[str, list[int]]:
    """Of one block."""
    return {"depth": [], "heads": [cost.num_heads], "tokens": [cost.num_patches]}


def export_static(
    model: MIAFormer, path: str | Path, decisions: Decisions | Size, *, standard_ops: bool = False
) -> None:
    """Write the model without control flow to an ONNX file: under one image's decisions (1, ...), or in a size (H, W).

    Input: `images` (B, 3, H, W) float32 for any B, which the file makes smaller itself. Outputs: `logits` (B, classes)
    and `macs_fraction` (B,). standard_ops: as for `export_onnx`.

    Raises ValueError, naming it, for what cannot be exported.
    """
    _check_exportable(model)
    images = torch.zeros(2, model.backbone.in_chans, *model.image_size())
    proto = exported(StaticModel(model, decisions), images, 0, ("logits", "macs_fraction"), standard_ops)
    _save(proto, model, path, {"static": "true", "looks": "[]"})


# Parts ---------------------------------------------------------------------------------------------------------------


def _check_exportable(model: MIAFormer) -> None:
    """Raises ValueError, naming it, for what cannot be exported."""
    parameter = next(model.parameters())
    check_plain(transformer_blocks(model.backbone), "exported", "Merge it into the weights first")
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise ValueError(
            f"export takes a float32 model on the CPU, this one is {parameter.dtype} on {parameter.device}"
        )


def _check_subsets(model: MIAFormer) -> None:
    cost = model.cost()
    if not model.adapt_config.rules.nested_heads:
        if cost.num_heads > MOST_SUBSET_HEADS:
            raise ValueError(
                f"a file needs a branch for each subset of heads, so at most {MOST_SUBSET_HEADS} heads; this backbone "
                f"has {cost.num_heads}: adapt it with head_choice='nested'"
            )
        if cost.embed_dim % cost.num_heads or cost.mlp_hidden % cost.num_heads:
            raise ValueError("subsets of heads whose groups of units differ in size cannot be exported")


def _log_price(graph: Graph, model: MIAFormer, price: float | None) -> str:
    if price is not None:
        return graph.constant(model.learned(price).log_price.cpu().numpy(), np.float32)
    assert model.calibration is not None
    budget = graph.op("Reshape", "budget", graph.ints(1))
    return write_log_price(graph, budget, model.calibration, model.price_scale)


def _outputs(graph: Graph, model: MIAFormer, rows: str, macs: str) -> dict[str, tuple[str, int, list[Any]]]:
    cost = model.cost()
    count = cost.num_prefix_tokens
    if not cost.trims_last_block:
        count += cost.num_patches
    rows = graph.op("Slice", rows, graph.ints(0), graph.ints(count))
    varies = model.adapt_config.chooses_resolution and not cost.trims_last_block
    head = exported(Head(model), torch.zeros(1, count, cost.embed_dim), 1 if varies else None)
    logits = graph.include(head, [graph.op("Unsqueeze", rows, graph.ints(0))], "head_")[0]
    fraction = graph.op("Mul", graph.op("Cast", macs, to=TensorProto.DOUBLE), graph.constant(1 / cost.backbone))
    fraction = graph.op("Cast", fraction, to=TensorProto.FLOAT)
    shape = [one.dim_value for one in head.graph.output[0].type.tensor_type.shape.dim]
    return {"logits": (logits, TensorProto.FLOAT, shape), "macs_fraction": (fraction, TensorProto.FLOAT, [1])}


def _finished(
    graph: Graph, model: MIAFormer, outputs: dict[str, tuple[str, int, list[Any]]], *more: str
) -> onnx.ModelProto:
    """more: scalar inputs beside budget and cap."""
    shape = [1, model.backbone.in_chans, *model.image_size()]
    scalars: dict[str, tuple[int, list[Any]]] = {name: (TensorProto.FLOAT, []) for name in ("budget", "cap", *more)}
    return graph.model({"images": (TensorProto.FLOAT, shape), **scalars}, outputs)


def _save(proto: onnx.ModelProto, model: MIAFormer, path: str | Path, more: dict[str, str]) -> None:
    table = model.calibration
    meta = {
        "miaformer": miaformer.__version__,
        "data_config": json.dumps(model.data_config()),
        "label_names": json.dumps(model.label_names),
        "budgets": json.dumps(None if table is None else table.range),
        "backbone_macs": str(model.cost().backbone),
        "least_macs": str(model.least_macs()),
        "looks": json.dumps([] if table is None else [asdict(row) for row in table.looks]),
    }
    onnx.helper.set_model_props(proto, {**meta, **more})
    onnx.checker.check_model(proto)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(proto.SerializeToString())
