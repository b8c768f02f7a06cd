"""What is made ready before training: the backbone, its classifier, the stages that can learn, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from miaformer.data import Augmentation, Batches, DeviceBatches, ImageData, build_transform
from miaformer.data.seeds import seed_everything
from miaformer.engine.block import check_plain
from miaformer.model.model import NOT_SAVED, MIAFormer
from miaformer.training.choices import usable_workers
from miaformer.training.objective import Objective
from miaformer.training.probe import classifiers
from miaformer.training.progress import Display
from miaformer.training.recipes import Recipe, Stage
from miaformer.vit.backbone import Backbone, check_supported, transformer_blocks
from miaformer.vit.pretrained import load_backbone
from miaformer.vit.stem import ConvPatchEmbed


def new_backbone(recipe: Recipe, classes: int | Sequence[str], seed: int) -> nn.Module:
    """The timm model that a recipe names, with the weights that it names; what these leave open is drawn by `seed`."""
    seed_everything(seed, 0, 0)
    stem: dict[str, Any] = (
        {"embed_layer": partial(ConvPatchEmbed, stem_channels=recipe.conv_stem)} if recipe.conv_stem else {}
    )
    backbone = load_backbone(
        recipe.model, recipe.weights or None, recipe.image_size, classes, **recipe.model_args, **stem
    )
    if recipe.sincos_pos_embed and not recipe.weights:
        _start_from_sincos(check_supported(backbone))
    return backbone


@torch.no_grad()
def _start_from_sincos(backbone: Backbone) -> None:
    """Learned position embeddings start from sines and cosines of both coordinates.

    From scratch on few images this is most of what a small ViT has to find out about space (Beyer et al. 2022); on
    digits it reached in 600 steps what noise had not reached in 1,200.
    """
    table = build_sincos2d_pos_embed(list(backbone.patch_embed.grid_size), backbone.embed_dim, temperature=100.0)
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    if backbone.pos_embed is not None:
        backbone.pos_embed[0, prefix:] = 0.3 * table


def check_stages(recipe: Recipe, model: MIAFormer, objectives: Mapping[str, type[Objective]]) -> None:
    """Raises ValueError for a stage of a kind that has no objective, and for one that the model is not made for."""
    known = ("probe", *objectives)
    for stage in recipe.stages:
        if stage.kind not in known:
            raise ValueError(f"stage kind {stage.kind!r} must be one of {', '.join(known)}")
    if any(stage.kind == "resolution" for stage in recipe.stages) and not model.adapt_config.chooses_resolution:
        raise ValueError(
            f"recipe {recipe.name!r} has a stage resolution: adapt the model with grains=('resolution',), or take one "
            "for controllers, 'imagenet' say"
        )


def learnable(recipe: Recipe, model: MIAFormer, objectives: Mapping[str, type[Objective]]) -> Recipe:
    """Without the stages in which nothing learns: those of the backbone, where it is frozen."""

    def is_free(*parts: nn.Module) -> bool:
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def learns(stage: Stage) -> bool:
        if stage.kind == "probe":
            return is_free(*classifiers(model.backbone))
        return is_free(model.backbone, *objectives[stage.kind].deciders(model))

    stages = tuple(filter(learns, recipe.stages))
    if recipe.stages and not stages:
        raise ValueError(
            f"recipe {recipe.name!r} has nothing to train: all its parameters are frozen. Unfreeze some, for example "
            "with model.requires_grad_(True)"
        )
    return replace(recipe, stages=stages)


def check_trainable(model: MIAFormer) -> None:
    """Raises ValueError for weights that optimisers cannot change, or would lose steps of by rounding, and for layers
    whose model could not be saved in the end.
    """
    check_plain(transformer_blocks(model.backbone), *NOT_SAVED)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode(), and cannot learn: make the model outside of it"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}: train in float32, model.float(), which keeps small steps; the recipe's "
                "`precision` says what products are computed in"
            )


def fit_classifier(model: MIAFormer, data: ImageData, seed: int, display: Display) -> None:
    """Give a model that answers other classes than the data's a new classifier, drawn by `seed`."""
    if not model.answers_other_classes(data.classes):
        return
    had = f"its own is for {model.num_classes} other classes" if model.num_classes else "it had none"
    display.say(f"The model gets a new classifier for the {len(data.classes)} classes of {data.name}; {had}")
    seed_everything(seed, 0, 0)
    model.reset_classifier(len(data.classes))


def training_batches(
    data: ImageData, data_config: dict[str, Any], recipe: Recipe, seed: int, accelerator: Accelerator
) -> Batches | DeviceBatches:
    assert recipe.batch_size is not None  # chosen by now
    augment = Augmentation(**recipe.augmentation)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    if recipe.data_on_device:
        return DeviceBatches(
            data, data_config, augment, recipe.batch_size, seed=seed, device=accelerator.device, **share
        )
    return Batches(
        data,
        build_transform(data_config, training=True, augment=augment),
        recipe.batch_size,
        seed=seed,
        shuffle=True,
        drop_last=True,
        num_workers=usable_workers(recipe),
        **share,
    )
