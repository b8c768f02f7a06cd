"""What a method of a comparison is: how it is trained from the shared backbone, and how it is asked for a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.lab.comparison.engines import Call, of_module
from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy, Full
from miaformer.training.recipes import CIFAR10_SMALL, Recipe, Stage
from miaformer.training.stages import OBJECTIVES
from miaformer.vit.backbone import Backbone

Classify = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (B, 3, H, W) -> logits (B, classes), MACs fraction (B,)

BASELINES_ADAPT: dict[
    str, Any
] = {  # of methods that decide tokens and exits, where the recipe's own model chooses resolutions
    "grains": ("depth", "tokens"),
    "depth_choice": "nested",
    "first_token_block": 0,
    "last_token_block": 0,
    "token_choice": "even",
}
FRACTIONS = (0.35, 0.5, 0.7)  # of the backbone's MACs: smaller static models come near to them


@dataclass(frozen=True)
class Entry:
    """A method at a budget, ready to classify. budget: None where the method knows none.

    read: makes what `classify` takes of the backbone's images; not timed, for pictures can be read that way. engine:
    what `classify` runs on. engines: others that give the same logits, to be timed beside it. sharing: gives the same
    too, for measuring: what entries of one model have in common is computed once for a batch.
    """

    name: str
    budget: float | None
    classify: Classify
    read: Callable[[Tensor], Tensor] = lambda images: images
    engine: str = "eager"
    engines: Mapping[str, Call] = field(default_factory=dict)
    sharing: Classify | None = None

    def run(self, images: Tensor) -> Tensor:
        """Logits alone."""
        return self.classify(images)[0]


@dataclass(frozen=True)
class Question:
    """What a trained method is asked: budgets (fractions of the backbone's MACs), images to meet them on, a seed."""

    budgets: Sequence[float]
    calibration: Callable[[], Iterable[LabelledBatch]]
    backbone_macs: int
    seed: int


@dataclass(frozen=True)
class Method:
    """One way to spend less.

    recipe: the stages that train it, of the comparison's recipe; None where the backbone is used as it is. entries:
    what is measured of the trained model. reshape: what is made of the backbone before anything else: a smaller one,
    say. prepare: adds to the model, before training, what the method has beside a backbone. trained_as: the method
    whose trained model it uses; None: one of its own.
    """

    name: str
    about: str
    recipe: Callable[[Recipe], Recipe] | None
    entries: Callable[[MIAFormer, Question], list[Entry]]
    reshape: Callable[[Backbone], Backbone] = lambda backbone: backbone
    prepare: Callable[[MIAFormer], None] | None = None
    trained_as: str | None = None


def adapting(recipe: Recipe) -> Recipe:
    """The same with the stages alone that make a backbone ours."""
    found = tuple(stage for stage in recipe.stages if stage.kind in OBJECTIVES and OBJECTIVES[stage.kind].adapts)
    if not found:
        raise ValueError(f"recipe {recipe.name!r} has no stage that adapts the backbone")
    return replace(recipe, stages=found)


def adaptation_epochs(recipe: Recipe) -> float:
    """Epochs of adapting; every method gets as many."""
    return sum(stage.epochs for stage in adapting(recipe).stages)


def main_stage(recipe: Recipe) -> Stage:
    """The stage of adaptation whose learning rates all methods get: the longest."""
    return max(adapting(recipe).stages, key=lambda stage: stage.epochs)


def one_stage(kind: str) -> Callable[[Recipe], Recipe]:
    """Adaptation as a single stage of this kind, with the learning rates of the recipe's main stage.

    Images are not mixed, as they are not where ours is adapted.
    """

    def recipe(base: Recipe) -> Recipe:
        stage = replace(main_stage(base), kind=kind, epochs=adaptation_epochs(base), anneal=1.0, early_weight=0.0)
        adapt = BASELINES_ADAPT if base.chooses_resolution else base.adapt
        return replace(base, stages=(stage,), adapt=adapt, mixup=0.0, cutmix=0.0)

    return recipe


def with_controllers(base: Recipe) -> Recipe:
    """The same with controllers, where the recipe's own model chooses resolutions: three stages, as long together, in
    the shares of `cifar10-small`, which they were chosen on.
    """
    if not base.chooses_resolution:
        return base
    main, epochs = main_stage(base), adaptation_epochs(base)
    theirs = adapting(CIFAR10_SMALL).stages
    whole, rate = sum(stage.epochs for stage in theirs), max(stage.lr for stage in theirs if stage.controller_lr)
    stages = tuple(
        replace(
            stage,
            epochs=stage.epochs / whole * epochs,
            lr=stage.lr / rate * main.lr,
            layer_decay=main.layer_decay,
        )
        for stage in theirs
    )
    before = tuple(stage for stage in base.stages if stage not in adapting(base).stages)
    return replace(base, stages=(*before, *stages), adapt=BASELINES_ADAPT)


def by_policy(model: MIAFormer, policy: AnyPolicy) -> Classify:
    """The logits and the MACs of what this policy decides."""

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model.run(images, policy=policy)
        return output.logits, output.trace.macs_fraction

    return classify


def as_backbone(name: str, model: MIAFormer, question: Question) -> Entry:
    """The static model on our engine, so that its last block computes what is read alone, as everybody's does.

    Its MACs are a fraction of the comparison's backbone's.
    """

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model.run(images, policy=Full())
        return output.logits, output.trace.macs / question.backbone_macs

    return Entry(name, None, classify, engines=of_module(model.backbone, image_shape(model)))


def image_shape(model: MIAFormer) -> tuple[int, int, int]:
    """(channels, H, W) of the images that the model takes."""
    return (model.backbone.in_chans, *model.image_size())
