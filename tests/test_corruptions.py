"""Corrupted images are the same in every run and worse where severe; what is said of them is what was measured."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import classifier, run
from PIL import Image

from miaformer.data import ImageData
from miaformer.lab.corruptions import CORRUPTIONS, Corrupted, evaluate_corruptions, mean_rows


class Waves(ImageData):
    """Smooth pictures, on which noise and blur are seen."""

    def __init__(self, size: int = 40) -> None:
        self.name, self.classes, self.labels, self.size = "waves", ["a", "b"], np.array([0, 1, 1]), size

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        y, x = np.mgrid[: self.size, : self.size] / self.size
        planes = [127 + 100 * np.sin(6 * (x + (index + c) * y)) for c in range(3)]
        return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8)), int(self.labels[index])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_is_repeatable_leaves_global_generators_alone_and_grows(corruption: str) -> None:
    images = Waves()
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (Corrupted(images, corruption, 5)[1] for _ in range(2))
    assert first[1] == 1
    assert np.array_equal(first[0], again[0])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    clean = np.asarray(images[1][0], float)

    def change(severity: int) -> float:
        return float(np.abs(np.asarray(Corrupted(images, corruption, severity)[1][0], float) - clean).mean())

    assert change(1) > 0
    assert change(1) < change(5) or corruption == "frost"  # which darkens what it covers


def test_noise_differs_between_images_and_seeds() -> None:
    images = Waves()
    noise = [
        np.asarray(Corrupted(images, "gaussian_noise", 3, seed)[index][0], float) - np.asarray(images[index][0], float)
        for seed, index in ((0, 0), (0, 1), (1, 0))
    ]
    assert not np.array_equal(noise[0], noise[1])
    assert not np.array_equal(noise[0], noise[2])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown corruption 'rain': use some of gaussian_noise"):
        Corrupted(Waves(), "rain", 1)
    with pytest.raises(ValueError, match="severity 6: use 1 to 5"):
        Corrupted(Waves(), "fog", 6)
    with pytest.raises(ValueError, match=r"waves: picture 0 is 20 x 20, .* need 32 pixels"):
        Corrupted(Waves(20), "fog", 1)[0]


def test_means_are_over_severities_then_over_corruptions() -> None:
    rows = [
        {"corruption": c, "severity": s, "policy": "dense", "budget": None, "accuracy": a, "macs_fraction": 1.0}
        for c, s, a in (("fog", 1, 0.8), ("fog", 5, 0.4), ("snow", 1, 0.2), ("snow", 5, 0.0))
    ]
    assert [(row["corruption"], round(row["accuracy"], 6)) for row in mean_rows(rows)] == [
        ("fog", 0.6), ("snow", 0.1), ("mean", 0.35),
    ]  # fmt: skip


def test_classes_are_matched_by_name_under_corruptions_too() -> None:
    """A model that answers in another order than the data's is right as often."""
    data = Waves()
    model = classifier(2)
    model.label_names = list(data.classes)
    turned = copy.deepcopy(model)
    turned.label_names = data.classes[::-1]
    with torch.no_grad():
        for parameter in turned.get_classifier().parameters():
            parameter.copy_(parameter.flip(0))
    first, second = (evaluate_corruptions(one, data, [], ["full"], ["fog"], [1, 5]) for one in (model, turned))
    assert first == second
    assert {(row["policy"], row["severity"]) for row in first} == {(p, s) for p in ("dense", "full") for s in (1, 5)}


def test_eval_tells_of_corruptions(
    capsys: pytest.CaptureFixture[str],
    calibrated: Path,
    tmp_path: Path,
) -> None:
    for split in ("train", "val"):
        for label in range(3):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                Waves()[label][0].resize((40 + number, 36)).save(folder / f"{number}.png")
    command = (
        "eval", calibrated, "--data", tmp_path / "data", "--budgets", 0.6, "--policy", "learned", "static",
        "--severities", 1, 5, "--json", tmp_path / "a.json",
    )  # fmt: skip
    status, out, _ = run(capsys, *command, "--corruptions", "fog", "shot_noise")
    assert status == 0
    assert "shot_noise" in out
    rows = json.loads((tmp_path / "a.json").read_text())["corruptions"]
    assert {(row["corruption"], row["severity"], row["policy"]) for row in rows} == {
        (c, s, p) for c in ("fog", "shot_noise") for s in (1, 5) for p in ("dense", "learned", "static")
    }
    status, _, err = run(capsys, *command, "--corruptions", "rain")
    assert (status, "unknown corruption 'rain'" in err) == (2, True)
