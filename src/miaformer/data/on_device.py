"""Batches of small pictures, decoded once and augmented on the device, whole batches at a time.

For data such as CIFAR, where decoding and changing one picture after another on the host takes longer than a step of
the model on a GPU. As `Batches`, they are the same for any number of processes and from any step on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.data.loader import Batch, check_shares, epoch_order, share_of
from miaformer.data.seeds import stream_seed
from miaformer.data.source import ImageData
from miaformer.data.transforms import Augmentation, build_transform

MAX_DEVICE_BYTES = 4 << 30  # of decoded pictures

_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing
_DRAWS = 14  # random numbers an image
_AUGMENT = 2  # stream of random numbers; the loader's own are 0 and 1


class DeviceBatches:
    """The batches of a data set, epoch by epoch, from pixels that lie on `device`.

    Args:
        data: the images; all of them are decoded at once, resized to the backbone's input.
        data_config: the backbone's, as `build_transform` takes it.
        augment: random changes to each image, `auto_augment` excepted, which works on pictures only. Crops are cut and
            resized bilinearly.
        batch_size, seed, rank, world_size: as of `Batches`. Images are shuffled; a smaller last batch is left out.
        device: where pixels lie and batches come from.

    Raises:
        ValueError: an argument is out of range, the pixels are too many, or `augment` asks for what it cannot do.
        ImageError: an image cannot be decoded; the message names it.
    """

    def __init__(
        self,
        data: ImageData,
        data_config: Mapping[str, Any],
        augment: Augmentation,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_shares(batch_size, seed, rank, world_size)
        if augment.auto_augment is not None:
            raise ValueError("auto_augment works on pictures, not on the device: leave it out, or load on the host")
        if len(data) < batch_size:
            raise ValueError(f"{data.name}: {len(data)} images do not fill a batch of {batch_size}")
        transform = build_transform(data_config, training=True)  # the framing of training, as on the host
        size = len(data) * math.prod(transform.size)
        if size > MAX_DEVICE_BYTES:
            raise ValueError(
                f"{data.name}: its pixels take {size / 2**30:.1f} GiB, more than the "
                f"{MAX_DEVICE_BYTES / 2**30:.0f} GiB that are kept on the device: load on the host"
            )
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.augment = augment
        self.steps_per_epoch = len(data) // batch_size
        self.device = device
        self.pixels = torch.stack([transform.pixels(data[i][0]) for i in range(len(data))]).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self._mean, self._std = (torch.tensor(data_config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This process's slice of each batch of `epoch`, from step `start_step` on."""
        order = epoch_order(len(self.labels), self.seed, epoch)
        for step in range(start_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = share_of(self.batch_size, self.rank, self.world_size)
            index = batch[part].to(self.device)
            generator = torch.Generator().manual_seed(stream_seed(_AUGMENT, self.seed, epoch, step))
            draws = torch.rand(self.batch_size, _DRAWS, generator=generator)[part].to(self.device)
            images = self.pixels[index].float().div_(255)
            yield Batch(self._changed(images, draws), self.labels[index], index)

    def _changed(self, images: Tensor, draws: Tensor) -> Tensor:
        """images: (B, 3, H, W) from 0 to 1; draws: (B, 14) uniform."""
        augment = self.augment
        u = iter(draws.unbind(dim=1))
        images = _cropped(images, augment, [next(u) for _ in range(6)])
        if augment.color_jitter:
            images = _jittered(images, augment.color_jitter, [next(u) for _ in range(3)])
        images = (images - self._mean) / self._std
        if augment.re_prob:
            images = _erased(images, augment.re_prob, [next(u) for _ in range(5)])
        return images


def _cropped(images: Tensor, augment: Augmentation, u: list[Tensor]) -> Tensor:
    """Random crops, resized back, and flips, as one bilinear sampling."""
    area = augment.scale[0] + (augment.scale[1] - augment.scale[0]) * u[0]
    low, high = (math.log(value) for value in augment.ratio)
    ratio = (low + (high - low) * u[1]).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(u[2] < augment.hflip, -width, width)
    theta[:, 1, 1] = torch.where(u[3] < augment.vflip, -height, height)
    theta[:, 0, 2] = (2 * u[4] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * u[5] - 1) * (1 - height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _jittered(images: Tensor, strength: float, u: list[Tensor]) -> Tensor:
    """Brightness, contrast and saturation, each changed by a factor of 1 +- strength at most."""
    brightness, contrast, saturation = ((1 + strength * (2 * v - 1)).view(-1, 1, 1, 1) for v in u)
    luma = images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    images = images * brightness
    grey = (images * luma).sum(dim=1, keepdim=True)
    images = grey.mean(dim=(2, 3), keepdim=True).lerp(images, contrast)
    grey = (images * luma).sum(dim=1, keepdim=True)
    return grey.lerp(images, saturation).clamp_(0, 1)


def _erased(images: Tensor, probability: float, u: list[Tensor]) -> Tensor:
    """A random rectangle of some images (normalised) set to the mean colour."""
    rows, columns = images.shape[2:]
    area = _ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * u[1]
    low, high = (math.log(value) for value in _ERASED_RATIO)
    ratio = (low + (high - low) * u[2]).exp()
    height, width = (area * ratio).sqrt().clamp(max=1) * rows, (area / ratio).sqrt().clamp(max=1) * columns

    def inside(size: Tensor, total: int, place: Tensor) -> Tensor:
        start = place * (total - size)
        middle = torch.arange(total, device=images.device) + 0.5
        return (middle >= start[:, None]) & (middle < (start + size)[:, None])

    erased = inside(height, rows, u[3])[:, None, :, None] & inside(width, columns, u[4])[:, None, None, :]
    erased = erased & (u[0] < probability).view(-1, 1, 1, 1)
    return images.masked_fill(erased, 0)
