"""Leaving early: an image whose answer is confident before the last block skips what is left."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Gates
from miaformer.engine.walk import State

NEVER = 2.0  # a threshold that tells not to ask; one between 1 and this asks, and lets nobody leave


def exit_blocks(depth: int) -> tuple[int, ...]:
    """The blocks before which an early answer is worth its while: every other one of the second half."""
    return tuple(range(max(depth // 2, 1), depth, 2))


@dataclass
class EarlyExit:
    """A policy: executes blocks until the classifier is confident, then none.

    Before each of `blocks` the backbone's own norm and classifier read the class token (or the pooled tokens); an image
    whose likeliest class has a probability of `threshold` or more skips what is left. Confidence as in BranchyNet
    (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018), with one classifier for all depths.

    threshold: one for all images, or one each, (B,). blocks: by default `exit_blocks` of the depth.
    answers: the logits (B, classes) read before each of `blocks` in the last call.
    """

    backbone: VisionTransformer
    threshold: float | Tensor
    blocks: tuple[int, ...] = ()
    answers: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _staying: Tensor = field(init=False, repr=False, compare=False)  # (B,) bool

    def __post_init__(self) -> None:
        depth = len(self.backbone.blocks)
        self.blocks = self.blocks or exit_blocks(depth)
        if not all(0 < index < depth for index in self.blocks):
            raise ValueError(
                f"EarlyExit(blocks={self.blocks!r}): images leave before blocks 1 to {depth - 1} of {depth}"
            )

    def decide(self, state: State) -> Gates:
        full = Gates.full(len(state.x), state.num_heads, state.num_patches, state.x.device)
        if state.index == 0:
            self.answers, self._staying = [], full.depth
        if state.index in self.blocks:
            read = state.x.detach()
            if self.backbone.global_pool == "token":
                read = read[:, : state.num_prefix_tokens]
            self.answers.append(self.backbone.forward_head(self.backbone.norm(read)).detach().float())
            confidence = self.answers[-1].softmax(dim=1).amax(dim=1)
            self._staying = self._staying & (confidence < torch.as_tensor(self.threshold).to(confidence))
        return Gates(self._staying, full.heads, (state.active > 0).to(state.x.device))

    def asking_macs(self, cost: Cost) -> int:
        """What all answers take that are asked for."""
        return len(self.blocks) * cost.head_macs

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


def macs_of_leaving(cost: Cost, blocks: tuple[int, ...]) -> list[int]:
    """MACs of leaving before each of `blocks`, and of staying to the end, all of `EarlyExit`'s answers among them."""
    asking = len(blocks) * cost.head_macs
    return [cost.first(index) + asking for index in (*blocks, cost.depth)]
