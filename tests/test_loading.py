"""Models are found by the names that people have for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vits import pictures, vit

import miaformer
from miaformer.model import loading


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> miaformer.MIAFormer:
    """A model that comes with the package as `tiny`, in half precision."""
    model = miaformer.adapt(vit()).eval()
    model.half().save_pretrained(tmp_path / "bundled" / "tiny")
    monkeypatch.setattr(loading, "BUNDLED", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    return model.float()


def test_a_bundled_model_is_found_by_its_name_and_runs_in_float32(bundle: miaformer.MIAFormer) -> None:
    assert loading.bundled_models() == ["tiny"]
    found = miaformer.load("tiny")
    images = pictures(bundle.backbone, 2).float()
    with torch.inference_mode():
        torch.testing.assert_close(found(images), bundle(images))
    assert not found.training


def test_a_directory_goes_before_a_bundled_model(bundle: miaformer.MIAFormer, tmp_path: Path) -> None:
    other = miaformer.adapt(vit(1)).eval()
    other.save_pretrained(tmp_path / "tiny")
    images = pictures(other.backbone, 2).float()
    with torch.inference_mode():
        torch.testing.assert_close(miaformer.load("tiny")(images), other.float()(images))


def test_what_is_no_model_is_named_with_what_there_is(bundle: miaformer.MIAFormer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'huge'.*no bundled model \(there is tiny\).*OWNER/NAME"):
        miaformer.load("huge")
    (tmp_path / "file").write_text("nothing")
    with pytest.raises(ValueError, match="file is not a model directory"):
        miaformer.load("file")
