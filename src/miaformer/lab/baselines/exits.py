"""Leaving when confident: early exits, also of images of which an even share of the tokens is looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions, Gates
from miaformer.engine.dither import evenly
from miaformer.engine.walk import State
from miaformer.evaluation.controls import macs_of
from miaformer.model.model import MIAFormer
from miaformer.training.objective import Objective, Outcome, Step, Targets
from miaformer.vit.backbone import transformer_blocks

Array = NDArray[Any]
NEVER = 2.0  # a confidence that none has


@dataclass
class EarlyExit:
    """Executes blocks until the classifier is confident, then none.

    The backbone's own norm and classifier read the class token (or the pooled tokens) before each block but the first;
    an image whose likeliest class has a probability of `threshold` or more skips what is left. Confidence as in
    BranchyNet (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018), with one classifier for all depths.
    keep: the share of tokens that enters the first block, spread evenly over the image, the same in every image.
    answers: the logits (images that are left, classes) that were read before each block but the first.
    """

    backbone: VisionTransformer
    threshold: float
    keep: float = 1.0
    answers: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _gone: Tensor = field(init=False, repr=False)  # (B,) bool

    @torch.no_grad()
    def decide(self, state: State) -> Gates:
        full = Gates.full(len(state.x), state.num_heads, state.num_patches, state.x.device)
        if state.index == 0:
            self._gone = torch.zeros_like(full.depth)
            self.answers = []
            tokens = torch.from_numpy(evenly(*state.grid, self.keep)).to(state.x.device)
            return Gates(full.depth, full.heads, tokens.expand_as(full.tokens))
        staying = (~self._gone).nonzero().flatten()
        read = state.x[staying]
        if self.backbone.global_pool == "token":
            read = read[:, : state.num_prefix_tokens]
        self.answers.append(self.backbone.forward_head(self.backbone.norm(read)).float())
        confidence = self.answers[-1].softmax(dim=1).amax(dim=1)
        self._gone[staying] = confidence >= self.threshold
        return Gates(~self._gone, full.heads, (state.active > 0).to(state.x.device))

    def context_macs(self, cost: Cost, index: int) -> int:
        return cost.head_macs if index else 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return 0


@dataclass(frozen=True)
class ExitTable:
    """What leaving after each block would do, of images that were looked at once, to the end."""

    keep: float  # share of tokens
    confidence: Array  # (n, L): after each block; after the last nobody asks, so infinite
    correct: Array  # (n, L) bool
    macs: Array  # (L,), of leaving after each block

    def at(self, macs: float) -> tuple[float, float]:
        """Accuracy and threshold of spending so many MACs on average, or less if that is all there is to spend."""
        low, high = 0.0, NEVER  # leave at once, never leave
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.macs[self._left(middle)].mean() <= macs else (low, middle)
        left = self._left(low)
        return float(self.correct[np.arange(len(left)), left].mean()), low

    def _left(self, threshold: float) -> Array:
        """The block (n,) after which each image leaves."""
        left: Array = (self.confidence >= threshold).argmax(axis=1)
        return left


@torch.inference_mode()
def exit_table(model: MIAFormer, batches: Iterable[LabelledBatch], keep: float) -> ExitTable:
    """Of all images of `batches`, with the share `keep` of their tokens."""
    parameter = next(model.parameters())
    policy = EarlyExit(model.backbone, NEVER, keep)
    confidence, correct = [], []
    for batch in batches:
        last = model.run(batch.images.to(parameter), policy=policy).logits.float()
        answers = torch.stack([*policy.answers, last], dim=1)  # (B, L, classes)
        correct.append((answers.argmax(dim=2).cpu() == batch.labels.cpu()[:, None]).numpy())
        sure = answers.softmax(dim=2).amax(dim=2).cpu().numpy()
        sure[:, -1] = np.inf
        confidence.append(sure)
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
        after = [self.model.embed(images)]  # each block
        for block in transformer_blocks(self.model.backbone):
            after.append(block(after[-1]))
        answers, tasks = self.answers(after[1:], targets, cost)
        return Outcome.of_all_alike(tasks.mean(dim=1), answers[-1], targets)
