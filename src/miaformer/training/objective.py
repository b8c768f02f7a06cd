"""One objective throughout: task loss, and the cost of what was executed at the price that the budget implies.

Every stage is a way of choosing decisions for it. Each image stands for itself: the loss is a mean over images, so
that it is the same however a batch is spread over processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from miaformer.cost import Cost
from miaformer.engine.masked import Masked
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import Execution, Policy, Steps
from miaformer.model import MIAFormer
from miaformer.policy import ClsAttention, Fixed
from miaformer.rivals.merging import merged_logits, merged_macs, merges_drawn
from miaformer.training.gates import Draws, Relaxed, Sampled, elastic_decisions
from miaformer.training.recipes import Recipe, Stage
from miaformer.training.rivals import RelaxedTopTokens, drawn_keep, random_exits


@dataclass(frozen=True)
class Step:
    """What the objective is given beside images and labels."""

    draws: Draws
    other_draws: Draws  # independent of the first, for the second sample of an image
    log_prices: Tensor  # (B,), what controllers see
    values: Tensor  # (B,), lambda: the weight of the cost, loss per dense forward
    hardness: tuple[float, float]  # mean and standard deviation of the log of the teacher's loss, so far
    temperature: float


@dataclass(frozen=True)
class Outcome:
    """What came of a step. All but `loss` are detached and (B,)."""

    loss: Tensor  # ()
    correct: Tensor  # 1 where the predicted class is the label's (with mixup: the heavier one)
    macs_fraction: Tensor
    full: Tensor  # bool
    task_loss: Tensor
    hardness: Tensor  # log of the teacher's loss (the model's own without a teacher): what difficulty means


class Objective(nn.Module):
    """The loss of one stage. A module, so that data-parallel wrappers see one forward pass a step.

    teacher: the frozen backbone, held in a list so that it is not a submodule; empty without distillation.
    """

    def __init__(self, model: MIAFormer, stage: Stage, recipe: Recipe, teacher: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.recipe = recipe
        self.teacher = [] if teacher is None else [teacher]
        ranks = [getattr(controller, "rank", 0) for controller in model.controllers]
        self.first_token_block = next((i for i, rank in enumerate(ranks) if rank), len(ranks))

    def forward(self, images: Tensor, labels: Tensor, step: Step) -> Outcome:
        """images: (B, 3, H, W); labels: (B, classes), soft."""
        outcome = self._of_stage(images, labels, step)
        if torch.distributed.is_initialized():  # processes share gradients of every parameter, of skipped ones too
            nothing = 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
            outcome = replace(outcome, loss=outcome.loss + nothing)
        return outcome

    def _of_stage(self, images: Tensor, labels: Tensor, step: Step) -> Outcome:
        cost = self.model.cost((images.shape[-2], images.shape[-1]))
        soft = self._soft_labels(images)
        if self.stage.kind in ("backbone", "merging"):
            return self._without_policy(images, labels, soft, step, cost)
        if self.stage.kind == "reinforce":
            return self._reinforce(images, labels, soft, step, cost)
        policy = self._policy(step, cost)
        logits, steps = self._execute(images, policy, cost)
        task = self._task(logits, labels, soft)
        spent = steps.macs / cost.backbone
        loss, hardness = task, _hardness(task, labels, soft)
        if isinstance(policy, Relaxed):
            loss = task + step.values * spent * ~step.draws.full + _told(policy.difficulties, hardness, step)
        return self._outcome(loss.mean(), logits, labels, spent, step.draws.full, task, hardness)

    def _policy(self, step: Step, cost: Cost) -> Policy:
        """What decides in this stage."""
        model, draws = self.model, step.draws
        match self.stage.kind:
            case "elastic":
                return Fixed(elastic_decisions(draws, cost, self.stage, self.first_token_block))
            case "exits":
                return Fixed(random_exits(draws, cost.depth, cost.num_heads, cost.num_patches))
            case "cls-attention":
                return ClsAttention(model.backbone.blocks, drawn_keep(draws))
            case "top-tokens":
                return RelaxedTopTokens(model.controllers, drawn_keep(draws), draws, step.temperature)
            case _:
                return Relaxed(model.controllers, step.log_prices, draws, step.temperature)

    def _without_policy(self, images: Tensor, labels: Tensor, soft: Tensor | None, step: Step, cost: Cost) -> Outcome:
        """The backbone as it is, or with as many tokens merged as this step draws."""
        everything = torch.ones_like(step.draws.full)
        if self.stage.kind == "backbone":
            logits, fraction = self.model.backbone(images), 1.0
        else:
            merges = merges_drawn(cost, float(step.draws.shared[0]))
            logits, fraction = merged_logits(self.model, images, merges), merged_macs(cost, merges) / cost.backbone
        task = self._task(logits, labels, soft)
        spent = torch.full_like(task, fraction)
        return self._outcome(task.mean(), logits, labels, spent, everything, task, task)

    def _reinforce(self, images: Tensor, labels: Tensor, soft: Tensor | None, step: Step, cost: Cost) -> Outcome:
        """Two samples an image, each the other's baseline (leave one out); weights learn on both.

        The task term of the controllers' gradient is estimated by sampling; the cost term is differentiated in closed
        form. Williams 1992; Kool et al. 2019 for the baseline.
        """
        progressive = self.model.adapt_config.token_scope == "progressive"
        x = self.model.embed(images)
        execution = self._execution(cost, images)
        samples = []
        for draws in (step.draws, step.other_draws):
            policy = Sampled(self.model.controllers, step.log_prices, draws, step.temperature, cost, progressive)
            features, steps = self.model.walk(x, policy, execution, cost)
            logits = self.model.backbone.forward_head(self.model.backbone.norm(features))
            samples.append((policy, steps, logits, self._task(logits, labels, soft)))
        (one, steps, logits, task), (other, steps_2, _, task_2) = samples
        advantage = (task - task_2).detach()  # of the second sample's gain; the first one's is its negative
        estimator = 0.5 * advantage * (one.log_prob - other.log_prob)
        expected = 0.5 * (one.expected_macs + other.expected_macs) / cost.backbone
        hardness = _hardness(task, labels, soft)
        told = 0.5 * _told([*one.difficulties, *other.difficulties], hardness, step)
        loss = 0.5 * (task + task_2) + estimator + step.values * expected + told
        spent = 0.5 * (steps.macs + steps_2.macs) / cost.backbone
        return self._outcome(loss.mean(), logits, labels, spent, step.draws.full, task, hardness)

    def _execute(self, images: Tensor, policy: Policy, cost: Cost) -> tuple[Tensor, Steps]:
        relaxed = isinstance(policy, Relaxed | RelaxedTopTokens)
        execution = Masked(cost) if relaxed else self._execution(cost, images)
        x, steps = self.model.walk(self.model.embed(images), policy, execution, cost)
        return self.model.backbone.forward_head(self.model.backbone.norm(x)), steps

    def _execution(self, cost: Cost, images: Tensor) -> Execution:
        """What carries out real decisions: training does not pay for what it skips either.

        On a CPU, at half of the MACs, a step takes 0.6 of the masked one's time (docs/log.md); on CUDA nobody has
        measured it. Where blocks drop activations at random only masked execution does.
        """
        return Sparse(cost) if images.device.type == "cpu" and not _drops(self.model.backbone) else Masked(cost)

    def _soft_labels(self, images: Tensor) -> Tensor | None:
        if not self.teacher or not self.recipe.distill_weight:
            return None
        with torch.no_grad():
            return F.softmax(self.teacher[0](images).float() / self.recipe.distill_temperature, dim=1)

    def _task(self, logits: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
        """Cross-entropy (B,) with the labels and, by `distill_weight`, with the teacher's soft labels."""
        logits = logits.float()
        hard = F.cross_entropy(logits, labels, reduction="none")
        if soft is None:
            return hard
        scale = self.recipe.distill_temperature
        distilled = F.cross_entropy(logits / scale, soft, reduction="none") * scale**2
        return hard + self.recipe.distill_weight * (distilled - hard)

    @staticmethod
    def _outcome(
        loss: Tensor, logits: Tensor, labels: Tensor, spent: Tensor, full: Tensor, task: Tensor, hardness: Tensor
    ) -> Outcome:
        correct = (logits.argmax(dim=1) == labels.argmax(dim=1)).float()
        return Outcome(loss, correct, spent.detach().float(), full, task.detach(), hardness.detach())


def _drops(backbone: nn.Module) -> bool:
    """Whether some part of the blocks is left out at random in training."""
    blocks: nn.Module = backbone.blocks  # type: ignore[assignment]
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or (isinstance(part, DropPath) and bool(part.drop_prob))
        for part in blocks.modules()
    )


def _hardness(task: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
    """Log of the teacher's loss on each image (B,); of the model's own where there is no teacher."""
    loss = task.detach() if soft is None else -(labels * soft.clamp(min=1e-7).log()).sum(dim=1)
    return loss.clamp(min=1e-4).log()


def _told(difficulties: list[Tensor], hardness: Tensor, step: Step) -> Tensor:
    """How far off (B,) the controllers' predictions of difficulty are, squared, summed over blocks."""
    mean, std = step.hardness
    target = ((hardness - mean) / max(std, 1e-3)).clamp(-3, 3)
    errors = [(predicted - target).square() for predicted in difficulties]
    return 0.1 * torch.stack(errors).sum(dim=0)
