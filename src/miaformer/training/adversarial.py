"""Adversarial training in the same loop: every stage learns on images moved to where its own loss is higher.

Madry et al. 2018; with one step from a random start, of 1.25 radii, it is fast (Wong et al., ICLR 2020), and costs one
more pass forward and back a step. What is climbed is the stage's objective under the step's own draws: so weights learn
to withstand attacks on the very sub-networks that images take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miaformer.training.recipes import Recipe

ONE_STEP = 1.25  # of eps, where there is one step
STEP = 2.5  # of eps, over the number of steps, where there are several


@dataclass(frozen=True)
class Adversary:
    """Moves normalised images within eps (pixels from 0 to 1, L-inf). mean, std: (3, 1, 1), of the normalisation."""

    eps: float
    steps: int
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(recipe: Recipe, data_config: dict[str, Any], device: torch.device) -> Adversary | None:
        """None where the recipe has none. data_config: of the model, with mean and std."""
        if not recipe.adversarial_eps:
            return None
        mean, std = (torch.tensor(data_config[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
        return Adversary(recipe.adversarial_eps, recipe.adversarial_steps, mean, std)

    def moved(self, images: Tensor, loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """images, start: (B, 3, H, W), start uniform in 0 to 1; loss: images -> ()."""
        radius = self.eps / self.std
        low, high = (0 - self.mean) / self.std, (1 - self.mean) / self.std

        def within(moved: Tensor) -> Tensor:
            moved = images + (moved - images).clamp(-radius, radius)
            return moved.maximum(low.minimum(images)).minimum(high.maximum(images))  # who is out of range stays there

        moved = within(images + (2 * start - 1) * radius)
        size = ONE_STEP if self.steps == 1 else STEP / self.steps
        for _ in range(self.steps):
            x = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x), x)
            moved = within(x.detach() + size * radius * gradient.sign())
        return moved.detach()
