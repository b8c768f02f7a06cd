"""A predictor says of a picture what the model says of it, whoever shares its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command_line import classifier
from PIL import Image

from miaformer.data.images import ImageError
from miaformer.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(classifier(classes=5))


def noise(count: int, predictor: Predictor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *predictor.model.image_size(), generator=generator)


def test_it_reads_what_the_model_says(predictor: Predictor) -> None:
    images = noise(4, predictor)
    output = predictor.run(images, price=1.0)
    for i, prediction in enumerate(predictor.read(output, top_k=3)):
        shares, labels = output.logits[i].softmax(dim=0).topk(3)
        assert [guess.label for guess in prediction.top_k] == labels.tolist()
        assert [guess.probability for guess in prediction.top_k] == pytest.approx(shares.tolist())
        assert [guess.name for guess in prediction.top_k] == [f"class{label}" for label in labels]
        assert prediction.macs_fraction == output.trace.macs_fraction[i]
        executed = output.trace.depth[i]
        assert prediction.depth_kept == executed.double().mean()
        assert prediction.heads_kept == pytest.approx(output.trace.heads[i][executed].double().mean().item())
        assert prediction.tokens_kept == pytest.approx(output.trace.tokens[i][executed].double().mean().item())
        assert prediction.to_json()["label"] == prediction.top_k[0].label


def test_batch_mates_with_other_prices_and_caps_change_nothing(predictor: Predictor) -> None:
    images = noise(3, predictor)
    prices, caps = [0.1, 1.0, 10.0], [1.0, 0.5, 0.9]
    together = predictor.read(predictor.run(list(images), price=prices, cap=caps))
    for i in range(3):
        (alone,) = predictor.read(predictor.run(images[i : i + 1], price=prices[i], cap=caps[i]))
        assert together[i].macs_fraction == alone.macs_fraction
        assert [g.probability for g in together[i].top_k] == pytest.approx(
            [g.probability for g in alone.top_k], abs=1e-5
        )
    assert len({prediction.macs_fraction for prediction in together}) > 1


def test_names_can_be_given_and_must_fit() -> None:
    named = Predictor(classifier(), names=["a", "b", "c"])
    (prediction,) = named.read(named.run(noise(1, named)), top_k=9)
    assert sorted(str(guess.name) for guess in prediction.top_k) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        Predictor(classifier(), names=["a", "b"])


def test_pictures_are_prepared_or_named(predictor: Predictor, tmp_path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (40, 30), 128).save(path)
    assert predictor.prepare(path).shape == (3, *predictor.model.image_size())
    assert torch.equal(predictor.prepare(path.read_bytes()), predictor.prepare(path))
    with pytest.raises(ImageError, match="upload: not a picture"):
        predictor.prepare(b"text", "upload")


def test_pixels_are_normalised_when_they_run(predictor: Predictor, tmp_path) -> None:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    pixels, prepared = [predictor.pixels(path) for path in paths], [predictor.prepare(path) for path in paths]
    assert {(picture.dtype, picture.shape) for picture in pixels} == {(torch.uint8, prepared[0].shape)}
    assert torch.equal(predictor.run(pixels, price=1.0).logits, predictor.run(prepared, price=1.0).logits)
    with pytest.raises(ImageError, match="upload: not a picture"):
        predictor.pixels(b"text", "upload")


def test_what_cannot_be_asked_is_told_at_once(predictor: Predictor) -> None:
    predictor.try_once(cap=0.9)
    with pytest.raises(ValueError, match="cap=0 must be a fraction"):
        predictor.try_once(cap=0)
    with pytest.raises(ValueError, match="not calibrated"):
        predictor.try_once(budget=0.5)
