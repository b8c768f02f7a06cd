"""One objective throughout: task loss, and the cost of what was executed at the price that the budget implies.

The task is what `Targets` say: labels, or what a teacher gives, for data without them.

Every kind of stage is a way of choosing decisions for it: ours are in `stages`. Each image stands for itself: the loss
is a mean over images, so that it is the same however a batch is spread over processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.masked import Masked
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import Execution, Policy
from miaformer.model.model import MIAFormer
from miaformer.training.policies import Draws
from miaformer.training.recipes import Recipe, Stage


@dataclass(frozen=True)
class Step:
    """What the objective is given beside images and labels."""

    draws: Draws
    other_draws: Draws  # independent of the first, for the second sample of an image
    log_prices: Tensor  # (B,), what controllers see
    values: Tensor  # (B,), lambda: the weight of the cost, loss per dense forward
    difficulty: tuple[float, float]  # mean and standard deviation over the images so far
    temperature: float
    clean: Tensor | None = None  # images as they were, where an adversary has moved them: what the teacher sees


class Targets(ABC):
    """What a model should give for the images of a step: the answers that their labels say, or a teacher's features."""

    @abstractmethod
    def loss(self, given: Tensor) -> Tensor:
        """(B,), of what `Objective.answer` gives."""

    @abstractmethod
    def score(self, given: Tensor) -> Tensor:
        """How good (B,) it is, from 0 to 1."""

    @abstractmethod
    def difficulty(self, task: Tensor) -> Tensor:
        """How hard the images are (B,), on a log scale, detached. task: their loss."""


@dataclass(frozen=True)
class Answers(Targets):
    """Classes.

    labels: (B, classes), soft. taught: (B, classes), the teacher's probabilities; None without one.
    """

    labels: Tensor
    taught: Tensor | None
    weight: float  # of the teacher

    def loss(self, given: Tensor) -> Tensor:
        """Cross-entropy of logits (B, classes) with the labels and, by `weight`, with what the teacher says."""
        logits = given.float()
        hard = F.cross_entropy(logits, self.labels, reduction="none")
        if self.taught is None:
            return hard
        distilled = F.cross_entropy(logits, self.taught, reduction="none")
        return hard + self.weight * (distilled - hard)

    def score(self, given: Tensor) -> Tensor:
        """1 where the likeliest class is the label's; with mixup, the heavier one's."""
        return (given.argmax(dim=1) == self.labels.argmax(dim=1)).float()

    def difficulty(self, task: Tensor) -> Tensor:
        """Log of the teacher's loss; without a teacher of the model's own, of `task`."""
        taught = self.taught
        loss = task.detach() if taught is None else -(self.labels * taught.clamp(min=1e-7).log()).sum(dim=1)
        return loss.clamp(min=1e-4).log()


@dataclass(frozen=True)
class Features(Targets):
    """Features of a teacher, each by its direction: what retrieval by angles, and a classifier, read.

    taught: (B, features), or those of tokens (B, P+N, C). prefix: P, where they are of tokens.
    """

    taught: Tensor
    prefix: int = 0

    def loss(self, given: Tensor) -> Tensor:
        """1 - cosine similarity; of tokens, the mean over prefix and patch tokens, which weigh the same together."""
        error = 1 - F.cosine_similarity(given.float(), self.taught, dim=-1)
        if error.ndim == 1:
            return error
        parts = [part.mean(dim=1) for part in (error[:, : self.prefix], error[:, self.prefix :]) if part.shape[1]]
        return torch.stack(parts).mean(dim=0)

    def score(self, given: Tensor) -> Tensor:
        return (1 - self.loss(given.detach())).clamp(0, 1)

    def difficulty(self, task: Tensor) -> Tensor:
        return task.detach().clamp(min=1e-4).log()


@dataclass(frozen=True)
class Outcome:
    """What came of a step. All but `loss` are detached and (B,)."""

    loss: Tensor  # ()
    score: Tensor  # as `Targets.score` has it
    macs_fraction: Tensor
    full: Tensor  # bool
    task_loss: Tensor
    difficulty: Tensor

    @staticmethod
    def of(loss: Tensor, task: Tensor, given: Tensor, targets: Targets, spent: Tensor, full: Tensor) -> Outcome:
        """All (B,), but given, as `Objective.answer` gives it. spent: MACs fraction."""
        spent = spent.detach().float()
        return Outcome(loss.mean(), targets.score(given), spent, full, task.detach(), targets.difficulty(task))

    @staticmethod
    def of_all_alike(task: Tensor, given: Tensor, targets: Targets, fraction: float = 1.0) -> Outcome:
        """Of images that all execute the same, for this fraction of the backbone's MACs."""
        full = torch.ones_like(task, dtype=torch.bool)
        return Outcome.of(task, task, given, targets, torch.full_like(task, fraction), full)


class Objective(nn.Module, ABC):
    """The loss of one stage; a kind of stage is a subclass. A module, so that data-parallel wrappers see one forward
    pass a step.

    teacher: the frozen backbone, held in a list so that it is not a submodule; empty where nothing is learned from it.
    """

    dense: ClassVar = False  # the static model itself learns: images may be mixed, and only a given teacher teaches it
    adapts: ClassVar = False  # it makes a backbone ours
    decides: ClassVar = False  # controllers decide, at the price of each image's budget
    samples_twice: ClassVar = False  # each image takes two sub-networks a step
    values_compute: ClassVar = False  # its gradient by the log-price says what compute is worth

    @staticmethod
    def deciders(model: MIAFormer) -> Sequence[nn.Module]:
        """The parts of the model that learn in this stage beside its backbone: controllers, or what a baseline has."""
        return ()

    def __init__(self, model: MIAFormer, stage: Stage, recipe: Recipe, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.recipe = recipe
        self.teacher = [] if teacher is None else [teacher]

    def forward(self, images: Tensor, labels: Tensor, step: Step) -> Outcome:
        """images: (B, 3, H, W); labels: (B, classes), soft; not read where the recipe's target is another."""
        cost = self.model.cost((images.shape[-2], images.shape[-1]))
        if self.recipe.target == "tokens":  # all are read
            cost = replace(cost, trims_last_block=False)
        outcome = self.outcome(images, self._targets(images if step.clean is None else step.clean, labels), step, cost)
        if torch.distributed.is_initialized():  # processes share gradients of every parameter, of skipped ones too
            nothing = 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
            outcome = replace(outcome, loss=outcome.loss + nothing)
        return outcome

    @abstractmethod
    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        """images: (B, 3, H, W); cost: of images of this size."""

    @torch.no_grad()
    def _targets(self, images: Tensor, labels: Tensor) -> Targets:
        """images: as they were, where an adversary moves those that the model sees. labels: (B, classes), soft."""
        recipe, teacher = self.recipe, self.teacher[0] if self.teacher else None
        if recipe.labelled:
            taught = teacher(images) if teacher is not None and recipe.distill_weight else None
            soft = None if taught is None else F.softmax(taught.float(), dim=1)
            return Answers(labels, soft, recipe.distill_weight)
        if teacher is None:
            raise ValueError(f"a recipe with target={recipe.target!r} needs a teacher")
        if recipe.target == "tokens":
            tokens: Tensor = teacher.forward_features(images)  # type: ignore[operator]
            return Features(tokens.float(), self.model.num_prefix_tokens)
        given = teacher(images).float()
        return Answers(F.softmax(given, dim=1), None, 0.0) if self.model.num_classes else Features(given)

    def answer(self, x: Tensor) -> Tensor:
        """What the recipe's target is about, of what comes out of a block, (B, P+N, C): logits (B, classes); without a
        classifier features (B, features); or all tokens, (B, P+N, C), after the final norm.
        """
        x = self.model.backbone.norm(x)
        return x if self.recipe.target == "tokens" else self.model.backbone.forward_head(x)

    def answers(self, after: list[Tensor], targets: Targets, cost: Cost) -> tuple[Tensor, Tensor]:
        """Answers (E, B, ...) and task losses (B, E) of what comes out of E blocks, (B, P+N, C) each."""
        if cost.trims_last_block:  # nothing else is read
            after = [one[:, : cost.num_prefix_tokens] for one in after]
        answers = self.answer(torch.cat(after)).unflatten(0, (len(after), -1))
        return answers, torch.stack([targets.loss(one) for one in answers], dim=1)

    def execution(self, cost: Cost, images: Tensor) -> Execution:
        """What carries out real decisions: training does not pay for what it skips either.

        On a CPU, at half of the MACs, a step takes 0.6 of the masked one's time (docs/log.md); on CUDA nobody has
        measured it. Where blocks drop activations at random only masked execution does.
        """
        return Sparse(cost) if images.device.type == "cpu" and not _drops(self.model.backbone) else Masked(cost)


class UnderPolicy(Objective):
    """Weights learn under decisions that do not learn from what they cost."""

    @abstractmethod
    def policy(self, step: Step, cost: Cost) -> Policy: ...

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        policy, execution = self.policy(step, cost), self.execution(cost, images)
        features, steps = self.model.walk(self.model.embed(images), policy, execution, cost)
        given = self.answer(features)
        task = targets.loss(given)
        return Outcome.of(task, task, given, targets, steps.macs / cost.backbone, step.draws.full)


def score_name(recipe: Recipe, model: MIAFormer) -> str:
    """What `Targets.score` is: accuracy, agreement with the teacher's answers, or similarity to its features."""
    if recipe.labelled:
        return "accuracy"
    return "agreement" if model.num_classes and recipe.target == "features" else "similarity"


def _drops(backbone: nn.Module) -> bool:
    """Whether some part of the blocks is left out at random in training."""
    blocks: nn.Module = backbone.blocks  # type: ignore[assignment]
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or (isinstance(part, DropPath) and bool(part.drop_prob))
        for part in blocks.modules()
    )
