"""Attacks that climb a gradient: FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018), in L-inf and L2.

One loop serves all: what is climbed is a function of pixels, so that the same steps raise a classifier's loss, or what
an image costs (`miaformer.lab.attacks.compute`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.lab.attacks.target import Classifier

Norm = Literal["linf", "l2"]
Height = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(pixels (B, 3, H, W), which images they are (B,)) -> what to climb (B,), and whether it is high enough (B,)."""


@dataclass(frozen=True)
class Ball:
    """All images within `eps` of one, in pixels from 0 to 1."""

    eps: float
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm={self.norm!r} must be 'linf' or 'l2'")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps={self.eps!r} must be positive, in pixels from 0 to 1: 4/255, say")

    def __str__(self) -> str:
        return shown_radius(self.eps, self.norm)

    def project(self, images: Tensor, centre: Tensor) -> Tensor:
        """The nearest images within it (L2: nearly, for pixels are cut to 0 and 1 last). (B, 3, H, W) each."""
        change = images - centre
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / _length(change).clamp(min=1e-12)).clamp(max=1)
        return (centre + change).clamp(0, 1)

    def start(self, centre: Tensor, generator: torch.Generator) -> Tensor:
        """Random images within it."""
        if self.norm == "linf":
            drawn = torch.rand(centre.shape, generator=generator).to(centre) * 2 - 1
            return self.project(centre + self.eps * drawn, centre)
        drawn = torch.randn(centre.shape, generator=generator).to(centre)
        radius = torch.rand(len(centre), 1, 1, 1, generator=generator).to(centre)
        return self.project(centre + self.eps * radius * drawn / _length(drawn), centre)

    def ascend(self, images: Tensor, gradient: Tensor, size: float) -> Tensor:
        """A step of this size up."""
        if self.norm == "linf":
            return images + size * gradient.sign()
        return images + size * gradient / _length(gradient).clamp(min=1e-12)


def shown_radius(eps: float, norm: str) -> str:
    return f"{eps * 255:.3g}/255" if norm == "linf" else f"{eps:.3g} (L2)"


def _length(images: Tensor) -> Tensor:
    """L2 norms (B, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Climb:
    """How to climb.

    step: a fraction of eps; None: 2.5 / steps, so that the border is in reach.
    """

    steps: int = 50
    restarts: int = 1
    step: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


FGSM = Climb(steps=1, step=1.0, random_start=False)


def climb(height: Height, images: Tensor, ball: Ball, how: Climb, seed: int = 0) -> Tensor:
    """The highest images (B, 3, H, W) found within the ball around each; who is high enough stops.

    height is also asked of the images as they are, so nothing gets lower than that.
    """
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.arange(len(images), device=images.device)
    best = images.clone()
    best_height, done, _ = _height(height, images, everyone, False)
    step = ball.eps * (2.5 / how.steps if how.step is None else how.step)
    for _ in range(how.restarts):
        left = everyone[~done]
        if not len(left):
            break
        centre = images[left]
        x = ball.start(centre, generator) if how.random_start else centre.clone()
        for taken in range(how.steps + 1):  # the last one only looks
            value, high, gradient = _height(height, x, left, taken < how.steps)
            better = (value > best_height[left]) | high
            best[left[better]], best_height[left[better]] = x[better], value[better]
            done[left[high]] = True
            if gradient is None:
                break
            on = ~high
            left, centre, x, gradient = left[on], centre[on], x[on], gradient[on]
            if not len(left):
                break
            x = ball.project(ball.ascend(x, gradient, step), centre)
    return best


def _height(
    height: Height, pixels: Tensor, which: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Heights (B,), who is high enough (B,), and the gradient."""
    x = pixels.detach().requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        value, high = height(x, which)
    gradient = torch.autograd.grad(value.sum(), x)[0] if wants_gradient else None
    return value.detach().clone(), high.clone(), gradient


def cross_entropy(classifier: Classifier, labels: Tensor, stops: bool = True) -> Height:
    """Climbs the loss of the right labels (B,); misclassified is high enough, unless there is always more to gain, as
    where answers are drawn: then not `stops`.
    """

    def height(pixels: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        logits = classifier(pixels).logits.float()
        wrong = (logits.argmax(dim=1) != labels[which]) & stops
        return F.cross_entropy(logits, labels[which], reduction="none"), wrong

    return height


def margin(classifier: Classifier, labels: Tensor, stops: bool = True) -> Height:
    """Climbs by how much the best wrong logit leads (Carlini and Wagner 2017): no softmax to saturate."""

    def height(pixels: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        lead = wrong_lead(classifier(pixels).logits, labels[which])
        return lead, (lead > 0) & stops

    return height


def wrong_lead(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the best wrong logit leads (B,). logits: (B, classes); labels: (B,)."""
    logits = logits.float()
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], float("-inf")).amax(dim=1) - right
