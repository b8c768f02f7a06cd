"""MIA-Former: Vision Transformers that adapt their compute to each image.

model = miaformer.adapt(timm.create_model("deit_small_patch16_224", pretrained=True))
miaformer.train(model, data, recipe)
logits = model(images, budget=0.6)
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miaformer.data.images import ImageError, open_image
    from miaformer.engine.decisions import Decisions, Gates
    from miaformer.engine.walk import State
    from miaformer.evaluation.calibration import calibrate
    from miaformer.model import policy
    from miaformer.model.adapt import adapt
    from miaformer.model.budget import Calibration
    from miaformer.model.config import AdaptConfig
    from miaformer.model.loading import load
    from miaformer.model.model import MIAFormer
    from miaformer.model.output import Output, Trace
    from miaformer.prediction.explanation import Explanation, explain
    from miaformer.prediction.predictor import Prediction, Predictor
    from miaformer.training import train
    from miaformer.vit.pretrained import load_backbone

__version__ = "0.1.0"

# Where public names are at home. Imported when they are first used: torch and timm take seconds, which
# `miaformer --help` need not wait for, and training needs accelerate, which running a model does not.
_HOME = {
    "AdaptConfig": "model.config",
    "Calibration": "model.budget",
    "Decisions": "engine.decisions",
    "Explanation": "prediction.explanation",
    "Gates": "engine.decisions",
    "ImageError": "data.images",
    "MIAFormer": "model.model",
    "Output": "model.output",
    "Prediction": "prediction.predictor",
    "Predictor": "prediction.predictor",
    "State": "engine.walk",
    "Trace": "model.output",
    "adapt": "model.adapt",
    "calibrate": "evaluation.calibration",
    "explain": "prediction.explanation",
    "load": "model.loading",
    "load_backbone": "vit.pretrained",
    "open_image": "data.images",
    "train": "training",
}
# Modules that were here before, and scripts may import still.
_MOVED = {
    "decisions": "engine.decisions",
    "explanation": "prediction.explanation",
    "images": "data.images",
    "policy": "model.policy",
    "predictor": "prediction.predictor",
}

__all__ = [
    "AdaptConfig",
    "Calibration",
    "Decisions",
    "Explanation",
    "Gates",
    "ImageError",
    "MIAFormer",
    "Output",
    "Prediction",
    "Predictor",
    "State",
    "Trace",
    "adapt",
    "calibrate",
    "explain",
    "load",
    "load_backbone",
    "open_image",
    "policy",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MOVED:
        return import_module(f"{__name__}.{_MOVED[name]}")
    raise AttributeError(f"module 'miaformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module of `_MOVED` by its old name: the module itself, not a copy."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}.{_MOVED[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to be executed; the module keeps its own name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_MovedModules())
