"""Labelled images, from where they lie to batches; single pictures (`images`), files, seeds.

`open_data(spec, split)` gives `ImageData`; `build_transform(data_config, ...)` gives a `Transform`; `Batches`
puts both together, the same for any number of processes and workers and from any step on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaformer.data.digits import Digits as Digits
    from miaformer.data.loader import Batch as Batch
    from miaformer.data.loader import Batches as Batches
    from miaformer.data.loader import LabelledBatch as LabelledBatch
    from miaformer.data.on_device import DeviceBatches as DeviceBatches
    from miaformer.data.source import ImageData as ImageData
    from miaformer.data.source import Split as Split
    from miaformer.data.source import spread as spread
    from miaformer.data.specs import open_data as open_data
    from miaformer.data.transforms import Augmentation as Augmentation
    from miaformer.data.transforms import Transform as Transform
    from miaformer.data.transforms import build_transform as build_transform

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
