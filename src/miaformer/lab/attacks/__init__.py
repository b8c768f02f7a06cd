"""Attacks on accuracy and on compute, and what of both holds: `miaformer attack`.

`target`: what is attacked, as deployed and as differentiated. `through`: gradients that see through decisions.
`gradient`: FGSM and PGD; `autoattack`: AutoAttack by its library; `compute`: inputs made to burn compute, by image and
by patch. `methods`: all of these by name. `evaluate`: accuracy and MACs under them, and the worst. `masking`: whether
gradients can be trusted. `run`: all of it, `attack(model, data)`.
"""

from miaformer.lab.attacks.gradient import Ball, Climb
from miaformer.lab.attacks.run import attack, check_attacks, needs_held_out

__all__ = ["Ball", "Climb", "attack", "check_attacks", "needs_held_out"]
