"""Where and how a number was measured: what every report carries, so that it can be measured again."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch

import miaformer
from miaformer.engine.processor import processor_name


def describe_environment(device: torch.device | str, seed: int) -> dict[str, Any]:
    """Seed, versions, device, processor, threads, commit of miaformer, command line and date, as JSON knows them."""
    return {
        "seed": seed,
        "versions": {
            "miaformer": miaformer.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "onnxruntime": _installed("onnxruntime"),
        },
        "device": device_name(torch.device(device)),
        "processor": f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H100)` or `cpu (AMD EPYC 7763)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({processor_name()})" if device.type == "cpu" else device.type


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this package's own source, `+` after it where files differ; None outside of git."""
    package = Path(miaformer.__file__).parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # another project's repository may surround an installed package
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(package, "status", "--porcelain", "--", ".") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
