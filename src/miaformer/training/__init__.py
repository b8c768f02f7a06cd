"""Training: a static ViT goes in, an adaptive one that knows its budgets comes out.

In reading order: `recipes` (what is trained, for how long), `run` (a whole run), `trainer` (the loop of a stage),
`objective` and `stages` (its loss), `policies` (the budgets that are drawn, and decisions that gradients reach or that
are drawn), `tariff` (for each budget, lambda, the weight of compute in the loss, and the log-price that controllers
see; `price_scale` makes of both the `price` of users, which `evaluation.calibration` tabulates by budget). Around the
loop: `preparation`, `probe` (the first fit of a new classifier), `choices` (what fits data and machine), `optimizer`
and `muon`, `adversarial`, `checkpoint`, `run_directory`, `progress`, `interrupts`.
"""

from __future__ import annotations

from miaformer.training.interrupts import Interrupted
from miaformer.training.preparation import new_backbone
from miaformer.training.recipes import RECIPES, Recipe, Stage, get_recipe
from miaformer.training.run import train, train_recipe
from miaformer.training.run_directory import is_trained, trained_model

__all__ = [
    "RECIPES",
    "Interrupted",
    "Recipe",
    "Stage",
    "get_recipe",
    "is_trained",
    "new_backbone",
    "train",
    "train_recipe",
    "trained_model",
]
