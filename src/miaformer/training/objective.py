"""One objective throughout: task loss, and the cost of what was executed at the price that the budget implies.

Every stage is a way of choosing decisions for it. Each image stands for itself: the loss is a mean over images, so
that it is the same however a batch is spread over processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, HostGates
from miaformer.engine.masked import Masked
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import Execution, Policy
from miaformer.lab.baselines.merging import merged_logits, merged_macs, merges_drawn
from miaformer.model.model import MIAFormer
from miaformer.model.policy import ClsAttention, Fixed
from miaformer.model.resolution import drawn_size, resized
from miaformer.training.gates import Draws, Leaving, Relaxed, Sampled, elastic_decisions
from miaformer.training.recipes import Recipe, Stage
from miaformer.training.rivals import RelaxedTopTokens, drawn_keep
from miaformer.vit.backbone import transformer_blocks


@dataclass(frozen=True)
class Step:
    """What the objective is given beside images and labels."""

    draws: Draws
    other_draws: Draws  # independent of the first, for the second sample of an image
    log_prices: Tensor  # (B,), what controllers see
    values: Tensor  # (B,), lambda: the weight of the cost, loss per dense forward
    hardness: tuple[float, float]  # mean and standard deviation of the log of the teacher's loss, so far
    temperature: float
    clean: Tensor | None = None  # images as they were, where an adversary has moved them: what the teacher sees


@dataclass(frozen=True)
class Outcome:
    """What came of a step. All but `loss` are detached and (B,)."""

    loss: Tensor  # ()
    correct: Tensor  # 1 where the predicted class is the label's (with mixup: the heavier one)
    macs_fraction: Tensor
    full: Tensor  # bool
    task_loss: Tensor
    hardness: Tensor  # log of the teacher's loss (the model's own without a teacher): what difficulty means


@dataclass(frozen=True)
class Executed:
    """What came of walking through the blocks under a policy. Where images leave by chance (`Leaving`): the logits of
    the likeliest block to leave after; task loss and MACs as expected over all.
    """

    logits: Tensor  # (B, classes)
    task: Tensor  # (B,)
    macs: Tensor  # (B,)
    exits: Tensor | None = None  # (B, L + 1), detached: the task loss after so many blocks


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

    def forward(self, images: Tensor, labels: Tensor, step: Step) -> Outcome:
        """images: (B, 3, H, W); labels: (B, classes), soft."""
        outcome = self._of_stage(images, labels, step)
        if torch.distributed.is_initialized():  # processes share gradients of every parameter, of skipped ones too
            nothing = 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
            outcome = replace(outcome, loss=outcome.loss + nothing)
        return outcome

    def _of_stage(self, images: Tensor, labels: Tensor, step: Step) -> Outcome:
        cost = self.model.cost((images.shape[-2], images.shape[-1]))
        soft = self._soft_labels(images if step.clean is None else step.clean)
        if self.stage.kind in ("backbone", "merging", "resolution"):
            return self._without_policy(images, labels, soft, step, cost)
        if self.stage.kind == "exits":
            return self._exits(images, labels, soft, cost)
        if self.stage.kind == "reinforce":
            return self._reinforce(images, labels, soft, step, cost)
        policy = self._policy(step, cost)
        relaxed = isinstance(policy, Relaxed | RelaxedTopTokens)
        execution = Masked(cost) if relaxed else self._execution(cost, images)
        done = self._executed(self.model.embed(images), labels, soft, policy, execution, cost)
        spent = done.macs / cost.backbone
        loss, hardness = done.task, _hardness(done.task, labels, soft)
        if isinstance(policy, Relaxed):
            loss = done.task + step.values * spent * ~step.draws.full + _told(policy, hardness, step, done)
        return self._outcome(loss.mean(), done.logits, labels, spent, step.draws.full, done.task, hardness)

    def _policy(self, step: Step, cost: Cost) -> Policy:
        """What decides in this stage."""
        model, draws = self.model, step.draws
        match self.stage.kind:
            case "elastic":
                return Fixed(elastic_decisions(draws, cost, self.stage, model.adapt_config))
            case "cls-attention":
                return ClsAttention(model.backbone.blocks, drawn_keep(draws))
            case "top-tokens":
                return RelaxedTopTokens(model.controllers, drawn_keep(draws), draws, step.temperature)
            case _:
                return Relaxed(model.controllers, step.log_prices, draws, step.temperature, self._leaving())

    def _without_policy(self, images: Tensor, labels: Tensor, soft: Tensor | None, step: Step, cost: Cost) -> Outcome:
        """The backbone as it is, with as many tokens merged as this step draws, or on images of the size it draws."""
        everything = torch.ones_like(step.draws.full)
        drawn = float(step.draws.shared[0])
        early = None
        if self.stage.kind == "backbone":
            logits, early = self._backbone(images, step)
            fraction = 1.0
        elif self.stage.kind == "resolution":
            size = drawn_size(self.model.macs_of_sizes(), drawn)
            logits = self.model.backbone(resized(images, size))
            fraction = self.model.cost(size).backbone / cost.backbone
        else:
            merges = merges_drawn(cost, drawn)
            logits, fraction = merged_logits(self.model, images, merges), merged_macs(cost, merges) / cost.backbone
        task = self._task(logits, labels, soft)
        if early is not None:
            task = task + self.stage.early_weight * self._task(early, labels, soft)
        spent = torch.full_like(task, fraction)
        return self._outcome(task.mean(), logits, labels, spent, everything, task, task)

    def _exits(self, images: Tensor, labels: Tensor, soft: Tensor | None, cost: Cost) -> Outcome:
        """The mean loss of the answers after every block, as BranchyNet and MSDNet train theirs."""
        after = [self.model.embed(images)]  # each block
        for block in transformer_blocks(self.model.backbone):
            after.append(block(after[-1]))
        answers, tasks = self._answers(after[1:], labels, soft, cost)
        task = tasks.mean(dim=1)
        everything = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return self._outcome(task.mean(), answers[-1], labels, torch.ones_like(task), everything, task, task)

    def _answers(self, after: list[Tensor], labels: Tensor, soft: Tensor | None, cost: Cost) -> tuple[Tensor, Tensor]:
        """Logits (E, B, classes) and task losses (B, E) of what comes out of E blocks, (B, P+N, C) each."""
        if cost.trims_last_block:  # nothing else is read
            after = [one[:, : cost.num_prefix_tokens] for one in after]
        answers = self._answer(torch.cat(after)).unflatten(0, (len(after), -1))
        return answers, torch.stack([self._task(logits, labels, soft) for logits in answers], dim=1)

    def _backbone(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """Logits of the static model and, where the stage wants it, early ones: after a block drawn for each image.

        A share of the patch tokens is left out (Liu et al. 2022, PatchDropout), and early answers are supervised (Lee
        et al. 2015): both make a backbone that can do with less.
        """
        backbone, (least, most) = self.model.backbone, self.stage.patch_drop
        blocks = transformer_blocks(backbone)
        if not most and not self.stage.early_weight:
            return backbone(images), None
        rate = least + (most - least) * float(step.draws.shared[0])
        drop = PatchDropout(rate, num_prefix_tokens=backbone.num_prefix_tokens)
        x = backbone.norm_pre(drop(backbone._pos_embed(backbone.patch_embed(images))))
        before: list[Tensor] = []  # each block
        for block in blocks:
            before.append(x)
            x = block(x)
        if not self.stage.early_weight:
            return self._answer(x), None
        half = len(blocks) // 2
        drawn = half + (step.draws.leaving * (len(blocks) - half)).long()
        early = torch.stack(before[half:])[drawn - half, torch.arange(len(x), device=x.device)]
        return self._answer(x), self._answer(early)

    def _answer(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of what comes out of a block."""
        return self.model.backbone.forward_head(self.model.backbone.norm(x))

    def _reinforce(self, images: Tensor, labels: Tensor, soft: Tensor | None, step: Step, cost: Cost) -> Outcome:
        """Two samples an image, each the other's baseline (leave one out); weights learn on both.

        The task term of the controllers' gradient is estimated by sampling; the cost term is differentiated in closed
        form. Williams 1992; Kool et al. 2019 for the baseline.
        """
        progressive = self.model.adapt_config.rules.progressive
        x = self.model.embed(images)
        execution = self._execution(cost, images)
        samples = []
        for draws in (step.draws, step.other_draws):
            policy = Sampled(
                self.model.controllers, step.log_prices, draws, step.temperature, cost, progressive, self._leaving()
            )
            samples.append((policy, self._executed(x, labels, soft, policy, execution, cost)))
        (one, done), (other, done_2) = samples
        advantage = (done.task - done_2.task).detach()  # of the second sample's gain; the first one's is its negative
        estimator = 0.5 * advantage * (one.log_prob - other.log_prob)
        expected = 0.5 * (one.expected_macs + other.expected_macs) / cost.backbone
        hardness = _hardness(done.task, labels, soft)
        told = 0.5 * (_told(one, hardness, step, done) + _told(other, hardness, step, done_2))
        loss = 0.5 * (done.task + done_2.task) + estimator + step.values * expected + told
        spent = 0.5 * (done.macs + done_2.macs) / cost.backbone
        return self._outcome(loss.mean(), done.logits, labels, spent, step.draws.full, done.task, hardness)

    def _leaving(self) -> Leaving | None:
        return Leaving() if self.model.adapt_config.rules.leaves else None

    def _executed(
        self, x: Tensor, labels: Tensor, soft: Tensor | None, policy: Policy, execution: Execution, cost: Cost
    ) -> Executed:
        """x: (B, P+N, C), embedded images."""
        leaving = getattr(policy, "leaving", None)
        if leaving is None:
            features, steps = self.model.walk(x, policy, execution, cost)
            logits = self._answer(features)
            return Executed(logits, self._task(logits, labels, soft), steps.macs)
        after: list[Tensor] = [x]  # each block

        def remembering(index: int, block: nn.Module, x: Tensor, gates: Gates | HostGates) -> Tensor:
            after.append(execution(index, block, x, gates))
            return after[-1]

        _, steps = self.model.walk(x, policy, remembering, cost)
        probability = leaving.probabilities()  # (B, L + 1)
        answers, tasks = self._answers(after, labels, soft, cost)
        chosen = probability.argmax(dim=1)
        logits = answers[chosen, torch.arange(len(x), device=x.device)]
        return Executed(logits, (probability * tasks).sum(dim=1), leaving.expected_macs(steps, cost), tasks.detach())

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


def _told(policy: Relaxed | Sampled, hardness: Tensor, step: Step, done: Executed) -> Tensor:
    """How far off (B,) the controllers' predictions of difficulty are, squared, summed over blocks.

    Difficulty is the teacher's loss; where images may leave, from half of the depth on, the loss of leaving now.
    Earlier there is hardly an answer yet, and before the first block it is the same for all images.
    """
    mean, std = step.hardness
    logs = [hardness] * len(policy.difficulties)
    if done.exits is not None:
        half = len(logs) // 2
        logs[half:] = done.exits[:, half:-1].clamp(min=1e-4).log().unbind(dim=1)
    targets = [((log - mean) / max(std, 1e-3)).clamp(-3, 3) for log in logs]
    errors = [(p - target).square() for p, target in zip(policy.difficulties, targets, strict=True)]
    return 0.1 * torch.stack(errors).sum(dim=0)
