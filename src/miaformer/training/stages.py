"""Our kinds of stages: how each chooses decisions for the objective (docs/concepts.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import PatchDropoutWithIndices
from torch import Tensor, nn

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates, HostGates
from miaformer.engine.masked import Masked
from miaformer.engine.walk import Execution, Policy
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Fixed
from miaformer.model.resolution import drawn_size, resized
from miaformer.training.objective import Objective, Outcome, Step, Targets, UnderPolicy
from miaformer.training.policies import Draws, Leaving, Relaxed, Sampled, elastic_decisions
from miaformer.vit.embedding import Embedded, embedded


class EarlyAnswers(Objective):
    """Everything is executed. Where the stage wants it (`early_weight`), the answer after one random block per image is
    supervised too (Lee et al. 2015), so that weights learn to say early what they know.
    """

    def learned(
        self, images: Tensor, targets: Targets, step: Step, cost: Cost, drop: PatchDropoutWithIndices | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (B,), and the answers to images (B, 3, H, W), as `answer` has them. drop: leaves out some tokens."""
        backbone = self.model.backbone
        if drop is None and not self.stage.early_weight and self.recipe.target != "tokens":
            given = backbone(images)
            return targets.loss(given), given
        x, blocks = embedded(backbone, images, drop)
        half, before = len(blocks) // 2, []  # each block of the second half, the rows that an answer reads
        read = cost.num_prefix_tokens if cost.trims_last_block else None
        for index, block in enumerate(blocks):
            if self.stage.early_weight and index >= half:
                before.append(x[:, :read])
            x = block(x)
        given = self.answer(x)
        loss = targets.loss(given)
        if before:
            drawn = (step.draws.leaving * len(before)).long()
            early = torch.stack(before)[drawn, torch.arange(len(x), device=x.device)]
            loss = loss + self.stage.early_weight * targets.loss(self.answer(early))
        return loss, given


class Backbone(EarlyAnswers):
    """The static model, of which a share of the patch tokens is left out (Liu et al. 2022, PatchDropout), so that it
    tolerates skipping.
    """

    dense = True

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        backbone, (least, most) = self.model.backbone, self.stage.patch_drop
        rate = least + (most - least) * float(step.draws.shared[0])
        drop = PatchDropoutWithIndices(rate, num_prefix_tokens=backbone.num_prefix_tokens) if most else None
        return Outcome.of_all_alike(*self.learned(images, targets, step, cost, drop), targets)


class Resolution(EarlyAnswers):
    """The static model on images of the sizes that it is looked at in, one drawn each step."""

    adapts = True

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        size = drawn_size(self.model.macs_of_sizes(), float(step.draws.shared[0]))
        loss, given = self.learned(resized(images, size), targets, step, cost)
        return Outcome.of_all_alike(loss, given, targets, self.model.cost(size).backbone / cost.backbone)


class Elastic(UnderPolicy):
    """Random decisions at every grain."""

    adapts = True

    def policy(self, step: Step, cost: Cost) -> Policy:
        return Fixed(elastic_decisions(step.draws, cost, self.stage, self.model.adapt_config))


@dataclass(frozen=True)
class Executed:
    """What came of walking through the blocks under a policy. Where images leave by chance (`Leaving`): the answer of
    the likeliest block to leave after; task loss and MACs as expected over all.
    """

    given: Tensor  # as `Objective.answer` gives it
    task: Tensor  # (B,)
    macs: Tensor  # (B,)
    exits: Tensor | None = None  # (B, L + 1), detached: the task loss after so many blocks


class Deciding(Objective):
    """Controllers decide, and learn."""

    adapts = True
    decides = True

    @staticmethod
    def deciders(model: MIAFormer) -> Sequence[nn.Module]:
        return (model.controllers,)

    def executed(
        self, start: Embedded, targets: Targets, policy: Relaxed | Sampled, execution: Execution, cost: Cost
    ) -> Executed:
        leaving = policy.leaving
        if leaving is None:
            features, steps = self.model.walk(start, policy, execution, cost)
            given = self.answer(features)
            return Executed(given, targets.loss(given), steps.macs)
        after: list[Tensor] = [start.tokens]  # each block

        def remembering(index: int, block: Any, x: Tensor, gates: Gates | HostGates) -> Tensor:
            after.append(execution(index, block, x, gates))
            return after[-1]

        _, steps = self.model.walk(start, policy, remembering, cost)
        probability = leaving.probabilities()  # (B, L + 1)
        answers, tasks = self.answers(after, targets, cost)
        chosen = probability.argmax(dim=1)
        given = answers[chosen, torch.arange(len(chosen), device=chosen.device)]
        return Executed(given, (probability * tasks).sum(dim=1), leaving.expected_macs(steps, cost), tasks.detach())


class Supervised(Deciding):
    """Controllers and weights together: relaxed gates, and the cost by its weight."""

    values_compute = True

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        policy = relaxed(self.model, step.log_prices, step.draws, step.temperature)
        done = self.executed(self.model.embed(images), targets, policy, Masked(cost), cost)
        spent, full = done.macs / cost.backbone, step.draws.full
        loss = done.task + step.values * spent * ~full + _misjudged(policy, targets.difficulty(done.task), step, done)
        return Outcome.of(loss, done.task, done.given, targets, spent, full)


class Reinforce(Deciding):
    """Two samples an image, each the other's baseline (leave one out); weights learn on both.

    The task term of the controllers' gradient is estimated by sampling; the cost term is differentiated in closed
    form. Williams 1992; Kool et al. 2019 for the baseline.
    """

    samples_twice = True

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        model, rules = self.model, self.model.adapt_config.rules
        progressive = rules.progressive
        start = model.embed(images)
        execution = self.execution(cost, images)
        samples = []
        for draws in (step.draws, step.other_draws):
            leaving = Leaving() if rules.leaves else None
            policy = Sampled(model.controllers, step.log_prices, draws, step.temperature, cost, progressive, leaving)
            samples.append((policy, self.executed(start, targets, policy, execution, cost)))
        (one, done), (other, done_2) = samples
        advantage = (done.task - done_2.task).detach()  # of the second sample's gain; the first one's is its negative
        estimator = 0.5 * advantage * (one.log_prob - other.log_prob)
        expected = 0.5 * (one.expected_macs + other.expected_macs) / cost.backbone
        difficulty = targets.difficulty(done.task)
        misjudged = 0.5 * (_misjudged(one, difficulty, step, done) + _misjudged(other, difficulty, step, done_2))
        loss = 0.5 * (done.task + done_2.task) + estimator + step.values * expected + misjudged
        spent = 0.5 * (done.macs + done_2.macs) / cost.backbone
        return Outcome.of(loss, done.task, done.given, targets, spent, step.draws.full)


OBJECTIVES: dict[str, type[Objective]] = {  # by kind of stage; a probe has none, see `probe`
    "backbone": Backbone,
    "elastic": Elastic,
    "supervised": Supervised,
    "reinforce": Reinforce,
    "resolution": Resolution,
}


def relaxed(model: MIAFormer, log_prices: Tensor, draws: Draws, temperature: float) -> Relaxed:
    """The controllers' relaxed decisions at log-prices (B,)."""
    leaving = Leaving() if model.adapt_config.rules.leaves else None
    return Relaxed(model.controllers, log_prices, draws, temperature, leaving)


def _misjudged(policy: Relaxed | Sampled, difficulty: Tensor, step: Step, done: Executed) -> Tensor:
    """How far off (B,) the controllers' predictions of difficulty are, squared, summed over blocks.

    Difficulty is the teacher's loss; where images may leave, from half of the depth on, the loss of leaving now.
    Earlier there is hardly an answer yet, and before the first block it is the same for all images.
    """
    mean, std = step.difficulty
    logs = [difficulty] * len(policy.difficulties)
    if done.exits is not None:
        half = len(logs) // 2
        logs[half:] = done.exits[:, half:-1].clamp(min=1e-4).log().unbind(dim=1)
    targets = [((log - mean) / max(std, 1e-3)).clamp(-3, 3) for log in logs]
    errors = [(p - target).square() for p, target in zip(policy.difficulties, targets, strict=True)]
    return 0.1 * torch.stack(errors).sum(dim=0)
