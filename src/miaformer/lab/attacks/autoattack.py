"""AutoAttack (Croce and Hein, ICML 2020), by its authors' code as packaged in `pyautoattack`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from miaformer.lab.attacks.gradient import Ball

Part = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
STANDARD: tuple[Part, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH_SIZE = 250


def auto_attack(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    num_classes: int,
    parts: Sequence[Part] = STANDARD,
    seed: int = 0,
) -> Tensor:
    """Images (B, 3, H, W) that fool `logits` where one of the parts found such, else as they were.

    images: pixels from 0 to 1. labels: (B,). logits: differentiable. Parts come one after the other, each for the
    images that withstood those before. The standard version with all parts named; fewer classes than ten have fewer
    targets, and of three or fewer there is no DLR loss, of `apgd-t`: it is left out.
    """
    from pyautoattack import AutoAttack

    parts = possible_parts(parts, num_classes)
    norm = cast(Literal["Linf", "L2"], {"linf": "Linf", "l2": "L2"}[ball.norm])
    quiet = logging.getLogger("auto-attack")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        attack: Any = AutoAttack(
            cast(Any, logits), norm=norm, eps=ball.eps, seed=seed, version="custom", attacks=list(parts),
            device=images.device,
        )  # fmt: skip
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as its version `standard` has them
        targets = min(9, num_classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        with torch.random.fork_rng(devices=[]):  # its parts seed the global generator
            found, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH_SIZE)
    finally:
        quiet.setLevel(level)
    return cast(Tensor, found).detach()


def possible_parts(parts: Sequence[Part], num_classes: int) -> list[Part]:
    """Those of the parts that a classifier of so many classes allows.

    Raises ValueError where none is left.
    """
    left = [part for part in parts if num_classes > 3 or part != "apgd-t"]
    if not left:
        raise ValueError(f"{', '.join(parts)}: the DLR loss needs four classes or more, not {num_classes}")
    return left
