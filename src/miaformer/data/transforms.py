"""From a picture to what the backbone was trained on: timm's transforms, taken apart so that batches can be
cheap.

timm builds the steps. All that work on the picture run per sample; the last two, to float and normalise, can
run on a whole batch of uint8, which is 4 times less to copy between processes and to cache, with
bit-identical results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import MaybeToTensor
from torch import Tensor

_MAX_ASPECT = 8  # longer pictures lose their ends, which the centre crop would cut off after an enormous resize
_NEEDED = ("input_size", "interpolation", "mean", "std")


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images. The default changes nothing: images are only resized and cropped.

    Args:
        hflip, vflip: probabilities of a flip.
        scale: least and greatest area of the random crop, as fractions of the picture's.
        ratio: least and greatest width / height of the random crop.
        auto_augment: timm's string, such as "rand-m9-mstd0.5-inc1"; it switches `color_jitter` off, as in
            timm.
        color_jitter: strength of brightness, contrast and saturation jitter.
        re_prob: probability of erasing a random rectangle.
    """

    hflip: float = 0.0
    vflip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    auto_augment: str | None = None
    color_jitter: float = 0.0
    re_prob: float = 0.0

    def __post_init__(self) -> None:
        for field in ("hflip", "vflip", "re_prob"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)!r} is not a probability from 0 to 1")
        for field in ("scale", "ratio"):
            bounds = tuple(getattr(self, field))
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"{field}={bounds!r} is not a range (low, high) with 0 < low <= high")
            object.__setattr__(self, field, bounds)  # recipes read from a file give lists
        if self.scale[1] > 1:
            raise ValueError(f"scale={self.scale!r} asks for crops larger than the picture: use at most 1.0")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter={self.color_jitter!r} is negative")

    @property
    def is_identity(self) -> bool:
        return self == Augmentation()


class Transform:
    """A picture to a normalised tensor: `transform(image) -> (3, H, W) float32`.

    `size` is (3, H, W). `deterministic` says that nothing in it is random, `keeps_pixels` that pictures of size
    (W, H) are only normalised. `normalizes_batches` says that `transform(image)` equals
    `transform.normalize(transform.pixels(image)[None])[0]`, which holds unless a step follows the normalisation
    (random erasing does).
    """

    def __init__(self, steps: list[Callable[[Any], Any]], size: tuple[int, int, int], deterministic: bool) -> None:
        split = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        self.size, self.deterministic = size, deterministic
        self.steps = steps
        self._on_picture, normalize = steps[:split], steps[split + 1]
        self.normalizes_batches = len(steps) == split + 2
        self._mean: Tensor = torch.as_tensor(normalize.mean).view(-1, 1, 1)  # type: ignore[attr-defined]
        self._std: Tensor = torch.as_tensor(normalize.std).view(-1, 1, 1)  # type: ignore[attr-defined]
        self.keeps_pixels = False  # until all steps have shown it
        self.keeps_pixels = deterministic and self._keeps_noise()

    def __call__(self, image: Image.Image) -> Tensor:
        value: Any = image
        for step in self.steps:
            value = step(value)
        return value

    def pixels(self, image: Image.Image) -> Tensor:
        """The steps before normalisation: (3, H, W) uint8."""
        value: Any = image
        if not (self.keeps_pixels and image.size == self.size[:0:-1]):
            for step in self._on_picture:
                value = step(value)
        return torch.from_numpy(np.array(value)).permute(2, 0, 1)

    def _keeps_noise(self) -> bool:
        _, height, width = self.size
        noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return bool(np.array_equal(self.pixels(Image.fromarray(noise)).permute(1, 2, 0), noise))

    def normalize(self, pixels: Tensor) -> Tensor:
        """(b, 3, H, W) uint8 to normalised float32, on their device."""
        if pixels.device.type == "cpu":  # numpy's, after which no threads spin on the cores of whoever runs next
            values = pixels.numpy().astype(np.float32)
            values /= 255
            values -= self._mean.numpy()
            values /= self._std.numpy()
            return torch.from_numpy(values)
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __repr__(self) -> str:
        return f"Transform({', '.join(map(repr, self.steps))})"


def build_transform(
    data_config: Mapping[str, Any], training: bool = False, augment: Augmentation | None = None
) -> Transform:
    """The transform for a backbone, by `timm.data.create_transform`.

    Without random changes (`training=False`, or the identity `Augmentation`) pictures are resized and
    centre-cropped: to `crop_pct` of the resized picture in evaluation, all of the shorter side in training.
    Small data such as CIFAR wants `crop_pct=1.0` in evaluation too, which timm's configuration of the
    backbone rarely says.

    Args:
        data_config: as `timm.data.resolve_data_config` gives: `input_size` (3, H, W), `interpolation`,
            `mean`, `std`, and optionally `crop_pct` and `crop_mode`. Other keys are ignored.
        training: whether `augment` applies.
        augment: random changes; None is no change.

    Raises:
        ValueError: a key is missing, or the backbone does not take three channels.
    """
    missing = [key for key in _NEEDED if key not in data_config]
    if missing:
        raise ValueError(f"data_config lacks {', '.join(missing)}: pass what timm.data.resolve_data_config gives")
    channels, height, width = data_config["input_size"]
    if channels != 3:
        raise ValueError(f"input_size={tuple(data_config['input_size'])}: pictures are RGB, so it must be (3, H, W)")
    config = {key: data_config[key] for key in _NEEDED}
    augment = augment or Augmentation()
    if training and not augment.is_identity:
        steps = _training_steps(config, augment)
    else:
        crop_pct = 1.0 if training else data_config.get("crop_pct")
        crop_mode = data_config.get("crop_mode") or "center"
        steps = list(create_transform(**config, crop_pct=crop_pct, crop_mode=crop_mode).transforms)
        if crop_mode == "center":
            steps.insert(0, _limit_aspect)
    return Transform(steps, (3, height, width), deterministic=not training or augment.is_identity)


def _training_steps(config: dict[str, Any], augment: Augmentation) -> list[Any]:
    options = asdict(augment) | {"color_jitter": augment.color_jitter or None}
    try:
        steps: list[Any] = list(create_transform(**config, is_training=True, **options).transforms)
    except Exception as error:  # timm asserts, or fails wherever the string breaks it
        if augment.auto_augment is None:
            raise
        raise ValueError(
            f"auto_augment={augment.auto_augment!r} is not what timm understands, such as 'rand-m9-mstd0.5-inc1': "
            f"{type(error).__name__} {error}"
        ) from error
    for step in steps:
        _mend_posterize(step)
    return steps


def _mend_posterize(step: Any) -> None:
    """At its highest magnitude timm 1.0.31 posterizes to 0 bits, which Pillow 13 refuses."""
    operations = [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]
    for operation in operations:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Cut the ends off very long pictures: 10,000 x 1 px, resized to 224 px high, would take 1.5 GB."""
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))
