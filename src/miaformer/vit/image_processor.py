"""What an image processor of `transformers` makes of images, in timm's terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

# Of an image processor's settings those that say what a picture becomes, and how far answers to them may be apart, as
# a fraction of their range: filters that round differently are 0.01 apart, a row of pixels more or less 0.06.
_PREPARATION = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size", "resample")
_SAME_PICTURE = 0.03


def height_and_width(size: Any) -> tuple[int, int]:
    """(H, W) of a number or of two."""
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def preparation(image_processor: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """The size (H, W) of the pictures that an image processor gives, and timm's configuration for preparing them.

    image_processor: also what `AutoProcessor` gives, whose image processor is then taken.

    Raises TypeError for what is none, ValueError for one that does not say the size of its pictures, or whose pictures
    timm's transforms do not give.
    """
    image_processor = getattr(image_processor, "image_processor", image_processor)
    if not hasattr(image_processor, "to_dict"):
        raise TypeError(
            f"image_processor is a {type(image_processor).__name__}; give what transformers' "
            "AutoImageProcessor.from_pretrained gives"
        )
    settings = image_processor.to_dict()
    resized = settings.get("size") if settings.get("do_resize", True) else None
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    no_size = f"image_processor gives pictures no size that is known before: size={resized}, crop_size={cropped}"
    try:
        size = height_and_width(cropped or resized)
        edge = height_and_width(resized or cropped)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(no_size) from error
    if not cropped and isinstance(resized, Mapping) and "height" not in resized:
        raise ValueError(no_size)
    squashes = isinstance(resized, Mapping) and "height" in resized
    # Channels v from 0 to 255 become (v * factor - mean) / std; timm says the same of v / 255.
    factor = 255 * (settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0)
    normalises = settings.get("do_normalize", True)
    mean, std = (settings["image_mean"], settings["image_std"]) if normalises else ((0.0,) * 3, (1.0,) * 3)
    resample = settings.get("resample", Image.Resampling.BILINEAR)
    name = resample.name if hasattr(resample, "name") else Image.Resampling(resample).name
    pictures = {
        "mean": tuple(value / factor for value in mean),
        "std": tuple(value / factor for value in std),
        "interpolation": name.lower(),
        "crop_pct": _crop_pct(size[0], edge[0]),
        "crop_mode": "squash" if squashes else "center",
    }
    _check_pictures(image_processor, size, pictures, settings)
    return size, pictures


def _check_pictures(
    image_processor: Any, size: tuple[int, int], pictures: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise ValueError where timm's transforms prepare pictures otherwise than the processor does."""
    from miaformer.data.transforms import build_transform

    transform = build_transform({**pictures, "input_size": (3, *size)})
    height, width = size
    for shape in ((2 * height, 3 * width), (3 * height, 2 * width), size):
        # Smooth: filters of resizing differ, in what they round and in where they end.
        small = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(small, shape, mode="bicubic", align_corners=False).clamp(0, 1)
        picture = Image.fromarray((255 * smooth[0].permute(1, 2, 0)).round().to(torch.uint8).numpy())
        wanted = image_processor(picture, return_tensors="pt")["pixel_values"][0]
        found = transform(picture)
        apart = (found - wanted).abs().max() if found.shape == wanted.shape else torch.tensor(float("inf"))
        if apart > _SAME_PICTURE * (wanted.max() - wanted.min()):
            told = {name: settings[name] for name in _PREPARATION if name in settings}
            raise ValueError(
                f"image_processor prepares pictures as timm's transforms do not: of {shape[1]} x {shape[0]} pixels "
                f"its answer has shape {tuple(wanted.shape)}, ours {tuple(found.shape)}, and values are "
                f"{float(apart):.2g} apart. Its settings: {told}. Prepare pictures by yourself, and adapt the model "
                "without image_processor"
            )


def _crop_pct(size: int, resized: int) -> float:
    """A fraction that timm, which rounds size / crop_pct down, gets `resized` back from."""
    fraction = size / resized
    return fraction if math.floor(size / fraction) == resized else math.nextafter(fraction, 0)
