"""Attacks on accuracy and on compute, and what of both holds: `miaformer attack`.

`target`: what is attacked, as deployed and as differentiated. `through`: gradients that see through decisions.
`gradient`: FGSM and PGD; `autoattack`: AutoAttack by its library; `compute`: inputs made to burn compute, by image and
by patch. `methods`: all of these by name. `evaluate`: accuracy and MACs under them, and the worst. `masking`: whether
gradients can be trusted. `run`: all of it, `attack(model, data)`.
"""

from miaformer.lab.attacks.autoattack import auto_attack
from miaformer.lab.attacks.compute import Patch, raise_macs, universal_patch
from miaformer.lab.attacks.evaluate import RobustnessEvaluation, Verdict, frozen, judge, seeded, weights_hash
from miaformer.lab.attacks.gradient import FGSM, Ball, Climb, climb, cross_entropy, margin
from miaformer.lab.attacks.masking import signs_of_masking
from miaformer.lab.attacks.methods import ATTACKS
from miaformer.lab.attacks.run import DEFAULT_ATTACKS, TARGETS, attack, check_attacks, needs_held_out
from miaformer.lab.attacks.target import Answer, Pixels, Target, adaptive_target, static_target, steadied
from miaformer.lab.attacks.through import Through

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "FGSM",
    "TARGETS",
    "Answer",
    "Ball",
    "Climb",
    "Patch",
    "Pixels",
    "RobustnessEvaluation",
    "Target",
    "Through",
    "Verdict",
    "adaptive_target",
    "attack",
    "auto_attack",
    "check_attacks",
    "climb",
    "cross_entropy",
    "frozen",
    "judge",
    "margin",
    "needs_held_out",
    "raise_macs",
    "seeded",
    "signs_of_masking",
    "static_target",
    "steadied",
    "universal_patch",
    "weights_hash",
]
