"""Labelled images, from where they lie to batches; single pictures (`images`), files, seeds.

`open_data(spec, split)` gives `ImageData`; `build_transform(data_config, ...)` gives a `Transform`; `Batches`
puts both together, the same for any number of processes and workers and from any step on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaformer.data.digits import Digits
    from miaformer.data.loader import Batch, Batches, LabelledBatch
    from miaformer.data.on_device import DeviceBatches
    from miaformer.data.source import ImageData, Split, spread
    from miaformer.data.specs import open_data
    from miaformer.data.transforms import Augmentation, Transform, build_transform

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "DeviceBatches",
    "Digits",
    "ImageData",
    "LabelledBatch",
    "Split",
    "Transform",
    "build_transform",
    "open_data",
    "spread",
]

# Imported when first used: `files` and `images`, which every command needs, wait for no torch.
_HOME = {
    "Augmentation": "transforms",
    "Batch": "loader",
    "Batches": "loader",
    "DeviceBatches": "on_device",
    "Digits": "digits",
    "ImageData": "source",
    "LabelledBatch": "loader",
    "Split": "source",
    "Transform": "transforms",
    "build_transform": "transforms",
    "open_data": "specs",
    "spread": "source",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
