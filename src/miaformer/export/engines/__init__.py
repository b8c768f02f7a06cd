"""What runs a model: PyTorch in four ways, or ONNX Runtime. Same decisions, same answers, whichever it is.

Predictions, benchmarks and comparisons all open their engines here. `pytorch` and `onnx_runtime` are the engines,
`auto` the fastest of those that a predictor can use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miaformer.export.engines.auto import Auto, OnChoice
from miaformer.export.engines.engine import Engine, EngineUnavailableError
from miaformer.export.engines.onnx_runtime import OnnxRuntime
from miaformer.export.engines.pytorch import Compiled, CudaGraphs, Eager, Packed
from miaformer.model.model import MIAFormer

__all__ = ["ENGINES", "Engine", "EngineUnavailableError", "open_engine"]

ENGINES: dict[str, Callable[[MIAFormer, Path | None], Engine]] = {
    engine.name: engine for engine in (Eager, Packed, Compiled, CudaGraphs, OnnxRuntime, Auto)
}


def open_engine(name: str, model: MIAFormer, folder: Path | None = None, on_choice: OnChoice | None = None) -> Engine:
    """An engine by its name. folder: where files that it makes are kept; None: the user's cache. on_choice: is told
    what "auto" timed.

    Raises ValueError for an unknown name, EngineUnavailableError (a ValueError) for one that cannot run the model here.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} must be one of {', '.join(ENGINES)}")
    return Auto(model, folder, on_choice) if name == Auto.name else ENGINES[name](model, folder)
