"""Running an exported file, in ONNX Runtime or another runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miaformer.model.early_exit import NEVER
from miaformer.model.looks import Looks, row_of

Run = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
NO_CAP = 4.0


def open_session(path: str | Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session of an exported file on the processor. threads: None leaves the choice to it.

    Raises ValueError for a file that this version of ONNX Runtime cannot run, with its reason.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # Its threads would otherwise spin after each call, on the cores of whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class; an operator that it lacks has two
        if not Path(path).is_file():
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"ONNX Runtime {onnxruntime.__version__} cannot run {path}: {reason}") from error


def run_session(
    session: Any, images: NDArray[np.float32], budget: float = 1.0, cap: float = NO_CAP
) -> dict[str, NDArray[Any]]:
    """What an adaptive file gives for one image (1, 3, H, W) in ONNX Runtime. See `run_file`."""
    return AdaptiveFile.of_session(session)(images, budget, cap)


def run_file(
    run: Run,
    metadata: Mapping[str, str],
    images: NDArray[np.float32],
    budget: float = 1.0,
    cap: float = NO_CAP,
) -> dict[str, NDArray[Any]]:
    """What an adaptive file gives for one image (1, 3, H, W), by the names of its outputs, and in how many `looks`.

    run: runs the file in any runtime, inputs by name to outputs by name. metadata: of the file. A file of a model that
    looks twice says there, as `looks`, at which budgets: then it is run again where the first answer is not confident,
    and the MACs of both runs are added up.

    Raises ValueError for images with NaN or infinite values, for a budget that is no positive number, and for a cap
    below what the model takes at least: the file itself, which raises nothing, gives an answer all the same.
    """
    return AdaptiveFile(run, metadata)(images, budget, cap)


def run_of(session: Any) -> Run:
    """What runs a file once in ONNX Runtime: inputs that it does not have are left out."""
    inputs = {one.name for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]

    def run(feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        values = session.run(names, {name: value for name, value in feed.items() if name in inputs})
        return dict(zip(names, values, strict=True))

    return run


class AdaptiveFile:
    """`run_file` of a file whose metadata is read once."""

    def __init__(self, run: Run, metadata: Mapping[str, str]) -> None:
        self._run = run
        self._least = int(metadata.get("least_macs", 0)) / int(metadata["backbone_macs"])
        self._looks = [Looks(**row) for row in json.loads(metadata.get("looks", "[]"))]
        self._sizes = json.loads(metadata.get("sizes", "[]"))  # fractions of what each takes
        self._leaves = "leaves" in metadata  # an input `leave`

    @staticmethod
    def of_session(session: Any) -> AdaptiveFile:
        """In ONNX Runtime."""
        return AdaptiveFile(run_of(session), session.get_modelmeta().custom_metadata_map)

    def __call__(self, images: NDArray[np.float32], budget: float, cap: float) -> dict[str, NDArray[Any]]:
        if not 0 < budget < float("inf"):
            raise ValueError(f"budget={budget!r} must be a fraction of the backbone's MACs, more than 0")
        if not self._least <= cap < float("inf"):
            raise ValueError(f"cap={cap!r} must be a fraction of the backbone's MACs, {self._least:.4f} at least")
        if not np.isfinite(images).all():
            raise ValueError("images hold NaN or infinite values")
        row = row_of(self._looks, budget, self._sizes[-1] if self._sizes else 0.0)
        if row is None:
            return self._look(images, budget, cap)
        first = self._look(images, row.first, cap, row.leave)
        spent = float(first["macs_fraction"][0])
        scores = np.exp(first["logits"] - first["logits"].max())
        left = cap - spent
        more = any(spent + 1e-6 < one <= left + 1e-6 for one in self._sizes or [left])
        if scores.max() / scores.sum() >= row.confidence or not more:
            return first
        second = self._look(images, row.second, left)
        for name in ("macs_fraction", "macs", "looks"):
            if name in second:
                second[name] = first[name] + second[name]
        return second

    def _look(
        self, images: NDArray[np.float32], budget: float, cap: float, leave: float = NEVER
    ) -> dict[str, NDArray[Any]]:
        spend = {"budget": budget, "cap": cap}
        if self._leaves:
            spend["leave"] = leave
        scalars = {name: np.asarray(value, np.float32) for name, value in spend.items()}
        return {**self._run({"images": images, **scalars}), "looks": np.ones(1, np.int64)}
