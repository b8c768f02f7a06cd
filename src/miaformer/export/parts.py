"""What decides nothing, written by PyTorch's own exporter: the parts of a model around its blocks, or all of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset20, values
from torch import Tensor, nn

from miaformer.export.graph import MICROSOFT, OPSET, Graph
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size, resized
from miaformer.vit.embedding import embedded
from miaformer.vit.layers import Rotary, turns_rows


class Embedding(nn.Module):
    """Rows (B, P+N, C) of images (B, 3, H, W). size: (H, W) to look at them in, with position embeddings resampled."""

    def __init__(self, model: MIAFormer, size: Size | None = None) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.resize = nn.Identity() if size is None else Resize(model.image_size(), size)
        if size is not None:
            blocks, model.backbone.blocks = model.backbone.blocks, nn.Sequential()
            try:
                self.backbone = copy.deepcopy(model.backbone)
            finally:
                model.backbone.blocks = blocks
            self.backbone.set_input_size(img_size=size)

    def forward(self, images: Tensor) -> Tensor:
        return embedded(self.backbone, self.resize(images)).tokens


@torch.no_grad()
def rotary_of(model: MIAFormer, size: Size | None = None) -> Rotary | None:
    """The angles of rotary position embeddings in images of this size (H, W), by default the model's own; None: it has
    none.
    """
    parameter = next(model.parameters())
    image = parameter.new_zeros(1, model.backbone.in_chans, *(size or model.image_size()))
    first = model.embed(image).blocks[0]
    if not turns_rows(first):
        return None
    rotary: Rotary = first.rotary
    _ = rotary.table  # kept from now on: made under PyTorch's exporter it would hold no numbers
    return rotary


class Resize(nn.Module):
    """`resized`, as one product along each axis: not every runtime's `Resize` is antialiased (OpenVINO's is not)."""

    def __init__(self, before: Size, after: Size) -> None:
        super().__init__()
        self.vertical: Tensor
        self.horizontal: Tensor
        for name, old, new in zip(("vertical", "horizontal"), before, after, strict=True):
            self.register_buffer(name, resized(torch.eye(old)[None, None], (new, old))[0, 0])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H', W')"""
        return self.vertical @ images @ self.horizontal.T


class Head(nn.Module):
    """Logits (B, classes) of the rows (B, P, C), or (B, P+N, C), after the last block."""

    def __init__(self, model: MIAFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        return self.model.answer(self.model.backbone.norm(rows))


def write_embedding(graph: Graph, model: MIAFormer, size: Size | None = None) -> str:
    """Rows (P+N, C) of the graph's input `images`, one image."""
    image = torch.zeros(1, model.backbone.in_chans, *model.image_size())
    prefix = "embed_" if size is None else f"embed_{size[0]}x{size[1]}_"
    rows = graph.include(exported(Embedding(model, size), image), ["images"], prefix)[0]
    return str(graph.op("Squeeze", rows, graph.ints(0)))


def exported(
    module: nn.Module,
    example: Tensor,
    varies: int | None = None,
    outputs: tuple[str, ...] = (),
    standard_ops: bool = True,
) -> onnx.ModelProto:
    """A module of one input as an ONNX model.

    varies: the dimension of the input that may change. outputs: their names. standard_ops: False lets attention be
    ONNX Runtime's own operator.
    """
    was_training = {part: part.training for part in module.modules()}
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(outputs) or None,
                dynamic_shapes=None if varies is None else ({varies: torch.export.Dim.DYNAMIC},),
                custom_translation_table=None if standard_ops else _fused_attention(),
                verbose=False,
                optimize=True,
            )
    finally:
        for part, mode in was_training.items():
            part.training = mode
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    if proto.functions:
        raise ValueError("PyTorch's exporter wrote the model with functions, which are not supported")
    return proto


def _fused_attention() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`scaled_dot_product_attention` as ONNX Runtime's MultiHeadAttention, for PyTorch's exporter."""
    schema = onnx.defs.OpSchema
    named = schema.FormalParameter
    fused = values.Op(
        values.Opset(MICROSOFT, 1),
        "MultiHeadAttention",
        schema(
            "MultiHeadAttention",
            MICROSOFT,
            1,
            inputs=[named(name, "T") for name in ("query", "key", "value")],
            outputs=[named("output", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[schema.Attribute("num_heads", schema.AttrType.INT, "")],
        ),
    )

    def reshaped(x: Any, *shape: int) -> Any:
        values_of_shape: Any = opset20.Constant(value_ints=shape)
        return opset20.Reshape(x, values_of_shape)

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0) -> Any:
        if attn_mask is not None or dropout_p:
            raise ValueError("attention with a mask or dropout is not exported")
        num_heads = q.shape[1]
        rows = (reshaped(opset20.Transpose(x, perm=[0, 2, 1, 3]), 0, 0, -1) for x in (q, k, v))  # (B, n, H*D)
        return opset20.Transpose(reshaped(fused(*rows, num_heads=num_heads), 0, 0, num_heads, -1), perm=[0, 2, 1, 3])

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}
