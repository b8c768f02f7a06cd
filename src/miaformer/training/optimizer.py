"""The optimiser of a stage: which parameters learn, at what rate, with what decay, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from miaformer.model.model import MIAFormer
from miaformer.training.muon import MuonAdamW
from miaformer.training.recipes import Recipe, Stage
from miaformer.vit.backbone import Backbone


def stage_optimizer(
    model: MIAFormer, stage: Stage, recipe: Recipe, deciders: Sequence[nn.Module]
) -> torch.optim.Optimizer:
    """deciders: what learns beside the backbone. `muon` is ours, any other name timm's."""
    muon = recipe.optimizer == "muon"
    groups = [{**group, "lr": stage.lr} for group in _backbone_groups(model.backbone, stage, recipe)]
    noisier = {"betas": (0.9, 0.999)} if muon else {}  # than the backbone's gradients
    for part in deciders:
        found = param_groups_weight_decay(part, recipe.weight_decay)
        groups += [{**group, "lr": stage.controller_lr, **noisier} for group in found]
    if muon:
        inside = {id(p) for p in model.backbone.blocks.parameters() if p.ndim == 2}
        return MuonAdamW(_split(groups, inside), lr=stage.lr)
    # One kernel for all parameters instead of several for each: a tenth of a small model's step.
    fused: dict[str, Any] = {"fused": True} if recipe.optimizer in ("adam", "adamw") else {}
    return create_optimizer_v2(groups, opt=recipe.optimizer, lr=stage.lr, **fused)


def _backbone_groups(backbone: Backbone, stage: Stage, recipe: Recipe) -> list[dict[str, Any]]:
    decay, without = recipe.weight_decay, backbone.no_weight_decay()
    if stage.layer_decay == 1:
        return param_groups_weight_decay(backbone, decay, without)
    # Groups with a `lr_scale`, which timm's schedulers apply.
    return param_groups_layer_decay(backbone, decay, without, layer_decay=stage.layer_decay)


def _split(groups: list[dict[str, Any]], matrices: set[int]) -> list[dict[str, Any]]:
    """The same groups, each in two: parameters whose id is among `matrices`, and the others."""
    halves = []
    for group in groups:
        for wanted in (True, False):
            chosen = [p for p in group["params"] if (id(p) in matrices) is wanted]
            if chosen:
                halves.append({**group, "params": chosen, "matrices": wanted})
    return halves
