"""Leaving early: an image whose answer is confident before the last block skips what is left."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Booleans, HostGates
from miaformer.engine.walk import State
from miaformer.vit.backbone import Backbone

ASKING = 1.5  # a threshold at which early answers are computed and nobody leaves
NEVER = 2.0  # a threshold at which a `Look` computes no early answers


def exit_blocks(depth: int) -> tuple[int, ...]:
    """The blocks before which an early answer is worth computing: every other one of the second half."""
    return tuple(range(max(depth // 2, 1), depth, 2))


def answers_early(backbone: Backbone) -> bool:
    """Whether its classifier gives one answer for an image, of more than one class, as confidence needs."""
    return backbone.num_classes > 1 and bool(backbone.global_pool)


@dataclass(eq=False)
class EarlyExit:
    """A policy: executes blocks until the classifier is confident, then none.

    Before each of `blocks` the backbone's own norm and classifier read the class token (or the pooled tokens); an image
    whose likeliest class has a probability of `threshold` or more skips what is left. Confidence as in BranchyNet
    (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018), with one classifier for all depths.

    threshold: one for all images, or one each, (B,). blocks: by default `exit_blocks` of the depth.
    answers: the logits (B, classes) read before each of `blocks` in the last call.

    Raises ValueError for a backbone that classifies nothing, and for blocks that it does not have.
    """

    backbone: Backbone = field(repr=False)
    threshold: float | Tensor
    blocks: tuple[int, ...] = ()
    answers: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _staying: Booleans = field(init=False, repr=False)  # (B,)

    def __post_init__(self) -> None:
        depth = len(self.backbone.blocks)
        if not answers_early(self.backbone):
            raise ValueError(
                f"EarlyExit needs a classifier of pooled tokens with two classes or more; this backbone has "
                f"{self.backbone.num_classes} classes and pools by {self.backbone.global_pool!r}"
            )
        self.blocks = tuple(sorted(set(self.blocks))) or exit_blocks(depth)
        if not all(0 < index < depth for index in self.blocks):
            raise ValueError(
                f"EarlyExit(blocks={self.blocks!r}): images leave before blocks 1 to {depth - 1} of {depth}"
            )

    def decide(self, state: State) -> HostGates:
        batch = len(state.x)
        if state.index == 0:
            self.answers, self._staying = [], np.ones(batch, dtype=bool)
        if state.index in self.blocks:
            read = state.x.detach()
            if self.backbone.global_pool == "token":
                read = read[:, : state.num_prefix_tokens]
            self.answers.append(self.backbone.forward_head(self.backbone.norm(read)).detach().float())
            confidence = self.answers[-1].softmax(dim=1).amax(dim=1).cpu()
            unsure = confidence < torch.as_tensor(self.threshold).to(confidence)
            self._staying = self._staying & unsure.numpy()
        heads = np.ones((batch, state.num_heads), dtype=bool)
        return HostGates(self._staying, heads, (state.active > 0).cpu().numpy())

    def context_macs(self, cost: Cost, index: int) -> int:
        return cost.head_macs if index in self.blocks else 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return 0


def left_at(confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """Which of its answers each image leaves with, (B,): the first that is confident enough, or the last.

    confidence: (B, K), of the answers in turn. threshold: one, or (B, 1).
    """
    enough = confidence >= torch.as_tensor(threshold).to(confidence)
    enough[:, -1] = True
    return enough.long().argmax(dim=1)


def asking_macs(cost: Cost, blocks: tuple[int, ...]) -> int:
    """MACs of the early answers before all of `blocks`."""
    return len(blocks) * cost.head_macs


def macs_of_leaving(cost: Cost, blocks: tuple[int, ...]) -> list[int]:
    """MACs of leaving before each of `blocks`, and of staying to the end, with all of `EarlyExit`'s answers."""
    return [cost.first(index) + asking_macs(cost, blocks) for index in (*blocks, cost.depth)]
