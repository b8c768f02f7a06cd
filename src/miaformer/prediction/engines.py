"""What runs a predictor's model: PyTorch, operation by operation, or ONNX Runtime. Same decisions, same answers.

An operation of PyTorch takes some microseconds to call, a block has a dozen: at batch 1, small models take longer in
PyTorch than their products do. ONNX Runtime has no such cost, and runs the exported file (`miaformer.export`), one
image at a time; several images run side by side, one a thread. Which is faster depends on model, machine and batch:
`engine="auto"` times both on the first pictures it is given (`faster`).
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import miaformer
from miaformer.data.files import whole_file
from miaformer.model.model import MIAFormer
from miaformer.model.output import Output, Trace
from miaformer.prediction.classify import fingerprint
from miaformer.vit.backbone import check_images

ENGINES = ("auto", "eager", "onnx")
SECONDS = 0.4  # that timing a candidate may take
LEAST_CALLS = 5
TIMED = "engines.json"
NEEDED = ("onnx", "onnxruntime", "onnxscript")
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs a calibrated model at budgets and caps."""

    name: str

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Output:
        """images: (B, 3, H, W), normalised, in the model's dtype; budgets, caps: (B,), fractions of the dense MACs."""
        ...

    def dense(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the backbone."""
        ...


class Eager:
    name = "eager"

    def __init__(self, model: MIAFormer) -> None:
        self.model = model

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Output:
        return self.model.run(images, budget=budgets, cap=caps)

    def dense(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model.backbone(images)
        return logits


class OnnxRuntime:
    """Files of the model are made when they are first needed, and kept in `cache_folder`.

    A model that is trained after its first run here has to be given to a new engine.
    """

    name = "onnx"

    def __init__(self, model: MIAFormer) -> None:
        """Raises ValueError, with the reason, for a model that it cannot run."""
        reason = why_not_onnx(model)
        if reason is not None:
            raise ValueError(f"the engine onnx cannot run this model here: {reason}")
        self.model, self.threads = model, torch.get_num_threads()
        self._grids = {cost.num_patches: cost.grid for cost in map(model.cost, model.image_sizes())}

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Output:
        from miaformer.export import run_session

        self.model.check_budget(budgets)
        if caps is not None:
            self.model.check_cap(caps)
        batch = check_images(images, self.model.backbone).numpy()
        most = caps or [4.0] * len(batch)
        if len(batch) == 1:
            found = [run_session(self._alone, batch, budgets[0], most[0])]
        else:
            each = self._each  # opened once, before threads ask for it
            found = list(
                self._pool.map(lambda image, *spent: run_session(each, image[None], *spent), batch, budgets, most)
            )
        values = {name: torch.from_numpy(np.concatenate([part[name] for part in found])) for name in found[0]}
        patches = values["tokens"].any(dim=1).sum(dim=1).tolist() if len(self._grids) > 1 else []
        whole = self.model.cost().grid
        grid = torch.tensor([self._grids.get(count, whole) for count in patches] or [whole] * len(batch))
        logits = values.pop("logits")
        return Output(logits, Trace(**values, grid=grid))

    def __getstate__(self) -> dict[str, Any]:
        """Without sessions and threads: whoever gets it opens its own."""
        return {k: v for k, v in self.__dict__.items() if k in ("model", "threads", "_grids")}

    def dense(self, images: Tensor) -> Tensor:
        (logits,) = self._dense.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    @cached_property
    def _alone(self) -> Any:
        return self._session(self._adaptive, self.threads)

    @cached_property
    def _each(self) -> Any:
        return self._session(self._adaptive, 1)

    @cached_property
    def _dense(self) -> Any:
        from miaformer.export.dense import export_dense

        shape = self.model.backbone.in_chans, *self.model.image_size()
        path = self._file("dense", lambda path: export_dense(self.model.backbone, path, shape))
        return self._session(path, self.threads)

    @cached_property
    def _adaptive(self) -> Path:
        from miaformer.export import export_onnx

        return self._file("adaptive", lambda path: export_onnx(self.model, path, trace=True))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="onnx")

    @staticmethod
    def _session(path: Path, threads: int) -> Any:
        from miaformer.export import open_session

        return open_session(path, threads)

    def _file(self, kind: str, export: Callable[[Path], None]) -> Path:
        """What `export` writes of the model, made once for all processes of this machine."""
        path = cache_folder() / f"{_key(self.model)}-{kind}.onnx"
        if not path.exists():
            unfinished = path.with_name(f"{os.getpid()}-{path.name}")  # several processes may start at once
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with torch.inference_mode(False):
                    export(unfinished)
                unfinished.replace(path)
            except OSError as error:
                raise ValueError(f"{path} cannot be written ({error}): set MIAFORMER_CACHE to a folder") from error
            finally:  # Ctrl-C too leaves nothing behind
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        return path


def why_not_onnx(model: MIAFormer) -> str | None:
    """Why ONNX Runtime cannot run a model here; None where it can."""
    weights = next(model.parameters())
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
    if weights.device.type != "cpu":
        return f"the model is on {weights.device}, exported files run on processors"
    if weights.dtype != torch.float32:
        return f"the model is in {str(weights.dtype).removeprefix('torch.')}, exported files in float32"
    if model.calibration is None:
        return "it is not calibrated, so an exported file would know no budgets"
    return None


def cache_folder() -> Path:
    """Where exported files and chosen engines are kept: MIAFORMER_CACHE, or `miaformer` in the user's cache."""
    given = os.environ.get("MIAFORMER_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(home) / "miaformer"


def faster(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of a call of each, called in turn, the fastest first. The first call of each does not count."""
    for call in candidates.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    begun = clock()
    while len(next(iter(taken.values()))) < LEAST_CALLS or clock() - begun < seconds * len(candidates):
        for name, call in candidates.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return dict(sorted(medians.items(), key=lambda one: one[1]))


class Chosen:
    """The faster engine, for single images and for batches: chosen on the first of each, and remembered.

    on_choice: is told what was timed, "single pictures" or "batches", and the ms a picture of each engine.
    """

    name = "auto"

    def __init__(self, model: MIAFormer, on_choice: Callable[[str, dict[str, float]], None] | None = None) -> None:
        self.engines: dict[str, Engine] = {"eager": Eager(model)}
        if why_not_onnx(model) is None:
            self.engines["onnx"] = OnnxRuntime(model)
        self.model, self.on_choice = model, on_choice
        self._chosen: dict[bool, Engine] = {}

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Output:
        return self._for(images, budgets, caps).run(images, budgets, caps)

    def dense(self, images: Tensor) -> Tensor:
        return self._for(images, [self._most()] * len(images), None).dense(images)

    def _most(self) -> float:
        return 1.0 if self.model.calibration is None else self.model.calibration.range[1]

    def _for(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Engine:
        several = len(images) > 1
        if several not in self._chosen:
            self._chosen[several] = self._choose(images, budgets, caps)
        return self._chosen[several]

    def _choose(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None) -> Engine:
        if len(self.engines) == 1:
            return self.engines["eager"]
        what = "batches" if len(images) > 1 else "single pictures"
        key = f"{_key(self.model)}, {what}, {_machine()}"
        found = _timed_before().get(key)
        if found is None or not set(found) <= set(self.engines):
            calls = {
                name: lambda engine=engine: engine.run(images, budgets, caps) for name, engine in self.engines.items()
            }
            calls["eager"]()  # raises what is wrong with the call itself
            try:
                calls["onnx"]()
            except ValueError as error:  # not every model can be exported
                _log.warning("the engine onnx is left out: %s", error)
                del self.engines["onnx"]
                return self.engines["eager"]
            found = {name: 1000 * taken / len(images) for name, taken in faster(calls).items()}
            with suppress(OSError), whole_file(cache_folder() / TIMED) as unfinished:
                unfinished.write_text(json.dumps({**_timed_before(), key: found}, indent=2) + "\n")
        if self.on_choice is not None:
            self.on_choice(what, found)
        return self.engines[min(found, key=lambda name: found[name])]


def _timed_before() -> dict[str, dict[str, float]]:
    """Milliseconds of each engine, as timed before on this machine, by model, kind of batch and processor."""
    try:
        content = json.loads((cache_folder() / TIMED).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(model: MIAFormer) -> str:
    return f"{fingerprint(model, 16)}-{miaformer.__version__}"


def _machine() -> str:
    from miaformer.engine.processor import processor_name

    return f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def open_engine(
    name: str, model: MIAFormer, on_choice: Callable[[str, dict[str, float]], None] | None = None
) -> Engine:
    """An engine by its name. Raises ValueError for an unknown one, and for one that cannot run the model here."""
    match name:
        case "eager":
            return Eager(model)
        case "onnx":
            return OnnxRuntime(model)
        case "auto":
            return Chosen(model, on_choice)
        case _:
            raise ValueError(f"engine={name!r} must be one of {', '.join(ENGINES)}")
