"""A static model in an ONNX file, for batches of any size, and the same in 8-bit integers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from miaformer.export.parts import exported


def export_dense(module: nn.Module, path: str | Path, image_shape: tuple[int, int, int]) -> None:
    """Write a module (images to logits, no control flow) to an ONNX file. image_shape: (channels, H, W).

    Input: `images` (B, channels, H, W) float32; output: logits (B, classes), for any B.
    """
    proto = exported(module, torch.zeros(2, *image_shape), 0, ("logits",))
    Path(path).write_bytes(proto.SerializeToString())


def quantize_int8(source: str | Path, path: str | Path) -> None:
    """Write the model of an ONNX file in 8-bit integers: ONNX Runtime's dynamic quantization of all products with
    weights, a scale for each output channel. Activations are quantized as they come, so no images are needed.

    Its own preparation comes first. Convolutions stay in float32: integer ones are slower on processors, and a ViT's
    only one is its patch embedding.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_dynamic(
            prepared,
            Path(path),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Without VNNI instructions sums of two 8-bit products saturate at 16 bits; 7-bit weights cannot.
            reduce_range=not torch.cpu.get_capabilities().get("avx512_vnni", False),
            weight_type=QuantType.QInt8,
        )
