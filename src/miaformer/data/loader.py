"""Batches that are the same for any number of processes and workers, from any step on.

Three things make it so. The order of an epoch depends on (seed, epoch) only. A sample's random augmentation
depends on (seed, epoch, sample) only. And nothing here draws from, or leaves changed, the random state of the
main process, so what a model draws does not depend on how its data was loaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from miaformer.data.source import ImageData
from miaformer.data.transforms import Transform

CACHE_BYTES = 256 << 20
"""Most memory that resized images, kept from one epoch to the next, may take in the main process."""

_ORDER, _SAMPLE = 0, 1  # separate streams of random numbers


@dataclass(frozen=True, slots=True)
class Batch:
    """Some images: `images` (b, C, H, W) float32, `labels` (b,) int64, and `index` (b,) int64, their places
    in the data."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.images.to(device), self.labels.to(device), self.index.to(device))


class LabelledBatch(Protocol):
    """What evaluation needs of a batch: `images` (B, 3, H, W), normalised, and `labels` (B,) int64."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


class Batches:
    """The batches of a data set, epoch by epoch.

    Args:
        data: the images.
        transform: a picture to a (C, H, W) tensor; `build_transform` makes one. Any other callable is taken
            to be random.
        batch_size: images in a step over all processes together.
        seed: of order and augmentation; not negative.
        shuffle: whether each epoch has its own order; else images come in order.
        drop_last: whether to leave out the last batch of an epoch if it is smaller.
        rank, world_size: this process among `world_size`. It gets the `rank`-th of nearly equal contiguous
            slices of each batch; slices differ by at most one image, and in a last batch of fewer images than
            processes some are empty: b = 0, so that every process takes the same number of steps.
        num_workers: processes that decode; 0 decodes here. They live until this object goes.

    Raises:
        ValueError: an argument is out of range, or no full batch exists and `drop_last` is asked for.
    """

    def __init__(
        self,
        data: ImageData,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: must be at least 0")
        check_shares(batch_size, seed, rank, world_size)
        if len(data) == 0:
            raise ValueError(f"{data.name}: no images")
        if drop_last and len(data) < batch_size:
            raise ValueError(
                f"{data.name}: {len(data)} images do not fill a batch of {batch_size}; use drop_last=False"
            )
        self.data, self.batch_size, self.seed, self.shuffle = data, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        n = len(data)
        self.steps_per_epoch = n // batch_size if drop_last else -(-n // batch_size)
        self._normalize = transform.normalize if _normalizes_batches(transform) else None
        self._plan = _Plan()
        self._loader = DataLoader(
            _Samples(data, transform, seed, may_cache=num_workers == 0),
            batch_sampler=self._plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_is,
            generator=torch.Generator(),  # else DataLoader draws from the global one
        )

    def order(self, epoch: int) -> Tensor:
        """The order of the images in this epoch: (n,) int64. It depends on the seed and the epoch only."""
        return epoch_order(len(self.data), self.seed, epoch) if self.shuffle else torch.arange(len(self.data))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This process's slice of each batch of `epoch`, from step `start_step` on.

        With workers only one epoch can be under way: starting another ends the one before it.

        Raises:
            ValueError: `epoch` is negative or `start_step` is not in 0..steps_per_epoch.
            ImageError: an image cannot be decoded; the message names it.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"epoch={epoch}, start_step={start_step}: an epoch has steps 0 to {self.steps_per_epoch}")
        return self._steps(epoch, start_step)

    def _steps(self, epoch: int, start_step: int) -> Iterator[Batch]:
        self._plan.batches = [
            [(epoch, i) for i in batch[share_of(len(batch), self.rank, self.world_size)].tolist()]
            for batch in self.order(epoch).split(self.batch_size)[start_step : self.steps_per_epoch]
        ]
        for loaded in self._loader:
            if isinstance(loaded, Exception):
                raise loaded
            images, labels, index = loaded
            if self._normalize is not None:
                images = self._normalize(images)
            yield Batch(images, labels, index)


def check_shares(batch_size: int, seed: int, rank: int, world_size: int) -> None:
    """Raise ValueError for what no batches can be drawn and shared by."""
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of {world_size} processes: use 0 to {world_size - 1}")


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """A shuffled order of the images: (n,) int64, by seed and epoch only."""
    rng = np.random.Generator(np.random.PCG64([seed, _ORDER, epoch]))
    return torch.from_numpy(np.argsort(rng.random(num_images), kind="stable"))


def share_of(batch_size: int, rank: int, world_size: int) -> slice:
    """The `rank`-th of nearly equal contiguous slices of a batch."""
    return slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)


class _Plan:
    """The batch sampler: it lists the (epoch, index) pairs of each batch to come."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Decodes and transforms a batch of (epoch, index) pairs, in a worker or in the main process.

    Where the transform can normalise whole batches it leaves images uint8. Where it is also deterministic,
    images are kept for the next epoch, if all of them fit into `CACHE_BYTES`, or are taken as they are from data
    that holds them in memory in the right size.
    """

    def __init__(self, data: ImageData, transform: Callable[[Image.Image], Tensor], seed: int, may_cache: bool) -> None:
        self.data, self.transform, self.seed = data, transform, seed
        self.deterministic = isinstance(transform, Transform) and transform.deterministic
        self._prepare = transform.pixels if _normalizes_batches(transform) else transform
        self._cache: Tensor | None = None
        self._cached = np.zeros(len(data), dtype=bool)
        if _normalizes_batches(transform) and transform.deterministic:
            self._cache = _ready_pixels(data, transform)
            if self._cache is not None:
                self._cached[:] = True
            elif may_cache and len(data) * math.prod(transform.size) <= CACHE_BYTES:
                self._cache = torch.empty(len(data), *transform.size, dtype=torch.uint8)

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor] | Exception:
        """Images, labels and places; from a worker also what went wrong: raised there it would come as a traceback."""
        try:
            return self._loaded(pairs)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            return error

    def _loaded(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor([i for _, i in pairs], dtype=torch.int64)
        labels = torch.from_numpy(self.data.labels)[index]
        if self._cache is not None:
            for i in index[~torch.from_numpy(self._cached)[index]].tolist():
                self._cache[i] = self._prepare(self.data[i][0])
                self._cached[i] = True
            return self._cache[index], labels, index
        if not pairs:  # one image says what shape, of none
            return self._loaded([(0, 0)])[0][:0], labels, index
        with _random_state_kept(not self.deterministic):
            return torch.stack([self._sample(epoch, i) for epoch, i in pairs]), labels, index

    def _sample(self, epoch: int, index: int) -> Tensor:
        image, _ = self.data[index]
        if not self.deterministic:
            _seed_all(np.random.SeedSequence([self.seed, _SAMPLE, epoch, index]))
        return self._prepare(image)


def _normalizes_batches(transform: Callable[[Image.Image], Tensor]) -> TypeGuard[Transform]:
    return isinstance(transform, Transform) and transform.normalizes_batches


def _ready_pixels(data: ImageData, transform: Transform) -> Tensor | None:
    """All pictures as (n, 3, H, W) uint8, a view, if `transform` would do nothing but normalise them."""
    if data.pixels is None or not transform.keeps_pixels or data.pixels.shape[1:3] != transform.size[1:]:
        return None
    pixels = torch.from_numpy(data.pixels)
    return pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None].expand(-1, 3, -1, -1)


def _as_is(batch: Any) -> Any:
    return batch


def _seed_all(seeds: np.random.SeedSequence) -> None:
    for_python, for_numpy, for_torch = seeds.generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002 - timm's augmentations draw from the global generators
    torch.default_generator.manual_seed(for_torch)  # not torch.manual_seed, which would seed the GPUs too


@contextmanager
def _random_state_kept(needed: bool) -> Iterator[None]:
    """Leave Python's, NumPy's and PyTorch's global (CPU) generators as they were."""
    if not needed:
        yield
        return
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
