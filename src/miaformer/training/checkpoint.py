"""Checkpoints by step: written whole or not at all, the newest few kept, read back exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

NAME = re.compile(r"step_(\d{8})")


def save_checkpoint(accelerator: Accelerator, directory: Path, step: int, keep: int) -> Path:
    """Write the accelerator's state (weights, optimiser, schedule, registered objects) for `step`.

    It is written beside its final name and renamed at the end, so that an interruption leaves no half checkpoint under
    a name that resuming looks for. Raises OSError, naming it, where it cannot be written; earlier ones stay.
    """
    final = directory / f"step_{step:08d}"
    partial = directory / f"partial_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # each library's own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} cannot be written: {error}") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
        for stale in directory.glob("partial_*"):
            shutil.rmtree(stale, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def checkpoint_step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint: its name should be step_ and eight digits")
    return int(match.group(1))


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Raises ValueError, naming the checkpoint and what to do, where it is damaged."""
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # torch, safetensors, pickle and zip each raise their own
        others = [other.name for other in checkpoints(path.parent) if other != path]
        instead = f"remove {path} to resume from {others[-1]}" if others else f"remove {path} and train again"
        raise ValueError(f"checkpoint {path} is damaged or of another run ({error}): {instead}") from error
