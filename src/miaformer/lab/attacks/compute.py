"""Attacks on what an image costs: inputs made to burn compute, image by image or by one patch for all.

SlowFormer (Navaneet et al., CVPR 2024) drove A-ViT and AdaViT to nearly full cost with one patch; here the gradient
goes through the decisions (`miaformer.lab.attacks.through`). A cap is what they cannot break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.lab.attacks.gradient import Ball, Climb, Height, climb, wrong_lead
from miaformer.lab.attacks.target import Classifier, Target

KEEPING_WEIGHT = 1.0  # of a lost lead against MACs, where the prediction is to stay

PATCH_BATCH = 64
RATE = 0.1  # of Adam, which learns patches

Place = Literal["corner", "centre"]


def raise_macs(
    target: Target, images: Tensor, ball: Ball, how: Climb, keep_prediction: bool = False, seed: int = 0
) -> Tensor:
    """Images (B, 3, H, W) within the ball that cost the most found. keep_prediction: and are classified as before."""
    predicted = _predictions(target, images) if keep_prediction else None
    return climb(spending(target.views[target.sharpest], predicted), images, ball, how, seed)


def spending(classifier: Classifier, predicted: Tensor | None = None) -> Height:
    """Climbs MACs; never high enough. predicted: (B,) classes that are to stay; images that lose theirs count for
    nothing.
    """

    def height(pixels: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        logits, macs = classifier(pixels)
        never = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        if predicted is None:
            return macs.float(), never
        lead = wrong_lead(logits, predicted[which])
        lost = (lead > 0).float() * 2.0  # below every image that keeps its class, yet with a way back
        return macs.float() - KEEPING_WEIGHT * F.relu(lead + 0.05) - lost, never

    return height


def _predictions(target: Target, images: Tensor) -> Tensor:
    with torch.no_grad():
        return target.deployed(images).logits.argmax(dim=1)


@dataclass(frozen=True)
class Patch:
    """A piece of image that is put over others. pixels: (3, h, w); top, left: where."""

    pixels: Tensor
    top: int
    left: int

    def on(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), which stay as they are."""
        height, width = self.pixels.shape[1:]
        patched = images.clone()
        patched[:, :, self.top : self.top + height, self.left : self.left + width] = self.pixels
        return patched

    @property
    def area(self) -> int:
        """Pixels."""
        return self.pixels.shape[1] * self.pixels.shape[2]


def patch_size(image_size: tuple[int, int], share: float) -> tuple[int, int]:
    """(h, w) of the largest patch, about as wide as high, of at most this share of an image (H, W)."""
    if not 0 < share <= 1:
        raise ValueError(f"patch area {share!r} must be a share of the image, more than 0 and at most 1")
    most = int(share * image_size[0] * image_size[1])
    if not most:
        raise ValueError(f"patch area {share!r} of an image of {image_size} is less than a pixel")
    height = max(math.isqrt(most), 1)
    return height, most // height


def universal_patch(
    target: Target,
    batches: Sequence[Tensor],
    share: float = 0.02,
    place: Place = "corner",
    steps: int = 200,
    keep_prediction: bool = False,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Patch:
    """One patch of this share of the area that makes all images cost more, learned on batches of others.

    batches: pixels (B, 3, H, W) from 0 to 1, one a step, in turn. The patch is a sigmoid of free numbers, which Adam
    moves.
    """
    image_height, image_width = batches[0].shape[2:]
    height, width = patch_size((image_height, image_width), share)
    top, left = (0, 0) if place == "corner" else ((image_height - height) // 2, (image_width - width) // 2)
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(3, height, width, generator=generator).to(batches[0]).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE)
    view = target.views[target.sharpest]
    for step in range(steps):
        images = batches[step % len(batches)]
        which = torch.arange(len(images), device=images.device)
        predicted = _predictions(target, images) if keep_prediction else None
        value, _ = spending(view, predicted)(Patch(torch.sigmoid(free), top, left).on(images), which)
        optimizer.zero_grad()
        (free.grad,) = torch.autograd.grad(-value.mean(), [free])
        optimizer.step()
        if on_step is not None:
            on_step(step + 1)
    return Patch(torch.sigmoid(free).detach(), top, left)


def best_patch(
    target: Target,
    learned_on: Tensor,
    share: float,
    steps: int,
    keep_prediction: bool = False,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Patch:
    """The better of two places, a corner and the centre. learned_on: pixels (n, 3, H, W)."""
    parts = learned_on.split(PATCH_BATCH)
    if len(parts) > 1 and len(parts[-1]) < PATCH_BATCH:
        parts = parts[:-1]
    patches = [
        universal_patch(target, parts, share, place, steps, keep_prediction=keep_prediction, seed=seed, on_step=on_step)
        for place in get_args(Place)
    ]
    images = torch.cat(parts[:8])
    with torch.no_grad():
        spent = [float(target.deployed(patch.on(images)).macs_fraction.mean()) for patch in patches]
    return patches[max(range(len(patches)), key=lambda place: spent[place])]
