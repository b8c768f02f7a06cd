"""The model that comes with the package is whole, keeps its word, and says something of anybody's pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import miaformer
from miaformer import cli
from miaformer.cli.demo import BUDGETS, BUNDLED_MODEL
from miaformer.data.images import open_image
from miaformer.model.loading import BUNDLED


@pytest.fixture(scope="module")
def model() -> miaformer.MIAFormer:
    return miaformer.load(BUNDLED_MODEL)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of several sizes, and one that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        small = Image.fromarray(rng.integers(0, 255, (3 + number, 4, 3), dtype=np.uint8))
        small.resize((60 + 9 * number, 50), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def test_it_is_small_and_complete(model: miaformer.MIAFormer) -> None:
    files = {path.name: path.stat().st_size for path in (BUNDLED / BUNDLED_MODEL).iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "calibration.json", "README.md"}
    assert sum(files.values()) < 5e6
    assert model.label_names is not None
    assert {"cat", "dog", "ship"} < set(model.label_names)
    assert next(model.parameters()).dtype == torch.float32
    assert model.controller_macs() < 0.01 * model.cost().backbone


def test_it_spends_what_is_asked_for_and_differs_between_images(model: miaformer.MIAFormer) -> None:
    """On noise, which is nothing like what it was calibrated on: more for a larger budget, never above a cap."""
    images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images + 2 * torch.randn(48, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        spent = {budget: model.run(images, budget=budget).trace.macs_fraction for budget in BUDGETS}
        capped = model.run(images, budget=BUDGETS[-1], cap=0.4).trace.macs_fraction
    means = [float(spent[budget].mean()) for budget in BUDGETS]
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert max(len(set(one.tolist())) for one in spent.values()) > 3
    assert capped.max() <= 0.4


def test_demo_shows_it_on_the_users_pictures(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["demo", "--pictures", str(photos), str(tmp_path / "missing.png"), "--out", str(out), "--device", "cpu"]
    assert cli.main(argv) == 1  # something could not be read
    shown = capsys.readouterr().out
    assert "3.png" in shown
    assert "broken.jpg" in shown
    assert "missing.png" in shown
    with Image.open(out / "pictures.png") as drawn:
        assert min(drawn.size) > 200
    assert not (out / "model").exists()


def test_demo_without_a_picture_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "nowhere", tmp_path / "text.png"):
        assert cli.main(["demo", "--pictures", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
        assert path.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_picture_is_told_alike_alone_and_among_others(photos: Path, model: miaformer.MIAFormer) -> None:
    from miaformer.data import build_transform

    transform = build_transform(model.data_config())
    images = torch.stack([transform(open_image(path)) for path in sorted(photos.glob("*.png"))])
    with torch.inference_mode():
        together = model.run(images, budget=0.5)
        alone = [model.run(image[None], budget=0.5) for image in images]
    assert together.trace.macs.tolist() == [int(one.trace.macs) for one in alone]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=1e-4)
