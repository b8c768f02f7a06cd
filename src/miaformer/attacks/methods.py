"""Which attacks there are, by name, each as a function from images to images that fool a target.

All targets get the same tries: what an adaptive model faces on its gradient through decisions, a static one faces on
its own gradient with the same losses and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miaformer.attacks.autoattack import RANDOMISED, STANDARD, auto_attack
from miaformer.attacks.compute import raise_macs
from miaformer.attacks.gradient import FGSM, Ball, Climb, climb, cross_entropy, margin
from miaformer.attacks.target import Target

DRAWS = 10  # gradients of a target that draws are means over so many, where the attack knows


@dataclass(frozen=True)
class Given:
    """What an attack may use beside its target.

    static: the backbone under the target, to transfer from. spender: the target that attacks on compute differentiate
    where the one at hand has decisions that no gradient passes.
    """

    static: Target
    spender: Target | None
    ball: Ball
    climb: Climb
    num_classes: int
    seed: int


Run = Callable[[Target, Tensor, Tensor, Given], Tensor]  # target, pixels (B, 3, H, W), labels (B,) -> pixels


@dataclass(frozen=True)
class Attack:
    """One attack. on_compute: it raises MACs, not errors. of_static: whether a static target can be its aim."""

    about: str
    run: Run
    on_compute: bool = False
    of_static: bool = True


def _fgsm(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    return climb(cross_entropy(target.views["fixed"], labels), images, given.ball, FGSM, given.seed)


def _pgd(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    return climb(cross_entropy(target.views["fixed"], labels), images, given.ball, given.climb, given.seed)


def _adaptive(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    """Both losses, one after the other; through the decisions where there are any."""
    view = target.views[target.sharpest]
    how = replace(given.climb, draws=DRAWS) if target.is_random else given.climb
    found = climb(cross_entropy(view, labels), images, given.ball, how, given.seed + 1)
    left = _still_right(target, found, labels)
    if bool(left.any()):
        found[left] = climb(margin(view, labels[left]), images[left], given.ball, how, given.seed + 2)
    return found


def _transfer(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    """Made on the backbone without stopping at its first mistake: it is another model that is to be fooled."""
    loss = cross_entropy(given.static.views["fixed"], labels)

    def never_high(pixels: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, high = loss(pixels, which)
        return value, torch.zeros_like(high)

    return climb(never_high, images, given.ball, given.climb, given.seed)


def _auto(parts: tuple[str, ...] | None = None) -> Run:
    def run(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
        view = target.views[target.sharpest]
        chosen = parts or (RANDOMISED if target.is_random else STANDARD)
        return auto_attack(
            lambda x: view(x).logits, images, labels, given.ball, given.num_classes, chosen,  # type: ignore[arg-type]
            target.is_random, given.seed,
        )  # fmt: skip

    return run


def _macs(keep_prediction: bool) -> Run:
    def run(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
        aim = target if "through" in target.views else given.spender
        assert aim is not None
        return raise_macs(aim, images, given.ball, given.climb, keep_prediction, given.seed)

    return run


ATTACKS: Mapping[str, Attack] = {
    "fgsm": Attack("one step along the sign of the gradient", _fgsm),
    "pgd": Attack("projected gradient steps, decisions taken as given", _pgd),
    "adaptive": Attack("the same through the decisions, on cross-entropy and on the margin", _adaptive),
    "transfer": Attack("made on the static backbone", _transfer, of_static=False),
    "apgd-ce": Attack("AutoAttack's first part alone", _auto(("apgd-ce",))),
    "square": Attack("AutoAttack's last part alone, which needs no gradient", _auto(("square",))),
    "autoattack": Attack("standard AutoAttack; of targets that draw its version `rand`", _auto()),
    "macs": Attack("gradient steps that raise what an image costs", _macs(False), on_compute=True, of_static=False),
    "macs-kept": Attack("the same, the prediction kept", _macs(True), on_compute=True, of_static=False),
}


def _still_right(target: Target, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return target.deployed(images).logits.argmax(dim=1) == labels
