"""What tests of the command start from: a small classifier, pictures in class folders, and a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vits import lively

from miaformer import MIAFormer, cli
from miaformer.data import Batches, build_transform, open_data


def classifier(classes: int = 3) -> MIAFormer:
    """A small calibrated model for RGB pictures, whose decisions differ between images."""
    model = lively(settings={"num_classes": classes, "img_size": 16, "depth": 3}).float()
    names = [f"class{label}" for label in range(classes)]
    model.backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "label_names": names}
    return model


def class_folders(root: Path, classes: int = 3, each: int = 6) -> Path:
    """Pictures of noise in ROOT/{train,val}/CLASS."""
    generator = torch.Generator().manual_seed(1)
    for split in ("train", "val"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                spread = 1 + 200 * torch.rand((), generator=generator)
                pixels = (torch.rand(20, 20, 3, generator=generator) * spread).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


def batches_of(model: MIAFormer, data: Path, split: Any) -> Batches:
    transform = build_transform(model.data_config())
    return Batches(open_data(data, split), transform, 4, seed=0, shuffle=False, drop_last=False)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line."""
    status = cli.main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
