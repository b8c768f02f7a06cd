"""Engines that run a method's model beside the one it is measured on, so that each method is timed on its fastest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miaformer.evaluation.engines import EngineUnavailableError, OnnxRuntime

Call = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, classes)
Prepare = Callable[[Tensor], Call]  # given a batch of the shape to be run; raises EngineUnavailableError

AGREEMENT = 1e-2  # of the logits' scale: an engine that computes something else is not timed


class OnnxFile:
    """A model in ONNX Runtime, exported when it is first prepared and kept for all batch sizes.

    write: exports it to a path. batch: the only batch size that the file takes; None: any. feed: further inputs.
    """

    def __init__(self, write: Callable[[Path], None], batch: int | None = None) -> None:
        self._write, self._batch = write, batch

    def prepare(self, images: Tensor, budget: float | None = None) -> Call:
        """budget: of an adaptive file.

        Raises EngineUnavailableError, saying why, for batches that it cannot run, and where exporting fails.
        """
        reason = OnnxRuntime().unsupported(images.dtype, len(images), images.device)
        if reason is None and self._batch not in (None, len(images)):
            reason = f"the exported model takes batches of {self._batch}"
        if reason is not None:
            raise EngineUnavailableError(reason)
        session = self.session
        if budget is not None:
            from miaformer.export import run_session

            return lambda images: torch.from_numpy(run_session(session, images.numpy(), budget)["logits"])
        logits = session.get_outputs()[0].name

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([logits], {"images": images.numpy()})[0])

        return run

    @cached_property
    def session(self) -> Any:
        try:
            from miaformer.export import open_session

            with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
                self._write(path := Path(folder) / "model.onnx")
                return open_session(path, torch.get_num_threads())
        except Exception as error:  # exporters have many errors
            lines = str(error).strip().splitlines() or [""]
            raise EngineUnavailableError(f"ONNX Runtime: {type(error).__name__}: {lines[0]}") from error


def of_module(module: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Prepare]:
    """Of a static model: PyTorch as it is, and ONNX Runtime. image_shape: (channels, H, W)."""

    def write(path: Path) -> None:
        from miaformer.export.dense import export_dense

        export_dense(module, path, image_shape)

    file = OnnxFile(write)

    def onnx(images: Tensor) -> Call:
        call = file.prepare(images)
        found, wanted = call(images), module(images)
        if (found - wanted).abs().max() > AGREEMENT * wanted.abs().max():
            raise EngineUnavailableError("the exported model gives other logits")
        return call

    return {"timm": lambda images: module, "onnx": onnx}
