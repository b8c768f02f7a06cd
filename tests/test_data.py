"""Data sets open to the same disjoint splits everywhere; batches are the same however they are loaded."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import miaformer
from miaformer.cli.arguments import open_batches
from miaformer.data import Augmentation, Batch, Batches, Digits, ImageData, build_transform, open_data
from miaformer.data import digits as digits_module
from miaformer.data import splits as splits_module
from miaformer.data.digits import RENDERINGS_TRAIN, SIZE, SIZES_HELD_OUT
from miaformer.data.images import ImageError
from miaformer.data.source import check_classes
from miaformer.data.splits import stratified_position

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 1.0,
}
EVERYTHING = Augmentation(
    hflip=0.5, vflip=0.1, scale=(0.3, 1.0), ratio=(0.75, 1.33), auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5,
)  # fmt: skip
SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module")
def digits() -> dict[str, Digits]:
    return {split: Digits(split) for split in SPLITS}


def coloured(value: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    """A picture that says which one it is."""
    return Image.new("RGB", size, (value % 256, value // 256, 7))


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def png(value: int) -> bytes:
    stream = io.BytesIO()
    coloured(value).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            coloured(start).save(root / name / f"{k:03}.png")
            start += 1
    return root


def numbers(data: ImageData) -> set[int]:
    return {number_of(data[i][0]) for i in range(len(data))}


class Noise(ImageData):
    """Seeded random pictures of several sizes."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        self.name, self.classes = "noise", ["a", "b", "c"]
        self.labels = np.arange(n) % 3
        self.pictures = [rng.integers(0, 256, (20 + i % 5, 30, 3), dtype=np.uint8) for i in range(n)]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pictures[index]), int(self.labels[index])


# digits


def test_digits_are_byte_identical_from_call_to_call(digits: dict[str, Digits]) -> None:
    for split in ("calibration", "test"):
        again = Digits(split)  # type: ignore[arg-type]
        for field in ("pixels", "labels", "digit", "size_px"):
            first, second = getattr(digits[split], field), getattr(again, field)
            assert hashlib.sha256(first.tobytes()).digest() == hashlib.sha256(second.tobytes()).digest()


def test_digits_splits_are_the_same_on_every_machine(digits: dict[str, Digits]) -> None:
    for split, expected in {
        "train": "6dcecb91213a1525",
        "calibration": "eaa9a658f773ee14",
        "test": "e0fbe3e348bb7148",
    }.items():
        members = np.unique(digits[split].digit).astype("<i8")
        assert hashlib.sha256(members.tobytes()).hexdigest()[:16] == expected


def test_digits_splits_share_no_digit_and_leave_none_out(digits: dict[str, Digits]) -> None:
    members = [set(digits[split].digit.tolist()) for split in SPLITS]
    assert sum(map(len, members)) == len(set.union(*members)) == 1797
    assert [len(m) for m in members] == [1078, 270, 449]


def test_digits_splits_are_stratified(digits: dict[str, Digits]) -> None:
    whole = np.bincount(
        np.concatenate([digits[split].labels[:: RENDERINGS_TRAIN if split == "train" else 2] for split in SPLITS])
    )
    for split, fraction in zip(SPLITS, (0.6, 0.15, 0.25), strict=True):
        rendered = np.bincount(digits[split].labels) / (RENDERINGS_TRAIN if split == "train" else 2)
        assert np.abs(rendered - fraction * whole).max() <= 1


def test_digits_renderings(digits: dict[str, Digits]) -> None:
    for split, data in digits.items():
        assert data.pixels.shape == (len(data), SIZE, SIZE)
        assert data.pixels.dtype == np.uint8
        _, times = np.unique(data.digit, return_counts=True)
        assert set(times.tolist()) == {RENDERINGS_TRAIN if split == "train" else 2}
        image, label = data[len(data) - 1]
        assert (image.mode, image.size, label) == ("RGB", (SIZE, SIZE), data.labels[-1])
        assert data.name == f"digits/{split}"
        assert data.classes == list("0123456789")
        hashes = {pixels.tobytes() for pixels in data.pixels}
        assert len(hashes) == len(data)  # no two renderings alike
    assert set(digits["test"].size_px.tolist()) == set(SIZES_HELD_OUT)


# splits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0, 1))
def test_any_threshold_on_the_stratified_position_takes_its_share_of_each_class(
    labels: list[int], threshold: float
) -> None:
    classes = np.asarray(labels)
    position = stratified_position(classes, seed=3)
    assert ((position >= 0) & (position < 1)).all()
    for label in set(labels):
        members = position[classes == label]
        assert abs((members < threshold).sum() - threshold * len(members)) <= 1
    assert np.array_equal(position, stratified_position(classes, seed=3))


def test_class_folders_without_splits_are_divided_once_and_for_all(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", {"cat": 30, "dog": 50})
    parts = {split: open_data(root, split) for split in SPLITS}
    members = {split: numbers(data) for split, data in parts.items()}
    assert set.union(*members.values()) == set(range(80))
    assert {split: len(m) for split, m in members.items()} == {"train": 64, "calibration": 8, "test": 8}
    for split, data in parts.items():
        assert data.classes == ["cat", "dog"]
        assert np.bincount(data.labels).tolist() == [len(data) * 3 // 8, len(data) * 5 // 8]
        assert all(label == (number_of(image) >= 30) for image, label in (data[i] for i in range(len(data))))
        assert numbers(open_data(str(root), split)) == members[split]


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_calibration_is_carved_out_of_train_where_there_is_none(tmp_path: Path, validation: str) -> None:
    write_folder(tmp_path / "train", {"a": 20, "b": 20})
    write_folder(tmp_path / validation, {"b": 3}, start=100)
    members = {split: numbers(open_data(tmp_path, split)) for split in SPLITS}
    assert members["test"] == {100, 101, 102}
    assert len(members["calibration"]) == 4
    assert members["train"] | members["calibration"] == set(range(40))
    assert not members["train"] & members["calibration"]
    assert open_data(tmp_path, "test").labels.tolist() == [1, 1, 1]  # the classes are train's


def test_calibration_is_at_most_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits_module, "MAX_CALIBRATION", 3)
    write_folder(tmp_path / "train", {"a": 30, "b": 30})
    assert (len(open_data(tmp_path, "calibration")), len(open_data(tmp_path, "train"))) == (3, 57)


@pytest.mark.parametrize("calibration", ["calibration", "val"])
def test_a_calibration_part_is_used_as_it_is(tmp_path: Path, calibration: str) -> None:
    """A validation part beside a test part is for calibrating."""
    write_folder(tmp_path / "train", {"a": 20})
    write_folder(tmp_path / calibration, {"a": 4}, start=50)
    write_folder(tmp_path / "test", {"a": 5}, start=90)
    assert [len(open_data(tmp_path, split)) for split in SPLITS] == [20, 4, 5]
    assert numbers(open_data(tmp_path, "calibration")) == {50, 51, 52, 53}


def test_of_a_large_validation_part_some_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits_module, "MAX_CALIBRATION", 4)
    write_folder(tmp_path / "train", {"a": 20, "b": 20})
    write_folder(tmp_path / "val", {"a": 6, "b": 6}, start=50)
    write_folder(tmp_path / "test", {"a": 5, "b": 2}, start=90)
    assert [len(open_data(tmp_path, split)) for split in SPLITS] == [40, 4, 7]
    assert open_data(tmp_path, "calibration").labels.tolist() == [0, 0, 1, 1]


def test_a_split_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "one" / "train", {"a": 20})
    with pytest.raises(ValueError, match=r"one: no test split: it has only train"):
        open_data(tmp_path / "one", "test")
    write_folder(tmp_path / "two" / "val", {"a": 20})
    assert len(open_data(tmp_path / "two", "test")) == 20
    for split in ("train", "calibration"):
        with pytest.raises(ValueError, match=rf"two: no {split} split: it has only validation"):
            open_data(tmp_path / "two", split)  # type: ignore[arg-type]
    write_folder(tmp_path / "few", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="2 images are too few"):
        open_data(tmp_path / "few", "test")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        open_data("digits", "val")  # type: ignore[arg-type]


# class folders


def test_classes_are_sorted_folder_names_with_pictures_anywhere_below(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", {"b/deep": 2, "a": 1, "train": 1})
    (tmp_path / "test" / "nothing").mkdir()
    (tmp_path / "test" / ".hidden").mkdir()
    (tmp_path / "readme.txt").touch()
    data = open_data(tmp_path, "test")
    assert data.classes == ["a", "b", "train"]
    assert data.labels.tolist() == [0, 1, 1, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path, {"bus": 10, "train": 10})
    assert [len(open_data(tmp_path, split)) for split in SPLITS] == [16, 2, 2]
    assert open_data(tmp_path, "train").classes == ["bus", "train"]


@pytest.mark.parametrize("above", ["unzipped", "a/b", "train_me/data"])
@pytest.mark.parametrize("split", [True, False])
def test_a_folder_that_holds_the_data_set_alone_is_looked_into(above: str, split: bool, tmp_path: Path) -> None:
    below = tmp_path / "in" / above / "dataset"
    for part in ("train", "val") if split else ("",):
        for label in ("cat", "dog"):
            (below / part / label).mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(below / part / label / f"{number}.png")
    (tmp_path / "in" / "README.txt").write_text("of the archive")
    found, wanted = (open_data(root, "train") for root in (tmp_path / "in", below))
    assert found.classes == wanted.classes == ["cat", "dog"]
    assert found.labels.tolist() == wanted.labels.tolist()


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "dataset"
    folder.mkdir(parents=True)
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    data = open_data(tmp_path / "photos", "train")
    assert data.classes == ["dataset"]
    with pytest.raises(ValueError, match="one class alone, 'dataset', where every answer is right"):
        check_classes(data)
    model = miaformer.adapt(
        timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1, num_classes=1), grains=("resolution",)
    )
    with pytest.raises(ValueError, match="one class alone"):
        open_batches(model, data, 4)
    with pytest.raises(ValueError, match="one class alone"):
        miaformer.train(model, tmp_path / "photos", "finetune", tmp_path / "run", show_progress=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_class_folder_mistakes_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "x" / "train", {"a": 20})
    write_folder(tmp_path / "x" / "test", {"c": 1})
    with pytest.raises(ValueError, match="class 'c' is not among"):
        open_data(tmp_path / "x", "test")
    write_folder(tmp_path / "y" / "val", {"a": 1})
    write_folder(tmp_path / "y" / "valid", {"a": 1})
    with pytest.raises(ValueError, match="both 'val' and 'valid'"):
        open_data(tmp_path / "y", "test")
    (tmp_path / "flat").mkdir()
    coloured(1).save(tmp_path / "flat" / "1.png")
    with pytest.raises(ValueError, match="flat: no class folders"):
        open_data(tmp_path / "flat", "test")


def test_a_broken_picture_is_named_by_its_path(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", {"a": 3})
    (tmp_path / "test" / "a" / "001.png").write_bytes(png(1)[:40])
    data = open_data(tmp_path, "test")
    assert number_of(data[2][0]) == 2
    with pytest.raises(ImageError, match=r"a/001\.png"):
        data[1]


# parquet files


def write_parquet(
    path: Path,
    labels: list[Any],
    *,
    start: int = 0,
    image: str = "image",
    label: str = "label",
    names: list[str] | None = None,
    raw: bool = False,
    images: list[Any] | None = None,
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = images or [png(start + k) for k in range(len(labels))]
    column = encoded if raw else [{"bytes": e, "path": None} if isinstance(e, bytes) else e for e in encoded]
    kind = pa.binary() if raw else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"id": list(range(len(labels))), label: labels, image: pa.array(column, kind)})
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "validation/0000.parquet"),
        ("pets-train.parquet", "pets-validation.parquet"),
    ],
)
def test_parquet_layouts(tmp_path: Path, train: str, test: str) -> None:
    write_parquet(tmp_path / train, [0, 1] * 10, names=["cat", "dog"])
    write_parquet(tmp_path / test, [1, 1, 0], start=300, names=["cat", "dog"])
    data = open_data(tmp_path, "test")
    assert data.classes == ["cat", "dog"]
    assert [(number_of(image), label) for image, label in (data[i] for i in range(3))] == [
        (300, 1),
        (301, 1),
        (302, 0),
    ]
    members = {split: numbers(open_data(tmp_path, split)) for split in ("train", "calibration")}
    assert (len(members["train"]), len(members["calibration"])) == (18, 2)
    assert members["train"] | members["calibration"] == set(range(20))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("photo", "labels")])
def test_parquet_columns(tmp_path: Path, raw: bool, image: str, label: str) -> None:
    write_parquet(tmp_path / "test.parquet", [2, 0], image=image, label=label, raw=raw)
    data = open_data(tmp_path, "test")
    assert data.classes == ["0", "1", "2"]
    assert [(number_of(picture), k) for picture, k in (data[0], data[1], data[-1])] == [
        (0, 2),
        (1, 0),
        (1, 0),
    ]
    with pytest.raises(IndexError, match="no row 2"):
        data[2]


def test_parquet_shards_follow_one_another(tmp_path: Path) -> None:
    for shard, (start, count) in enumerate(((0, 4), (4, 1), (5, 7))):
        write_parquet(tmp_path / f"test-{shard:05}-of-00003.parquet", [shard] * count, start=start)
    data = open_data(tmp_path, "test")
    assert [number_of(data[i][0]) for i in range(12)] == list(range(12))
    assert data.labels.tolist() == [0] * 4 + [1] + [2] * 7
    assert [data[i][1] for i in range(12)] == data.labels.tolist()


def test_one_parquet_file_without_a_split_is_divided(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pets.parquet", [0, 1] * 10)
    for spec in (path, tmp_path):
        members = [numbers(open_data(spec, split)) for split in SPLITS]
        assert [len(m) for m in members] == [16, 2, 2]
        assert set.union(*members) == set(range(20))


def test_parquet_pictures_may_lie_beside_the_file(tmp_path: Path) -> None:
    coloured(77).save(tmp_path / "beside.png")
    images = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": None},
        {"bytes": b"junk", "path": None},
    ]
    write_parquet(tmp_path / "test.parquet", [0, 0, 0], images=images)
    data = open_data(tmp_path, "test")
    assert number_of(data[0][0]) == 77
    with pytest.raises(ImageError, match=r"test\.parquet, row 1.*no image"):
        data[1]
    with pytest.raises(ImageError, match=r"test\.parquet, row 2.*not a picture"):
        data[2]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, -1], None, r"row 1: label is -1"),
        ([0, 2], ["a", "b"], r"row 1: label is 2, not a whole number from 0 to 1"),
        ([0.5, 1.0], None, r"row 0: label is 0.5"),
        ([0, None], None, r"row 1: label is null, not a whole number"),
        ([], None, "no rows"),
    ],
)
def test_parquet_labels_are_checked_when_opened(
    tmp_path: Path, labels: list[Any], names: list[str] | None, message: str
) -> None:
    write_parquet(tmp_path / "test.parquet", labels, names=names)
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path, "test")


def test_parquet_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a" / "test.parquet", [0], label="species")
    with pytest.raises(ValueError, match=r"test\.parquet: no label column among id, species, image"):
        open_data(tmp_path / "a", "test")
    write_parquet(path, [0])
    monkeypatch.setattr("miaformer.data.parquet.MAX_RESIDENT_BYTES", 100)
    with pytest.raises(ValueError, match="hfds/"):
        open_data(tmp_path / "a", "test")
    monkeypatch.undo()
    write_parquet(tmp_path / "a" / "more.parquet", [0])
    with pytest.raises(ValueError, match=r"more\.parquet: its name says no split"):
        open_data(tmp_path / "a", "test")
    (tmp_path / "a" / "more.parquet").unlink()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"test\.parquet: not a readable parquet file"):
        open_data(tmp_path / "a", "test")


# names


def test_an_unknown_spec_lists_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    for spec in ("digitz", tmp_path / "nowhere", tmp_path / "file.txt"):
        with pytest.raises(ValueError, match=r"class folders.*parquet.*torch/cifar10"):
            open_data(spec, "test")
    with pytest.raises(ValueError, match="stream"):
        open_data("tfds/mnist", "train")


def test_a_torchvision_name_opens_through_timm(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 10, "b": 10})
    write_folder(tmp_path / "validation", {"a": 1, "b": 2}, start=40)
    data = open_data(f"torch/image_folder:{tmp_path}", "test")
    assert (data.classes, data.labels.tolist(), numbers(data)) == (["a", "b"], [0, 1, 1], {40, 41, 42})
    assert len(open_data(f"torch/image_folder:{tmp_path}", "train")) == 18
    with pytest.raises(ValueError, match="torch/cifar10:ROOT"):
        open_data("torch/cifar10", "train")
    with pytest.raises(ValueError, match=r"could not open its train part.*not found"):
        open_data(f"torch/cifar10:{tmp_path}", "train")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "test.parquet", [0])
    monkeypatch.setattr(digits_module, "_drawn", digits_module._drawn.__wrapped__)  # not what an earlier test has drawn
    for module, spec, install in (
        ("sklearn.datasets", "digits", "miaformer[digits]"),
        ("pyarrow", tmp_path, "miaformer[data]"),
        ("datasets", "hfds/any", "datasets"),
    ):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
        with pytest.raises(ImportError) as caught:
            open_data(spec, "test")
        assert f"pip install '{install}'" in str(caught.value)


# transforms


def test_no_augmentation_is_only_a_resize() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = (np.asarray(image) / 255 - CONFIG["mean"]) / CONFIG["std"]
    for training, augment in ((False, None), (False, EVERYTHING), (True, None), (True, Augmentation())):
        transform = build_transform(CONFIG, training, augment)
        assert transform.deterministic
        tensor = transform(image)
        assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
        assert np.allclose(tensor.permute(1, 2, 0), expected, atol=1e-5)


def test_crop_pct_applies_to_evaluation_only() -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (1, 1, 31, 31))
    config = {**CONFIG, "crop_pct": 0.5, "interpolation": "bilinear"}
    assert build_transform(config)(image).std((1, 2)).max() == 0
    assert build_transform(config, training=True)(image).std((1, 2)).max() > 0.1


def test_normalising_a_batch_equals_normalising_each_image() -> None:
    transform = build_transform({**CONFIG, "input_size": (3, 24, 16), "crop_pct": 0.9})
    pictures = [Noise(5)[i][0] for i in range(5)]
    pixels = torch.stack([transform.pixels(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8
    assert transform.normalizes_batches
    assert torch.equal(transform.normalize(pixels), torch.stack([transform(picture) for picture in pictures]))
    assert not build_transform(CONFIG, True, Augmentation(re_prob=0.1)).normalizes_batches


def test_pictures_of_the_input_size_are_left_alone_and_no_others() -> None:
    transform = build_transform({**CONFIG, "input_size": (3, 24, 16), "crop_pct": 1.0})
    assert transform.keeps_pixels
    rng = np.random.default_rng(0)
    exact, turned = (Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((24, 16), (16, 24)))
    assert np.array_equal(transform.pixels(exact).permute(1, 2, 0), np.asarray(exact))
    for picture in (exact, turned):
        assert torch.equal(transform.normalize(transform.pixels(picture)[None])[0], transform(picture))


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000), (10_000, 700)])
@pytest.mark.parametrize("augment", [None, Augmentation(hflip=0.5), EVERYTHING])
def test_any_shape_of_picture_becomes_the_input_size(size: tuple[int, int], augment: Augmentation | None) -> None:
    transform = build_transform({**CONFIG, "input_size": (3, 224, 224)}, augment is not None, augment)
    random.seed(0)
    assert transform(Image.new("RGB", size, "red")).shape == (3, 224, 224)


def test_a_very_long_picture_is_never_resized_to_an_enormous_one(monkeypatch: pytest.MonkeyPatch) -> None:
    areas: list[int] = []
    resize = Image.Image.resize

    def measured(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", measured)
    build_transform({**CONFIG, "input_size": (3, 224, 224)})(Image.new("RGB", (10_000, 1)))
    assert 0 < max(areas) <= 8 * 224 * 224


def test_a_long_picture_keeps_its_middle() -> None:
    image = Image.new("RGB", (3200, 32), "black")
    image.paste("white", (1584, 0, 1616, 32))
    assert build_transform(CONFIG)(image).std((1, 2)).max() < 1e-6


@pytest.mark.parametrize("policy", ["rand-m10-n4", "rand-m10-n4-inc1", "v0", "originalr", "augmix-m10-w3"])
def test_the_strongest_augmentation_works_with_this_pillow(policy: str) -> None:
    """timm's posterize asks for 0 bits at magnitude 10."""
    transform = build_transform(CONFIG, training=True, augment=Augmentation(auto_augment=policy))
    data = Noise(60)
    random.seed(0)
    for index in range(60):
        assert transform(data[index][0]).isfinite().all()


def test_transform_mistakes_are_named() -> None:
    for policy in ("rand-x9", "strong"):
        with pytest.raises(ValueError, match=f"auto_augment={policy!r}"):
            build_transform(CONFIG, training=True, augment=Augmentation(auto_augment=policy))
    with pytest.raises(ValueError, match="lacks mean"):
        build_transform({key: CONFIG[key] for key in CONFIG if key != "mean"})
    with pytest.raises(ValueError, match=r"\(1, 28, 28\).*RGB"):
        build_transform({**CONFIG, "input_size": (1, 28, 28)})
    for field, value in (
        ("hflip", 1.5),
        ("re_prob", -0.1),
        ("scale", (0.9, 0.1)),
        ("scale", (0.5, 2.0)),
        ("ratio", (0, 1)),
        ("color_jitter", -1.0),
    ):
        with pytest.raises(ValueError, match=field):
            Augmentation(**{field: value})
    assert Augmentation(scale=[0.5, 1.0]) == Augmentation(scale=(0.5, 1.0))  # type: ignore[arg-type]


# batches


def batches(data: ImageData, augment: Augmentation | None = EVERYTHING, batch_size: int = 4, **options: Any) -> Batches:
    options = {"seed": 5, "shuffle": True, "drop_last": False, **options}
    return Batches(data, build_transform(CONFIG, True, augment), batch_size, **options)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


AUGMENTS = pytest.mark.parametrize("augment", [None, Augmentation(hflip=0.5), EVERYTHING], ids=str)


@AUGMENTS
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_slices_of_all_processes_make_the_batch_of_one(augment: Augmentation | None, world_size: int) -> None:
    data = Noise(18)
    whole = list(batches(data, augment).epoch(1))
    slices = [list(batches(data, augment, rank=r, world_size=world_size).epoch(1)) for r in range(world_size)]
    for batch, *parts in zip(whole, *slices, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        joined = Batch(*(torch.cat([getattr(p, f) for p in parts]) for f in ("images", "labels", "index")))
        assert_same([joined], [batch])
    assert min(len(part[-1]) for part in slices) < 1 or world_size == 2  # the last batch has 2 images


@AUGMENTS
def test_resuming_at_a_step_gives_the_same_batches(augment: Augmentation | None) -> None:
    data = Noise(18)
    uninterrupted = list(batches(data, augment).epoch(3))
    for step in (0, 1, 3, 5):
        assert_same(list(batches(data, augment).epoch(3, start_step=step)), uninterrupted[step:])


@AUGMENTS
def test_workers_change_nothing(augment: Augmentation | None) -> None:
    data = Noise(18)
    alone, helped = batches(data, augment), batches(data, augment, num_workers=2)
    assert_same(list(helped.epoch(0)), list(alone.epoch(0)))
    next(helped.epoch(1))  # abandoned: its batches must not appear in the next
    assert_same(list(helped.epoch(2, start_step=1)), list(alone.epoch(2, start_step=1)))


def global_random_state() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


@AUGMENTS
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_random_state_alone(augment: Augmentation | None, num_workers: int) -> None:
    before = global_random_state()
    for _ in batches(Noise(9), augment, num_workers=num_workers).epoch(0):
        assert global_random_state() == before
    assert global_random_state() == before


def test_the_random_state_does_not_change_what_is_loaded() -> None:
    first = list(batches(Noise(9)).epoch(0))
    random.random()
    torch.rand(1)
    assert_same(list(batches(Noise(9)).epoch(0)), first)


def test_order_and_augmentation_change_with_epoch_and_seed() -> None:
    data = Noise(18)
    one = batches(data, batch_size=18)
    (first,), (second,) = one.epoch(0), one.epoch(1)
    (other,) = batches(data, batch_size=18, seed=6).epoch(0)
    for batch in (second, other):
        assert sorted(batch.index.tolist()) == list(range(18))
        assert batch.index.tolist() != first.index.tolist()
        assert not torch.equal(batch.images[batch.index.argsort()], first.images[first.index.argsort()])
    assert one.order(0).tolist() != list(range(18))
    assert batches(data, shuffle=False).order(7).tolist() == list(range(18))


@pytest.mark.parametrize(("size", "crop_pct"), [(SIZE, 1.0), (SIZE, 0.9), (SIZE + 4, 1.0)])
def test_every_epoch_shows_each_image_once_with_its_label(
    digits: dict[str, Digits], size: int, crop_pct: float
) -> None:
    """Also where pictures need no resize, and are taken from memory."""
    data = digits["calibration"]
    expected = build_transform({**CONFIG, "input_size": (3, size, size), "crop_pct": crop_pct})
    loader = Batches(data, expected, 128, seed=0, shuffle=True, drop_last=False)
    for epoch in (0, 1):  # decoded, then from the cache
        seen = list(loader.epoch(epoch))
        assert [len(batch) for batch in seen] == [128, 128, 128, 128, 28]
        index = torch.cat([batch.index for batch in seen])
        assert sorted(index.tolist()) == list(range(len(data)))
        assert torch.cat([batch.labels for batch in seen]).tolist() == data.labels[index].tolist()
        for k in (0, 77, 127):
            assert torch.equal(seen[2].images[k], expected(data[int(seen[2].index[k])][0]))


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    class Counted(Noise):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            reads.append(index)
            return super().__getitem__(index)

    for limit, expected in ((9 * 3 * 32 * 32, 9), (9 * 3 * 32 * 32 - 1, 18)):
        monkeypatch.setattr("miaformer.data.loader.CACHE_BYTES", limit)
        loader = batches(Counted(9), None)
        assert_same(sorted_by_index(loader.epoch(0)), sorted_by_index(loader.epoch(1)))
        assert len(reads) == expected
        reads.clear()


def sorted_by_index(epoch: Iterator[Batch]) -> list[Batch]:
    seen = list(epoch)
    order = torch.cat([batch.index for batch in seen]).argsort()
    return [Batch(*(torch.cat([getattr(b, f) for b in seen])[order] for f in ("images", "labels", "index")))]


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 4), (False, 5)])
def test_steps_per_epoch_counts_what_comes(drop_last: bool, steps: int) -> None:
    for rank in (0, 1):
        loader = batches(Noise(17), None, drop_last=drop_last, rank=rank, world_size=2)
        assert loader.steps_per_epoch == steps == len(list(loader.epoch(0)))


def test_an_empty_slice_has_the_shape_of_a_batch() -> None:
    for augment in (None, EVERYTHING):
        *_, last = batches(Noise(17), augment, rank=0, world_size=2).epoch(0)
        assert len(last) == 0
        assert (last.images.shape, last.images.dtype) == ((0, 3, 32, 32), torch.float32)
        assert (last.labels.dtype, last.index.dtype) == (torch.int64, torch.int64)


def test_any_callable_may_be_the_transform() -> None:
    def crop(image: Image.Image) -> torch.Tensor:
        return torch.rand(1) + torch.zeros(1, 2, 2) + image.size[0]

    loader = Batches(Noise(6), crop, 4, seed=0, shuffle=False, drop_last=False)
    first, second = loader.epoch(0)
    assert first.images.shape == (4, 1, 2, 2)
    assert first.images.unique().numel() == 4
    assert_same(list(loader.epoch(0)), [first, second])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_sample_stops_loading_and_is_named(tmp_path: Path, num_workers: int) -> None:
    write_folder(tmp_path / "test", {"a": 6})
    (tmp_path / "test" / "a" / "004.png").write_bytes(b"")
    loader = batches(open_data(tmp_path, "test"), batch_size=2, shuffle=False, num_workers=num_workers)
    steps = loader.epoch(0)
    assert len(next(steps)) == 2
    with pytest.raises(ImageError, match=r"004\.png: the file is empty") as error:
        list(steps)
    assert "Traceback" not in str(error.value)


def test_loader_mistakes_are_named() -> None:
    for options in ({"seed": -1}, {"batch_size": 0}, {"num_workers": -1}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            batches(Noise(9), **options)
    with pytest.raises(ValueError, match="noise: 9 images do not fill a batch of 10"):
        batches(Noise(9), batch_size=10, drop_last=True)
    with pytest.raises(ValueError, match="no images"):
        batches(Noise(0))
    with pytest.raises(ValueError, match="start_step=4"):
        batches(Noise(9)).epoch(0, start_step=4)


def test_data_and_transforms_can_be_sent_to_a_process(tmp_path: Path, digits: dict[str, Digits]) -> None:
    write_parquet(tmp_path / "test.parquet", [0, 1])
    for data in (
        digits["test"],
        open_data(tmp_path, "test"),
        open_data(write_folder(tmp_path / "f", {"a": 20}), "test"),
    ):
        sent = pickle.loads(pickle.dumps(data))
        assert sent[1][0].tobytes() == data[1][0].tobytes()
    transform = build_transform(CONFIG)
    image = digits["test"][0][0]
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))


# links


def test_a_link_to_the_folder_above_adds_nothing(tmp_path: Path) -> None:
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"{number}.png").write_bytes(png(10 * label + number))
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "dog" / "far up").symlink_to(tmp_path.parent.resolve())
    (tmp_path / "dog" / "here").symlink_to(".")
    members = [data for split in SPLITS for data in [open_data(tmp_path, split)]]
    assert sum(map(len, members)) == 20
    for data in members:
        assert [number_of(data[k][0]) // 10 for k in range(len(data))] == data.labels.tolist()


def test_a_link_into_another_class_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(10):
            (tmp_path / name / "deep" / f"{number}.png").write_bytes(png(number))
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat" / "deep")
    with pytest.raises(ValueError, match=r"dog/more: a link to pictures of class 'cat', in class 'dog'"):
        open_data(tmp_path, "train")
