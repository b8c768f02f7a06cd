"""Signs of gradient masking (Athalye et al. 2018; Carlini et al. 2019): where gradients mislead, so do attacks by them.

Each check asks for something that holds for every honest gradient, and says by how much it did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miaformer.lab.attacks.autoattack import auto_attack
from miaformer.lab.attacks.evaluate import judge
from miaformer.lab.attacks.gradient import Ball, Climb, climb, cross_entropy
from miaformer.lab.attacks.target import Target

LARGE_EPS = 64 / 255  # of L-inf: grey itself is near
TOLERANCE = 0.02  # of accuracy
ALONG = (0.25, 0.5, 1.0)  # of eps


@dataclass(frozen=True)
class Sign:
    """One check. value: what was measured; wanted: what it should be; passed: whether it was."""

    check: str
    value: float
    wanted: str
    passed: bool


def signs_of_masking(
    target: Target, images: Tensor, labels: Tensor, ball: Ball, how: Climb, num_classes: int, seed: int = 0
) -> list[Sign]:
    """images: pixels (B, 3, H, W); labels: (B,)."""
    view = target.views[target.sharpest]
    loss = cross_entropy(view, labels)
    by_gradient = climb(loss, images, ball, how, seed)
    left = judge(target, by_gradient, labels).right > 0.5
    standing = torch.from_numpy(left).to(images.device)
    by_square = by_gradient.clone()
    if left.any():
        by_square[standing] = auto_attack(
            lambda x: view(x).logits, images[standing], labels[standing], ball, num_classes, ("square",), seed
        )
    accuracies = [float(judge(target, x, labels).right.mean()) for x in (by_gradient, by_square)]
    large = Ball(LARGE_EPS if ball.norm == "linf" else LARGE_EPS * (images[0].numel() ** 0.5), ball.norm)
    broken = climb(loss, images, large, replace(how, restarts=1), seed)
    at_large = float(judge(target, broken, labels).right.mean())
    noise = ball.start(images, torch.Generator().manual_seed(seed))
    by_noise = float(judge(target, noise, labels).right.mean())
    vanished, rises = _along(target, images, labels, ball)
    return [
        Sign("square breaks what gradient steps did not", accuracies[0] - accuracies[1], f"at most {TOLERANCE:g}",
             accuracies[0] - accuracies[1] <= TOLERANCE),
        Sign("accuracy at a very large radius", at_large, f"at most {TOLERANCE:g}", at_large <= TOLERANCE),
        Sign("noise breaks more than gradient steps", accuracies[0] - by_noise, "at most 0", by_noise >= accuracies[0]),
        Sign("images whose loss has no gradient", vanished, f"at most {TOLERANCE:g}", vanished <= TOLERANCE),
        Sign("images whose loss rises along it", rises, "at least 0.9", rises >= 0.9),
    ]  # fmt: skip


def _along(target: Target, images: Tensor, labels: Tensor, ball: Ball) -> tuple[float, float]:
    """The share of images without a gradient, and of those whose loss is higher somewhere along it."""
    loss = cross_entropy(target.views[target.sharpest], labels)
    everyone = torch.arange(len(images), device=images.device)
    x = images.detach().requires_grad_()
    start, _ = loss(x, everyone)
    (gradient,) = torch.autograd.grad(start.sum(), x)
    size = gradient.flatten(1).norm(dim=1)
    with torch.no_grad():
        found = [
            loss(ball.project(ball.ascend(images, gradient, share * ball.eps), images), everyone)[0] for share in ALONG
        ]
    highest = torch.stack(found).amax(dim=0)
    return float((size == 0).double().mean()), float((highest > start.detach()).double().mean())
