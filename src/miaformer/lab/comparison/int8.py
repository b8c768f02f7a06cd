"""8-bit integers as a method: the backbone, dynamically quantized and run by ONNX Runtime, without training.

All its MACs are executed, each in less time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from miaformer.export.engines import EngineUnavailableError
from miaformer.export.engines.onnx_runtime import OnnxModule
from miaformer.lab.comparison.method import Entry, Method, Question, image_shape
from miaformer.model.model import MIAFormer


def write_int8(model: MIAFormer, path: Path) -> None:
    """The static backbone in 8-bit integers, to an ONNX file."""
    from miaformer.export.dense import export_dense, quantize_int8

    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "float32.onnx"
        export_dense(model.backbone, exact, image_shape(model))
        quantize_int8(exact, path)


def _entries(model: MIAFormer, question: Question) -> list[Entry]:
    run = OnnxModule(lambda path: write_int8(model.cpu(), path))

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return run(images.cpu()).to(images.device), torch.ones(len(images))
        except EngineUnavailableError as error:
            raise ValueError(f"int8 is measured in ONNX Runtime: {error}") from error

    return [Entry("int8", None, classify, engine="onnx int8")]


INT8 = Method(
    "int8",
    "the backbone in 8-bit integers, by ONNX Runtime, without training",
    None,
    _entries,
)
