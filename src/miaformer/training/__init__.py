"""Training: a static ViT goes in, an adaptive one that knows its budgets comes out."""

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
