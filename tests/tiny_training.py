"""A training run small enough for a test: random images whose class is a bright quadrant, a tiny ViT, few steps.

As a script it is one process of `accelerate launch`: python tests/tiny_training.py OUT
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import PartialState
from PIL import Image

from miaformer import MIAFormer, adapt
from miaformer.data import ImageData
from miaformer.training import Recipe, Stage, train

STEPS = 4  # of each stage
IMAGES = 48

RECIPE = Recipe(
    name="tiny",
    data="quadrants",
    model="vit_tiny_patch16_224",
    stages=(
        Stage("backbone", epochs=STEPS / 3, lr=1e-3),
        Stage("elastic", epochs=STEPS / 3, lr=1e-3),
        Stage("supervised", epochs=STEPS / 3, lr=1e-3, controller_lr=1e-2, temperature=(1.0, 0.5)),
        Stage("reinforce", epochs=STEPS / 3, lr=1e-3, controller_lr=1e-2, temperature=(0.5, 0.5)),
    ),
    batch_size=16,
    checkpoint_every=1000,
)


SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 4}


class Quadrants(ImageData):
    """Noise with one bright quadrant, which is the class."""

    def __init__(self, split: str) -> None:
        rng = np.random.default_rng(len(split))
        self.name, self.classes = f"quadrants/{split}", list("abcd")
        self.labels = rng.integers(0, 4, IMAGES)
        self.pixels = rng.integers(0, 160, (IMAGES, 16, 16, 3), dtype=np.uint8)
        for image, label in zip(self.pixels, self.labels, strict=True):
            y, x = 8 * (label // 2), 8 * (label % 2)
            image[y : y + 8, x : x + 8] += 90

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


def tiny_model(model_args: Mapping[str, Any] = {}, **config: object) -> MIAFormer:
    """model_args: of timm.create_model; config: of `adapt`."""
    torch.manual_seed(1)
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        **{**SIZES, **model_args},
    )
    return adapt(backbone, **config)


def run(
    out: Path, recipe: Recipe = RECIPE, model: MIAFormer | None = None, seed: int = 3, **settings: object
) -> MIAFormer:
    return train(
        tiny_model() if model is None else model,
        Quadrants("train"),
        recipe,
        out,
        seed=seed,
        calibration_data=Quadrants("calibration"),
        show_progress=False,
        device="cpu",
        **settings,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    sys.stdout.write(f"process of {PartialState().num_processes}\n")
