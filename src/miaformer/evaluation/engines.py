"""Engines that run a model, dense and sparse, behind one interface: what `miaformer bench` times against each other.

An engine is prepared for one model and one batch shape; what it hands back are calls that only run. Where it cannot be
had it raises `EngineUnavailableError`, with the reason that a report gives for leaving it out.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from miaformer.model.model import MIAFormer

_DECIDED_ON_THE_HOST = "what to compute is decided on the host, block by block: nothing compiled holds it"

DenseCall = Callable[[Tensor], Tensor]  # images (B, 3, H, W) to logits (B, classes)
SparseCall = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # images, budget to logits and macs_fraction (B,)


class EngineUnavailableError(Exception):
    """Why an engine cannot run something here."""


class Engine(Protocol):
    """Runs a model. `images` show the batch shape that the calls will be given, and where it lies."""

    name: str

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        """Why it cannot run this at all; None where it can."""
        ...

    def dense(self, model: MIAFormer, images: Tensor) -> DenseCall:
        """The backbone, everything executed and no controller. Raises EngineUnavailableError."""
        ...

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        """The learned policy at a budget, controllers and all. Raises EngineUnavailableError."""
        ...


class Eager:
    """PyTorch, operation by operation."""

    name = "eager"

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        return None

    def dense(self, model: MIAFormer, images: Tensor) -> DenseCall:
        return cast(DenseCall, model.backbone)

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        def run(images: Tensor, budget: float) -> tuple[Tensor, Tensor]:
            output = model.run(images, budget=budget)
            return output.logits, output.trace.macs_fraction

        return run


class Packed(Eager):
    """The same after `MIAFormer.prepack`: copies of the sparse model's weights in the layout that products read."""

    name = "packed"

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "weights are packed for processors only"

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        with torch.inference_mode(False):
            twin = copy.deepcopy(model, {id(model.backbone): model.backbone})
        return super().sparse(twin.prepack(), images)


class Compiled:
    """torch.compile, dense: the whole backbone for one batch shape."""

    name = "compile"

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        return None

    def dense(self, model: MIAFormer, images: Tensor) -> DenseCall:
        compiled = torch.compile(model.backbone, dynamic=False)
        _try("torch.compile", lambda: compiled(images))
        return cast(DenseCall, compiled)

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        raise EngineUnavailableError(_DECIDED_ON_THE_HOST)


class CudaGraphs:
    """torch.compile's CUDA graphs, dense: all kernels of a batch launched at once."""

    name = "graphs"

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "CUDA graphs are run on CUDA only"

    def dense(self, model: MIAFormer, images: Tensor) -> DenseCall:
        compiled = torch.compile(model.backbone, mode="reduce-overhead", dynamic=False)
        _try("torch.compile", lambda: [compiled(images) for _ in range(3)])  # compiled, recorded, replayed

        def run(images: Tensor) -> Tensor:
            return compiled(images).clone()  # the next call writes where this one's answer lies

        return run

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        raise EngineUnavailableError(_DECIDED_ON_THE_HOST)


class OnnxRuntime:
    """ONNX Runtime on the processor, with as many threads as torch: the exported backbone, or the exported model."""

    name = "onnx"

    def unsupported(self, dtype: torch.dtype, batch: int, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "ONNX Runtime is run on the processor only"
        if dtype != torch.float32:
            return f"ONNX Runtime has no {str(dtype).removeprefix('torch.')} kernels for processors"
        return None

    def dense(self, model: MIAFormer, images: Tensor) -> DenseCall:
        def export(path: Path) -> None:
            program = torch.onnx.export(model.backbone, (images.clone(),), dynamo=True, verbose=False)
            assert program is not None
            program.save(str(path), external_data=True)

        session = _session(export)
        name = session.get_inputs()[0].name

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

        return run

    def sparse(self, model: MIAFormer, images: Tensor) -> SparseCall:
        try:
            export_onnx: Callable[[MIAFormer, Path], Any] = import_module("miaformer.export").export_onnx
        except (ImportError, AttributeError):
            raise EngineUnavailableError("this version of miaformer has no ONNX export (miaformer.export)") from None
        if len(images) != 1:
            raise EngineUnavailableError("the exported model takes one image at a time")
        session = _session(lambda path: export_onnx(model, path))
        run_session = import_module("miaformer.export").run_session

        def run(images: Tensor, budget: float) -> tuple[Tensor, Tensor]:
            found = run_session(session, images.numpy(), budget)
            return torch.from_numpy(found["logits"]), torch.from_numpy(found["macs_fraction"])

        return run


ENGINES: dict[str, Callable[[], Engine]] = {
    engine.name: engine for engine in (Eager, Packed, Compiled, CudaGraphs, OnnxRuntime)
}


def open_engines(names: Sequence[str]) -> list[Engine]:
    """Engines by name, each once. Raises ValueError for unknown ones."""
    unknown = sorted(set(names) - set(ENGINES))
    if unknown:
        raise ValueError(f"unknown engine {', '.join(unknown)}: use some of {', '.join(ENGINES)}")
    return [ENGINES[name]() for name in dict.fromkeys(names)]


def _session(export: Callable[[Path], Any]) -> Any:
    """An inference session of the model that `export` writes to a path."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx.export needs, and would ask for in its own words
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install onnx onnxruntime onnxscript"
        raise EngineUnavailableError(reason) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise wait for the next call by spinning, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            _try("export to ONNX", lambda: export(path))
        providers = ["CPUExecutionProvider"]
        return _try("ONNX Runtime", lambda: onnxruntime.InferenceSession(str(path), options, providers=providers))


def _try(what: str, call: Callable[[], Any]) -> Any:
    """Run it. Raises EngineUnavailableError where it fails, whatever with: compilers and exporters have many errors."""
    try:
        return call()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{what} failed: {type(error).__name__}: {lines[0] if lines else ''}"
        raise EngineUnavailableError(reason) from error
