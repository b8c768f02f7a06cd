"""What makes decisions. One interface for all, so that one engine, one benchmark and one cost count compare them.

The learned policy asks the controllers; the others are its controls: everything, at random, the same for every
image, or the tokens that the class token attends to most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from miaformer.controller import Controller
from miaformer.cost import Cost
from miaformer.decisions import Decisions, Gates
from miaformer.engine.walk import Policy, State

__all__ = ["ClsAttention", "Fixed", "Full", "Learned", "Policy", "Random", "Static"]


class _Free:
    """A policy that computes no matrix product to decide."""

    def context_macs(self, cost: Cost, index: int) -> int:
        return 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return 0


class Full(_Free):
    """Executes everything: the backbone."""

    def decide(self, state: State) -> Gates:
        return Gates.full(len(state.x), state.num_heads, state.num_patches, state.x.device)


@dataclass
class Random(_Free):
    """Keeps at random: each block, head and token with the probability given, per image, from a seeded generator.

    A probability is a number, or one a block. Each token draws one number a forward pass and is kept where it is
    below the block's probability, so that a progressive scope keeps that share of tokens too, not its powers.
    """

    depth: float | Sequence[float] = 1.0
    heads: float | Sequence[float] = 1.0
    tokens: float | Sequence[float] = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False, compare=False)
    _token_draw: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("depth", "heads", "tokens"):
            value = getattr(self, name)
            for probability in value if isinstance(value, Sequence) else [value]:
                if not 0 <= probability <= 1:
                    raise ValueError(f"Random({name}={value!r}): keep probabilities lie in 0 to 1")
        self._generator = torch.Generator().manual_seed(self.seed)

    def decide(self, state: State) -> Gates:
        batch, device = len(state.x), state.x.device

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=self._generator)

        if state.index == 0:
            self._check_lengths(state.num_blocks)
            self._token_draw = draw(batch, state.num_patches)
        depth, heads, tokens = (
            value[state.index] if isinstance(value, Sequence) else value
            for value in (self.depth, self.heads, self.tokens)
        )
        return Gates(
            (draw(batch) < depth).to(device),
            (draw(batch, state.num_heads) < heads).to(device),
            (self._token_draw < tokens).to(device),
        )

    def _check_lengths(self, num_blocks: int) -> None:
        for name in ("depth", "heads", "tokens"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != num_blocks:
                raise ValueError(
                    f"Random({name}=...) holds {len(value)} keep probabilities, the model has {num_blocks} blocks"
                )


@dataclass(frozen=True)
class Fixed(_Free):
    """Executes the decisions given: one row an image, or one row for all of them."""

    decisions: Decisions

    def decide(self, state: State) -> Gates:
        images, *given = *self.decisions.depth.shape, *self.decisions.heads.shape[2:], *self.decisions.tokens.shape[2:]
        batch, wanted = len(state.x), [state.num_blocks, state.num_heads, state.num_patches]
        if images not in (1, batch) or given != wanted:
            raise ValueError(
                f"Fixed decisions are for (images, blocks, heads, patch tokens) = {(images, *given)}, "
                f"the model needs {(batch, *wanted)}"
            )
        gates = self.decisions.block(state.index)
        depth, heads, tokens = (g.to(state.x.device) for g in (gates.depth, gates.heads, gates.tokens))
        return Gates(depth.expand(batch), heads.expand(batch, -1), tokens.expand(batch, -1))


class Static(Fixed):
    """The same decisions for every image, whatever is in it. See `miaformer.evaluation.controls` for finding them."""


@dataclass(frozen=True)
class ClsAttention(_Free):
    """Keeps the patch tokens that the class token attends to most, the same number for every image.

    EViT's criterion (Liang et al., ICLR 2022), on the attention of the block about to be executed, averaged over
    heads. Of the tokens still active, the share `keep` stays, at each of `blocks` (default: a quarter, half and three
    quarters of the depth, as in EViT).
    """

    blocks_of_model: nn.Sequential
    keep: float
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise ValueError(f"ClsAttention(keep={self.keep!r}): the share of tokens to keep lies in 0 to 1")

    def selects(self, index: int) -> bool:
        depth = len(self.blocks_of_model)
        return index in (self.blocks or (depth // 4, depth // 2, 3 * depth // 4))

    def decide(self, state: State) -> Gates:
        full = Gates.full(len(state.x), state.num_heads, state.num_patches, state.x.device)
        active = state.active > 0
        if not self.selects(state.index):
            return Gates(full.depth, full.heads, active)
        if state.affordable is not None:  # who cannot pay for the block is not scored
            active = active & state.affordable[:, None]
        if not state.num_prefix_tokens:
            raise ValueError("ClsAttention needs a class token; this backbone has none")
        block = self.blocks_of_model[state.index]
        scores = _class_attention(block, state.x, active, state.num_prefix_tokens)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = (active.sum(dim=1, keepdim=True) * self.keep).round()
        return Gates(full.depth, full.heads, (rank < count) & active, scores)

    def context_macs(self, cost: Cost, index: int) -> int:
        return cost.embed_dim**2 if self.selects(index) else 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return cost.embed_dim**2 if self.selects(index) else 0


def _class_attention(block: Any, x: Tensor, active: Tensor, num_prefix_tokens: int) -> Tensor:
    """How much the class token attends to each active patch token, mean over heads. x: (B, P+N, C) -> (B, N)."""
    attn = block.attn
    dim, heads = attn.attn_dim, (attn.num_heads, attn.head_dim)
    bias = attn.qkv.bias
    q_bias, k_bias = (None, None) if bias is None else (bias[:dim], bias[dim : 2 * dim])
    image, token = active.nonzero(as_tuple=True)
    rows = x[image, num_prefix_tokens + token]
    q = attn.q_norm(nn.functional.linear(block.norm1(x[:, 0]), attn.qkv.weight[:dim], q_bias).unflatten(1, heads))
    k = nn.functional.linear(block.norm1(rows), attn.qkv.weight[dim : 2 * dim], k_bias).unflatten(1, heads)
    logits = x.new_full((*active.shape, attn.num_heads), float("-inf"))
    logits[image, token] = ((q[image] * attn.k_norm(k)).sum(dim=-1) * attn.scale).to(x.dtype)
    return logits.softmax(dim=1).mean(dim=2).nan_to_num(0.0)


@dataclass(frozen=True)
class Learned:
    """Asks the controllers, and executes what is more likely kept than not.

    log_price: (B,) or (1,), what the controllers are conditioned on.
    """

    controllers: nn.ModuleList
    log_price: Tensor

    def decide(self, state: State) -> Gates:
        controller = cast(Controller, self.controllers[state.index])
        log_price = self.log_price.to(state.x).expand(len(state.x))
        active = state.active > 0
        context = controller.context(state.x, active, state.num_prefix_tokens, log_price)
        shift = controller.shift(controller.predicted_difficulty(context), log_price)
        depth_logits, head_logits = controller.depth_and_heads(context, shift)
        depth = depth_logits > 0
        if state.affordable is not None:
            depth = depth & state.affordable
        if not controller.rank:
            return Gates(depth, controller.most_likely_heads(head_logits), active)
        image, token = (active & depth[:, None]).nonzero(as_tuple=True)
        query, shared = controller.token_query(context, shift)
        rows = state.x[image, state.num_prefix_tokens + token]
        scores = state.x.new_full(active.shape, float("-inf"))
        scores[image, token] = controller.token_logits(rows, query[image], shared[image]).to(scores.dtype)
        return Gates(depth, controller.most_likely_heads(head_logits), scores > 0, scores)

    def context_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).context_macs

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).token_score_macs
