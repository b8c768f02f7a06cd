"""Which attacks there are, by name, each as a function from images to images that fool a target.

All targets get the same tries: what an adaptive model faces on its gradient through decisions, a static one faces on
its own gradient with the same losses and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miaformer.lab.attacks.autoattack import STANDARD, Part, auto_attack
from miaformer.lab.attacks.compute import raise_macs
from miaformer.lab.attacks.gradient import FGSM, Ball, Climb, climb, cross_entropy, margin, wrong_lead
from miaformer.lab.attacks.target import Target

DRAWS = 10  # a target that draws is attacked by the mean over so many (`steadied`)


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

    run: Run
    on_compute: bool = False
    of_static: bool = True


def _fgsm(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    return _pgd(target, images, labels, replace(given, climb=FGSM))


def _pgd(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    loss = cross_entropy(target.views["fixed"], labels, not target.is_random)
    return climb(loss, images, given.ball, given.climb, given.seed)


def _adaptive(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    """Through the decisions where there are any: both losses, then the margin with decisions as given. Each for the
    images that withstood those before; of a target that draws each for all.
    """
    found, lead = images.clone(), torch.full((len(images),), float("-inf"), device=images.device)
    tries = [(cross_entropy, target.sharpest), (margin, target.sharpest)]
    if target.sharpest != "fixed":
        tries.append((margin, "fixed"))
    for place, (loss, view) in enumerate(tries):
        left = (lead <= 0) | target.is_random
        if not bool(left.any()):
            break
        height = loss(target.views[view], labels[left], not target.is_random)
        tried = climb(height, images[left], given.ball, given.climb, given.seed + place + 1)
        with torch.no_grad():
            own = wrong_lead(target.deployed(tried).logits, labels[left])
        better = own > lead[left]
        which = left.nonzero().squeeze(1)[better]
        found[which], lead[which] = tried[better], own[better].to(lead)
    return found


def _transfer(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
    """Made on the backbone without stopping at its first mistake: it is another model that is to be fooled."""
    loss = cross_entropy(given.static.views["fixed"], labels, stops=False)
    return climb(loss, images, given.ball, given.climb, given.seed)


def _auto(parts: tuple[Part, ...] = STANDARD) -> Run:
    def run(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
        view = target.views[target.sharpest]
        return auto_attack(lambda x: view(x).logits, images, labels, given.ball, given.num_classes, parts, given.seed)

    return run


def _macs(keep_prediction: bool) -> Run:
    def run(target: Target, images: Tensor, labels: Tensor, given: Given) -> Tensor:
        aim = target if "through" in target.views else given.spender
        assert aim is not None
        return raise_macs(aim, images, given.ball, given.climb, keep_prediction, given.seed)

    return run


ATTACKS: Mapping[str, Attack] = {
    "fgsm": Attack(_fgsm),
    "pgd": Attack(_pgd),
    "adaptive": Attack(_adaptive),
    "transfer": Attack(_transfer, of_static=False),
    "apgd-ce": Attack(_auto(("apgd-ce",))),
    "square": Attack(_auto(("square",))),
    "autoattack": Attack(_auto()),
    "macs": Attack(_macs(False), on_compute=True, of_static=False),
    "macs-kept": Attack(_macs(True), on_compute=True, of_static=False),
}
