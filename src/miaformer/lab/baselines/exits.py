"""Leaving when confident: early exits, also of images of which an even share of the tokens is looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions, HostGates
from miaformer.engine.dither import evenly
from miaformer.engine.walk import State
from miaformer.evaluation.controls import macs_of
from miaformer.model.early_exit import ASKING, EarlyExit, left_at
from miaformer.model.model import MIAFormer
from miaformer.training.objective import Objective, Outcome, Step, Targets
from miaformer.vit.backbone import transformer_blocks

Array = NDArray[Any]


@dataclass(eq=False)
class EvenExits(EarlyExit):
    """Early exits before every block but the first, on an even share of the tokens.

    keep: the share of tokens that enters the first block, spread evenly over the image, the same in every image.
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        self.blocks = self.blocks or tuple(range(1, len(transformer_blocks(self.backbone))))
        super().__post_init__()

    def decide(self, state: State) -> HostGates:
        gates = super().decide(state)
        if state.index:
            return gates
        return replace(gates, tokens=np.broadcast_to(evenly(*state.grid, self.keep), gates.tokens.shape))


@dataclass(frozen=True)
class ExitTable:
    """What leaving after each block would do, of images that were looked at once, to the end."""

    keep: float  # share of tokens
    confidence: Array  # (n, L): after each block
    correct: Array  # (n, L) bool
    macs: Array  # (L,), of leaving after each block

    def at(self, macs: float) -> tuple[float, float]:
        """Accuracy and threshold of spending so many MACs on average, or less if that is all there is to spend."""
        confidence = torch.from_numpy(self.confidence)
        low, high = 0.0, ASKING  # leave at once, never leave
        for _ in range(24):
            middle = (low + high) / 2
            spent = self.macs[left_at(confidence, middle).numpy()].mean()
            low, high = (middle, high) if spent <= macs else (low, middle)
        left = left_at(confidence, low).numpy()
        return float(self.correct[np.arange(len(left)), left].mean()), low


@torch.inference_mode()
def exit_table(model: MIAFormer, batches: Iterable[LabelledBatch], keep: float) -> ExitTable:
    """Of all images of `batches`, with the share `keep` of their tokens."""
    parameter = next(model.parameters())
    policy = EvenExits(model.backbone, ASKING, keep=keep)
    confidence, correct = [], []
    for batch in batches:
        last = model.run(batch.images.to(parameter), policy=policy).logits.float()
        answers = torch.stack([*policy.answers, last], dim=1)  # (B, L, classes)
        correct.append((answers.argmax(dim=2).cpu() == batch.labels.cpu()[:, None]).numpy())
        confidence.append(answers.softmax(dim=2).amax(dim=2).cpu().numpy())
    return ExitTable(keep, np.concatenate(confidence), np.concatenate(correct), _macs(model, keep))


def _macs(model: MIAFormer, keep: float) -> Array:
    """MACs (L,) of leaving after each block."""
    cost = model.cost()
    depth = torch.ones(cost.depth, cost.depth, dtype=torch.bool).tril()
    heads = depth.new_ones(cost.depth, cost.depth, cost.num_heads)
    tokens = torch.from_numpy(evenly(*cost.grid, keep)).expand(cost.depth, cost.depth, -1)
    asking = (cost.depth - 1) * cost.head_macs
    macs: Array = macs_of(Decisions(depth, heads, tokens), cost, model.adapt_config.rules).numpy() + asking
    return macs


class ExitsObjective(Objective):
    """The mean loss of the answers after every block, as BranchyNet and MSDNet train theirs."""

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        x, blocks = self.model.embed(images)
        after = [x]  # each block
        for block in blocks:
            after.append(block(after[-1]))
        answers, tasks = self.answers(after[1:], targets, cost)
        return Outcome.of_all_alike(tasks.mean(dim=1), answers[-1], targets)
