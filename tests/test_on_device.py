"""Augmentation on the device: the same for any number of processes, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_data import CONFIG, Noise, assert_same, global_random_state

from miaformer.data import Augmentation, Batch, Batches, DeviceBatches, build_transform

EVERYTHING = Augmentation(hflip=0.5, vflip=0.2, scale=(0.3, 1.0), ratio=(0.7, 1.4), color_jitter=0.4, re_prob=0.5)


def batches(augment: Augmentation = EVERYTHING, images: int = 18, batch_size: int = 6, **options: Any) -> DeviceBatches:
    options = {"seed": 5, "device": torch.device("cpu"), **options}
    return DeviceBatches(Noise(images), CONFIG, augment, batch_size, **options)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_slices_of_all_processes_make_the_batch_of_one(world_size: int) -> None:
    whole = list(batches().epoch(1))
    slices = [list(batches(rank=r, world_size=world_size).epoch(1)) for r in range(world_size)]
    for batch, *parts in zip(whole, *slices, strict=True):
        joined = Batch(*(torch.cat([getattr(p, f) for p in parts]) for f in ("images", "labels", "index")))
        assert_same([joined], [batch])


def test_resuming_at_a_step_gives_the_same_batches() -> None:
    assert_same(list(batches().epoch(3, start_step=1)), list(batches().epoch(3))[1:])


def test_loading_leaves_the_random_state_alone() -> None:
    before = global_random_state()
    list(batches().epoch(0))
    assert global_random_state() == before


def test_every_epoch_shows_each_image_once_and_changed_otherwise() -> None:
    loader = batches()
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    for seen in (first, second):
        index = torch.cat([batch.index for batch in seen])
        assert sorted(index.tolist()) == list(range(18))
        assert torch.cat([batch.labels for batch in seen]).tolist() == Noise(18).labels[index].tolist()
    images = {int(i): image for batch in first for i, image in zip(batch.index, batch.images, strict=True)}
    assert not any(
        torch.equal(images[int(i)], image)
        for batch in second
        for i, image in zip(batch.index, batch.images, strict=True)
    )


def test_no_augmentation_is_what_evaluation_sees() -> None:
    transform, data = build_transform(CONFIG), Noise(18)
    for batch in batches(Augmentation()).epoch(0):
        for i, image in zip(batch.index, batch.images, strict=True):
            torch.testing.assert_close(image, transform(data[int(i)][0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("field", "axis"), [("hflip", 2), ("vflip", 1)])
def test_a_flip_of_probability_one_mirrors_every_image(field: str, axis: int) -> None:
    plain = batches(Augmentation()).epoch(0)
    for batch, before in zip(batches(Augmentation(**{field: 1.0})).epoch(0), plain, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(batch.images, before.images.flip(axis + 1), atol=1e-4, rtol=0)


def test_crops_lie_inside_the_picture_and_have_the_area_asked_for() -> None:
    """Seen on pictures whose colours are their coordinates."""
    loader = batches(Augmentation(scale=(0.25, 0.5), ratio=(0.5, 2.0)), batch_size=18)
    ramp = torch.linspace(0, 255, 32).round().to(torch.uint8)
    loader.pixels = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.expand(32, 32)]).repeat(
        18, 1, 1, 1
    )
    (batch,) = loader.epoch(0)
    x = batch.images * torch.tensor(CONFIG["std"]).view(-1, 1, 1) + torch.tensor(CONFIG["mean"]).view(-1, 1, 1)
    assert float(x.min()) >= -0.01
    assert float(x.max()) <= 1.01
    width = x[:, 0, 0, -1] - x[:, 0, 0, 0]
    height = x[:, 1, -1, 0] - x[:, 1, 0, 0]
    area = width * height
    assert 0.2 < float(area.min()) < 0.32
    assert 0.4 < float(area.max()) < 0.55
    assert float((width / height).min()) < 0.8
    assert float((width / height).max()) > 1.25
    for channel in (0, 1):
        middle = (x[:, channel, 0, 0] + x[:, channel, -1, -1]) / 2
        assert float(middle.max() - middle.min()) > 0.2, "crops have places of their own"


def test_erasing_takes_a_rectangle_of_its_share_of_images() -> None:
    loader = batches(Augmentation(re_prob=0.5), images=400, batch_size=400)
    (batch,) = loader.epoch(0)
    erased = (batch.images == 0).all(dim=1)
    share = erased.float().mean(dim=(1, 2))
    assert 0.4 < float((share > 0).float().mean()) < 0.6
    assert float(share.max()) <= 0.37
    rows, columns = erased.any(dim=2), erased.any(dim=1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])


def test_jitter_changes_colours_and_keeps_them_in_range() -> None:
    (plain,), (changed,) = (
        batches(a, batch_size=18).epoch(0) for a in (Augmentation(), Augmentation(color_jitter=0.8))
    )
    std, mean = (torch.tensor(CONFIG[k]).view(-1, 1, 1) for k in ("std", "mean"))
    pixels = changed.images * std + mean
    assert float(pixels.min()) >= -1e-5
    assert float(pixels.max()) <= 1 + 1e-5
    assert (changed.images - plain.images).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="auto_augment"):
        batches(Augmentation(auto_augment="rand-m9-mstd0.5-inc1"))
    for name, value in (("batch_size", 0), ("seed", -1), ("rank", 1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            batches(**{name: value})
    with pytest.raises(ValueError, match="18 images do not fill a batch of 19"):
        batches(batch_size=19)
    monkeypatch.setattr("miaformer.data.on_device.MAX_DEVICE_BYTES", 1000)
    with pytest.raises(ValueError, match="load on the host"):
        batches()


def test_training_sees_the_whole_picture_whatever_evaluation_crops() -> None:
    config = {**CONFIG, "crop_pct": 0.5}
    plain = Augmentation()
    on_device = DeviceBatches(Noise(6), config, plain, 6, seed=0, device=torch.device("cpu"))
    on_host = Batches(
        Noise(6), build_transform(config, training=True, augment=plain), 6, seed=0, shuffle=True, drop_last=True
    )
    one, other = next(iter(on_device.epoch(0))), next(iter(on_host.epoch(0)))
    assert torch.equal(one.index, other.index)
    assert torch.allclose(one.images, other.images, atol=1e-5)
