"""MIA-Former: Vision Transformers that adapt their compute to each image, at three grains: blocks, heads and tokens.

model = miaformer.adapt(timm.create_model("deit_small_patch16_224", pretrained=True))
miaformer.train(model, data, recipe)
logits = model(images, budget=0.6)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaformer import policy
    from miaformer.config import AdaptConfig
    from miaformer.decisions import Decisions
    from miaformer.evaluation.calibration import calibrate
    from miaformer.loading import load
    from miaformer.model import MIAFormer, adapt
    from miaformer.output import Output, Trace
    from miaformer.pretrained import load_backbone
    from miaformer.training import train

__version__ = "0.1.0"
__all__ = [
    "AdaptConfig",
    "Decisions",
    "MIAFormer",
    "Output",
    "Trace",
    "adapt",
    "calibrate",
    "load",
    "load_backbone",
    "policy",
    "train",
]

# Imported where they are first used: torch and timm take seconds, which `miaformer --help` need not wait for,
# and training needs accelerate, which running a model does not.
_HOME = {
    "AdaptConfig": "miaformer.config",
    "Decisions": "miaformer.decisions",
    "MIAFormer": "miaformer.model",
    "Output": "miaformer.output",
    "Trace": "miaformer.output",
    "adapt": "miaformer.model",
    "calibrate": "miaformer.evaluation.calibration",
    "load": "miaformer.loading",
    "load_backbone": "miaformer.pretrained",
    "train": "miaformer.training",
}


def __getattr__(name: str) -> Any:
    if name == "policy":
        return import_module("miaformer.policy")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'miaformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
