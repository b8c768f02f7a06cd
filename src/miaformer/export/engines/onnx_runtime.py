"""ONNX Runtime, on the processor: an exported model, adaptive and dense; or any module without decisions.

An operation of PyTorch takes some microseconds to call, a block has a dozen: at batch 1, small models take longer in
PyTorch than their products do. ONNX Runtime has no such cost.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import miaformer
from miaformer.engine.races import cache_folder
from miaformer.export.engines.engine import Engine, EngineUnavailableError, first_line
from miaformer.export.session import NO_CAP, AdaptiveFile, open_session
from miaformer.model.fingerprint import fingerprint
from miaformer.model.model import MIAFormer
from miaformer.model.output import Output, Trace
from miaformer.vit.backbone import check_images

NAMES = ("logits", *(field.name for field in fields(Trace) if field.name != "grid"))  # of the file's outputs
NEEDED = ("onnx", "onnxruntime", "onnxscript")


class OnnxRuntime(Engine):
    """The exported file takes one image at a time, so a batch runs side by side, one image a thread.

    Files are made when they are first needed, and kept. A model that is trained after its first run here has to be
    given to a new engine.
    """

    name = "onnx"

    def __init__(self, model: MIAFormer, folder: Path | None = None) -> None:
        check_runs(next(model.parameters()))
        super().__init__(model, folder)
        self.threads = torch.get_num_threads()
        self._grids = {cost.num_patches: cost.grid for cost in map(model.cost, model.image_sizes())}

    def run(self, images: Tensor, budgets: Sequence[float], caps: Sequence[float] | None = None) -> Output:
        if self.model.calibration is None:
            raise EngineUnavailableError("the model is not calibrated, so an exported file would know no budgets")
        self.model.check_budget(budgets)
        if caps is not None:
            self.model.check_cap(caps)
        batch = check_images(images, self.model.backbone).numpy()
        most = caps or [NO_CAP] * len(batch)
        if len(batch) == 1:
            found = [self._alone(batch, budgets[0], most[0])]
        else:
            each = self._each  # opened once, before threads ask for it
            found = list(self._pool.map(lambda image, *spent: each(image[None], *spent), batch, budgets, most))
        values = {
            name: torch.from_numpy(np.concatenate([part[name] for part in found]) if len(found) > 1 else found[0][name])
            for name in NAMES
        }
        logits = values.pop("logits")
        return Output(logits, Trace(**values, grid=self._grid(values["tokens"])))

    def _grid(self, tokens: Tensor) -> Tensor:
        """Rows and columns (B, 2) of the patch tokens that images were looked at in. tokens: (B, L, N)."""
        whole = self.model.cost().grid
        if len(self._grids) == 1:
            return torch.tensor([whole]).expand(len(tokens), 2)
        return torch.tensor([self._grids.get(count, whole) for count in tokens.any(dim=1).sum(dim=1).tolist()])

    def dense(self, images: Tensor) -> Tensor:
        return run_static(self._dense, check_images(images, self.model.backbone))

    def __getstate__(self) -> dict[str, Any]:
        """Without sessions and threads: whoever gets it opens its own."""
        return {k: v for k, v in self.__dict__.items() if k in ("model", "folder", "threads", "_grids")}

    @cached_property
    def _alone(self) -> AdaptiveFile:
        return AdaptiveFile.of_session(open_session(self._adaptive, self.threads))

    @cached_property
    def _each(self) -> AdaptiveFile:
        return AdaptiveFile.of_session(open_session(self._adaptive, 1))

    @cached_property
    def _dense(self) -> Any:
        from miaformer.export.dense import export_dense

        shape = self.model.backbone.in_chans, *self.model.image_size()
        path = self._file("dense", lambda path: export_dense(self.model.backbone, path, shape))
        return open_session(path, self.threads)

    @cached_property
    def _adaptive(self) -> Path:
        from miaformer.export.files import export_onnx

        return self._file("adaptive", lambda path: export_onnx(self.model, path, trace=True))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="onnx")

    def _file(self, kind: str, export: Callable[[Path], None]) -> Path:
        """What `export` writes of the model, made once for all processes that keep their files there."""
        path = (self.folder or cache_folder()) / f"{model_key(self.model)}-{kind}.onnx"
        if not path.exists():
            unfinished = path.with_name(f"{os.getpid()}-{path.name}")  # several processes may start at once
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with exporting():
                    export(unfinished)
                unfinished.replace(path)
            except OSError as error:
                raise EngineUnavailableError(
                    f"{path} cannot be written ({error}): set MIAFORMER_CACHE to a folder"
                ) from error
            finally:  # Ctrl-C too leaves nothing behind
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        return path


class OnnxModule:
    """A module without decisions, exported when it is first called: images (B, 3, H, W) to logits (B, classes).

    write: exports it to a path. batch: the only batch size that its file takes; None: any. Calls raise
    EngineUnavailableError, saying why, for images that it cannot run, and where exporting fails.
    """

    def __init__(self, write: Callable[[Path], None], batch: int | None = None) -> None:
        self._write, self._batch = write, batch

    def __call__(self, images: Tensor) -> Tensor:
        check_runs(images)
        if self._batch not in (None, len(images)):
            raise EngineUnavailableError(f"the exported model takes batches of {self._batch}")
        return run_static(self._session, images)

    @cached_property
    def _session(self) -> Any:
        with tempfile.TemporaryDirectory() as folder, exporting():
            self._write(path := Path(folder) / "model.onnx")
            return open_session(path, torch.get_num_threads())


def run_static(session: Any, images: Tensor) -> Tensor:
    """Logits of a file without decisions."""
    (logits,) = session.run([session.get_outputs()[0].name], {"images": images.numpy()})
    return torch.from_numpy(logits)


def check_runs(values: Tensor) -> None:
    """Raises EngineUnavailableError where ONNX Runtime cannot run here on such weights or images."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise EngineUnavailableError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    if values.device.type != "cpu":
        raise EngineUnavailableError(f"ONNX Runtime is run on the processor only, not on {values.device}")
    if values.dtype != torch.float32:
        raise EngineUnavailableError(
            f"exported files are in float32, not in {str(values.dtype).removeprefix('torch.')}"
        )


@contextmanager
def exporting() -> Iterator[None]:
    """Raises EngineUnavailableError where exporting fails, whatever with: exporters have many errors."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except OSError:
        raise
    except Exception as error:
        raise EngineUnavailableError(f"export to ONNX failed: {first_line(error)}") from error


def model_key(model: MIAFormer) -> str:
    return f"{fingerprint(model, 16)}-{miaformer.__version__}"
