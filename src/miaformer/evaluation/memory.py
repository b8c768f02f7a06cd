"""Peak memory of dense and of sparse execution, each in a fresh process: what running takes on top of the model.

Run as a module this file is that process. On Linux the kernel's high-water mark is set back once the model is loaded,
for loading itself takes more than running a small batch does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import miaformer
from miaformer.model.model import MIAFormer

_BATCHES = 3  # that a process runs: images differ in what they take
_PICTURES = "pictures.safetensors"
_TRIM_ALL = ctypes.c_size_t(0)


def measure_memory(
    model: MIAFormer,
    pictures: Tensor,
    dtypes: Sequence[str],
    batch_sizes: Sequence[int],
    budgets: Sequence[float],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Rows {"dtype", "batch", "budget", "dense_mb", "sparse_mb"}, each as soon as it is known; eager, MB of 1e6 bytes.

    pictures: (n, 3, H, W) float32, the first batches of which are run. Budget 1 keeps everything; budgets
    that the model does not reach are left out.

    Raises ChildProcessError where a process fails, with its last line.
    """
    reached = []
    for budget in sorted({*budgets, 1.0}):
        with contextlib.suppress(ValueError):
            model.check_budget(budget)
            reached.append(budget)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        most = _BATCHES * max(batch_sizes)
        save_file({"pictures": pictures[torch.arange(most) % len(pictures)].cpu()}, Path(folder) / _PICTURES)
        for dtype in dict.fromkeys(dtypes):
            for batch in sorted(set(batch_sizes)):
                dense = _peak_mb(folder, dtype, batch, None, device)
                for budget in reached:
                    sparse = _peak_mb(folder, dtype, batch, budget, device)
                    yield {"dtype": dtype, "batch": batch, "budget": budget, "dense_mb": dense, "sparse_mb": sparse}


def _peak_mb(folder: str, dtype: str, batch: int, budget: float | None, device: torch.device) -> float:
    """What one fresh process measures. budget None: dense."""
    task = {
        "folder": folder,
        "dtype": dtype,
        "batch": batch,
        "budget": budget,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    path = os.pathsep.join([str(Path(miaformer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "miaformer.evaluation.memory", json.dumps(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ChildProcessError(f"measuring memory failed (dtype {dtype}, batch {batch}): {reason}")
    return float(done.stdout.split()[-1])


@torch.inference_mode()
def _measure(task: dict[str, Any]) -> float:
    """Peak MB of running `_BATCHES` batches, beyond what the process holds with the model loaded and tried once."""
    torch.set_num_threads(task["threads"])
    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    with torch.inference_mode(False):
        model = MIAFormer.from_pretrained(task["folder"]).to(device, dtype).eval()

    def run(images: Tensor) -> None:
        if task["budget"] is None:
            model.backbone(images)
        else:
            model.run(images, budget=task["budget"])

    with safe_open(Path(task["folder"]) / _PICTURES, "pt") as file:
        pictures = file.get_slice("pictures")
        run(pictures[:1].to(device, dtype))  # what libraries set up once is neither dense nor sparse
        before = _start(device)
        for first in range(0, _BATCHES * task["batch"], task["batch"]):
            run(pictures[first : first + task["batch"]].to(device, dtype))
    return (_peak(device) - before) / 1e6


def _start(device: torch.device) -> int:
    """Set the high-water mark back, and say where it is, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(_TRIM_ALL)  # glibc: memory that is free would otherwise be used unseen
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    """The most memory so far, in bytes: resident, or allocated on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    sys.stdout.write(f"{_measure(json.loads(sys.argv[1]))}\n")
