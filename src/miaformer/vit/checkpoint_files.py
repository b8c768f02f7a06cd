"""Checkpoint files as people save them, PyTorch pickles and safetensors in any wrapper, as named tensors of one ViT.

Training scripts save a state dict as it is, below a key ("state_dict", "model", "model_ema"), with a prefix on every
name ("module.", "_orig_mod.", "backbone."), or all of these together. Here a nested checkpoint becomes one flat
dictionary of dotted names, so that a key and a prefix are the same thing: whatever stands before the names of a ViT.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ANCHOR = "blocks.0.norm1.weight"  # timm's ViTs have it, and so have the DeiT, DINOv2 and MAE that they come from
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LISTED = 4  # names in a message

# Plain values that training scripts save beside weights, and that run nothing when they are read: options, and metrics
# as numbers of numpy.
PLAIN: list[Any] = [
    argparse.Namespace,
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)),
]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The parameters of the ViT in a checkpoint file, by their names in the ViT. Nothing in the file is executed.

    Where the file holds a model and its moving average (a prefix with "ema"), the average is taken, as timm does.

    Raises ValueError naming the file, where it is missing, damaged, no checkpoint, holds objects other than tensors and
    plain values, or holds several ViTs.
    """
    path = check_file(path)
    tensors = dict(_tensors(_content(path)))
    if any(name.endswith("order_channels") for name in tensors):
        raise ValueError(
            f"{path} is part of an adapted model: give its directory, {path.parent}, instead of a timm name and a file"
        )
    prefixes = sorted({name.removesuffix(ANCHOR) for name in tensors if f".{name}".endswith(f".{ANCHOR}")})
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    if len(prefixes) > 1 and len(averaged) != 1:
        raise ValueError(
            f"{path} holds {len(prefixes)} ViTs, below {', '.join(map(repr, prefixes))}: save the one that you want in "
            "a file of its own"
        )
    prefix = (averaged or prefixes or [""])[0]
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_file(path: str | Path) -> Path:
    """Raises ValueError unless there is a file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a directory: give the checkpoint file in it (.safetensors, .pth, .pt, .bin, .ckpt)"
        )
    if not path.exists():
        raise ValueError(f"there is no checkpoint file {path}")
    return path


def identity(path: str | Path) -> str:
    """The name and a digest of the content: the same wherever the file lies."""
    path = check_file(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return f"{path.name} {digest}"


def some(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _content(path: Path) -> Any:
    """What is decided by content, not by suffix: `.bin` may be either format."""
    with path.open("rb") as file:
        start = file.read(9)
    if start == b"version h":
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` where it came from")
    try:
        if start[8:] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that may be anything
        raise ValueError(_why(path, error)) from error


def _why(path: Path, error: Exception) -> str:
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is damaged, it may be any
        objects = []
    if objects:
        return (
            f"{path} holds Python objects beside tensors ({some(objects)}). Loading these could execute code, so the "
            "file is refused. If you trust it, save its weights alone: checkpoint = torch.load(FILE, "
            'weights_only=False), then torch.save(checkpoint["state_dict"], "weights.pth"), or its .state_dict() where '
            "it is a whole model"
        )
    if "TorchScript" in str(error):
        return (
            f"{path} is a TorchScript program: save weights alone, torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
    return (
        f"{path} is damaged, or neither a PyTorch checkpoint nor a safetensors file ({reason}): copy or save it again"
    )


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def at_least_float32() -> torch.dtype:
    """What weights are read into: torch's default, unless that would round them."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
