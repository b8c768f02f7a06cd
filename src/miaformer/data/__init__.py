"""Labelled images, from where they lie to batches.

`open_data(spec, split)` gives `ImageData`; `build_transform(data_config, ...)` gives a `Transform`; `Batches`
puts both together, the same for any number of processes and workers and from any step on.
"""

from miaformer.data.digits import Digits
from miaformer.data.loader import Batch, Batches
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
    "Split",
    "Transform",
    "build_transform",
    "open_data",
    "spread",
]
