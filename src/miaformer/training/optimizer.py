"""The optimiser of a stage: which parameters learn, at what rate, with what decay, and by which rule."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

from miaformer.model.model import MIAFormer
from miaformer.training.muon import MuonAdamW
from miaformer.training.recipes import Recipe, Stage


def stage_optimizer(model: MIAFormer, stage: Stage, recipe: Recipe, trains_controllers: bool) -> torch.optim.Optimizer:
    """`muon` is ours, any other name timm's."""
    groups = _parameter_groups(model, stage, recipe, trains_controllers)
    if recipe.optimizer == "muon":
        inside = {id(p) for p in model.backbone.blocks.parameters() if p.ndim == 2}
        controllers = {id(p) for p in model.controllers.parameters()}
        for group in groups:
            if id(group["params"][0]) in controllers:
                group["betas"] = (0.9, 0.999)  # their gradients are noisier than the backbone's
        return MuonAdamW(_split(groups, inside), lr=stage.lr)
    # One kernel for all parameters instead of several for each: a tenth of a small model's step.
    fused: dict[str, Any] = {"fused": True} if recipe.optimizer in ("adam", "adamw") else {}
    return create_optimizer_v2(groups, opt=recipe.optimizer, lr=stage.lr, **fused)


def _parameter_groups(model: MIAFormer, stage: Stage, recipe: Recipe, trains_controllers: bool) -> list[dict[str, Any]]:
    groups = []
    for part, lr in ((model.backbone, stage.lr), (model.controllers, stage.controller_lr)):
        if part is model.controllers and not trains_controllers:
            continue
        if part is model.controllers:
            found = param_groups_weight_decay(part, recipe.weight_decay)
        elif stage.layer_decay == 1:
            found = param_groups_weight_decay(part, recipe.weight_decay, model.backbone.no_weight_decay())
        else:  # groups with a `lr_scale`, which timm's schedulers apply
            found = param_groups_layer_decay(
                part, recipe.weight_decay, model.backbone.no_weight_decay(), layer_decay=stage.layer_decay
            )
        groups += [{**group, "lr": lr} for group in found]
    return groups


def _split(groups: list[dict[str, Any]], matrices: set[int]) -> list[dict[str, Any]]:
    """The same groups, each in two: parameters whose id is among `matrices`, and the others."""
    halves = []
    for group in groups:
        for wanted in (True, False):
            chosen = [p for p in group["params"] if (id(p) in matrices) is wanted]
            if chosen:
                halves.append({**group, "params": chosen, "matrices": wanted})
    return halves
