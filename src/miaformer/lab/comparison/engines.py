"""Engines that run a method's model beside the one it is measured on, so that each method is timed on its fastest."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from miaformer.export.engines.onnx_runtime import OnnxModule, OnnxRuntime
from miaformer.model.model import MIAFormer

Call = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, classes); raises EngineUnavailableError


def of_module(module: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Call]:
    """Of a static model: PyTorch as it is, and ONNX Runtime. image_shape: (channels, H, W)."""

    def write(path: Path) -> None:
        from miaformer.export.dense import export_dense

        export_dense(module, path, image_shape)

    return {"timm": module, "onnx": OnnxModule(write)}


def at_budgets(model: MIAFormer) -> Callable[[float], Call]:
    """Of an adaptive model: ONNX Runtime at a budget. One file, written when first needed, serves all of them."""

    @cache
    def engine() -> OnnxRuntime:
        folder = tempfile.TemporaryDirectory()
        found = OnnxRuntime(model, Path(folder.name))
        weakref.finalize(found, folder.cleanup)
        return found

    return lambda budget: lambda images: engine().run(images, [budget] * len(images)).logits
