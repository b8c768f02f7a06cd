"""What makes decisions. One interface for all, so that one engine, one benchmark and one cost count compare them.

The learned policy asks the controllers, an early exit the classifier (`early_exit`); the others are controls:
everything, at random, the same for every image, or the tokens that the class token attends to most.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.engine.controller import Controller, Controllers, Formula
from miaformer.engine.cost import Cost
from miaformer.engine.deciding import decide
from miaformer.engine.decisions import Booleans, Decisions, Gates, HostGates
from miaformer.engine.walk import Policy, State
from miaformer.model.early_exit import NEVER, EarlyExit
from miaformer.model.resolution import Size
from miaformer.vit.layers import LinearView, attention_input, by_heads, normed_keys, query_key_value_layers

__all__ = [
    "ClsAttention",
    "EarlyExit",
    "Fixed",
    "Full",
    "Learned",
    "Look",
    "Policy",
    "Random",
    "Sampling",
    "Static",
    "TwoLooks",
]


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
    below the block's probability, so that a progressive scope keeps that share of tokens too, not its powers. Blocks
    draw for themselves: where images that skip a block leave (`depth_choice="nested"`), fewer are executed.
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
class BestTokens(_Free, ABC):
    """Keeps the patch tokens with the highest scores, the same number for every image.

    keep: of the tokens still active the share that stays, at each of `blocks`; a number, or one an image (B,). blocks:
    None for `three_of` the depth, as in EViT and DynamicViT. Who scores says how (`scores`) and at what cost.
    """

    keep: float | Tensor
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        keep = torch.as_tensor(self.keep)
        if not bool(((keep >= 0) & (keep <= 1)).all()):
            raise ValueError(f"{type(self).__name__}(keep={self.keep!r}): the share of tokens to keep lies in 0 to 1")

    def chooses(self, index: int, depth: int) -> bool:
        """Whether tokens are chosen before block `index`."""
        return index in (three_of(depth) if self.blocks is None else self.blocks)

    @abstractmethod
    def scores(self, state: State, active: Tensor) -> Tensor:
        """(B, N), of the active tokens (B, N) bool; of the others anything."""

    @torch.no_grad()
    def decide(self, state: State) -> Gates:
        full = Gates.full(len(state.x), state.num_heads, state.num_patches, state.x.device)
        active = (state.active > 0).to(state.x.device)
        if not self.chooses(state.index, state.num_blocks):
            return Gates(full.depth, full.heads, active)
        if state.affordable is not None:  # who cannot pay for the block is not scored
            active = active & state.affordable.to(active.device)[:, None]
        scores = self.scores(state, active)
        rank = scores.masked_fill(~active, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        keep = torch.as_tensor(self.keep, device=active.device).reshape(-1, 1)
        count = (active.sum(dim=1, keepdim=True) * keep).round()
        return Gates(full.depth, full.heads, (rank < count) & active, scores)


def three_of(depth: int) -> tuple[int, ...]:
    """Blocks at a quarter, half and three quarters of the depth, where EViT and DynamicViT choose tokens."""
    return depth // 4, depth // 2, 3 * depth // 4


@dataclass(frozen=True)
class ClsAttention(BestTokens):
    """Keeps the patch tokens that the class token attends to most.

    EViT's criterion (Liang et al., ICLR 2022), on the attention of the block about to be executed, averaged over
    heads.
    """

    def scores(self, state: State, active: Tensor) -> Tensor:
        if not state.num_prefix_tokens:
            raise ValueError("ClsAttention needs a class token; this backbone has none")
        return _class_attention(state.block, state.x, active, state.num_prefix_tokens)

    def context_macs(self, cost: Cost, index: int) -> int:
        return cost.embed_dim**2 if self.chooses(index, cost.depth) else 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return cost.embed_dim * cost.key_channels(index) if self.chooses(index, cost.depth) else 0


def _class_attention(block: Any, x: Tensor, active: Tensor, num_prefix_tokens: int) -> Tensor:
    """How much the class token attends to each active patch token, mean over heads. x: (B, P+N, C) -> (B, N)."""
    attn = block.attn
    query, key, _ = query_key_value_layers(attn)
    image, token = active.nonzero(as_tuple=True)
    rows = x[image, num_prefix_tokens + token]

    def made(layer: LinearView, rows: Tensor) -> Tensor:
        return by_heads(attn, F.linear(attention_input(block, rows), *layer))

    q = attn.q_norm(made(query, x[:, 0]))  # the class token has no angle
    k = normed_keys(block, made(key, rows), num_prefix_tokens + token)
    logits = x.new_full((*active.shape, attn.num_heads), float("-inf"))
    logits[image, token] = ((q[image] * k).sum(dim=-1) * attn.scale).to(x.dtype)
    return logits.softmax(dim=1).mean(dim=2).nan_to_num(0.0)


@dataclass(frozen=True)
class Sampling:
    """How the learned policy draws its decisions instead of taking the likelier one.

    temperature: of the draws; a gate of logit z is kept with probability sigmoid(z / temperature). By default what
    training ends at. generator: where they come from; by default PyTorch's global one, seeded by `torch.manual_seed`.
    """

    temperature: float = 0.25
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Sampling(temperature={self.temperature!r}): it must be positive")

    def noise(self, *shape: int) -> NDArray[np.float32]:
        """What to add to logits, so that cutting them at 0 is drawing: logistic, on the host."""
        uniform = torch.rand(shape, generator=self.generator).clamp_(1e-6, 1 - 1e-6)
        return (self.temperature * torch.logit(uniform)).numpy()


class AsksControllers:
    """What deciding costs where controllers decide."""

    controllers: nn.ModuleList

    def context_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).context_macs

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).token_score_macs


@dataclass
class Learned(AsksControllers):
    """Asks the controllers, and executes what is more likely kept than not, or draws.

    log_price: (B,) or (1,), what the controllers are conditioned on. token_multiple: the rows that an image keeps,
    prefix tokens too, are rounded up to a multiple of this with the likeliest of the other tokens, as far as there
    are any (see `AdaptConfig`). sampling: how decisions are drawn; None: they are not.
    """

    controllers: Controllers
    log_price: Tensor
    token_multiple: int = 1
    sampling: Sampling | None = None
    _formulas: list[Formula] = field(default_factory=list, init=False, repr=False, compare=False)

    def decide(self, state: State) -> HostGates:
        if state.index == 0 or not self._formulas:
            self._formulas = self.controllers.formulas(self.log_price.to(state.x.device))
        noise = None if self.sampling is None else self.sampling.noise
        return decide(state, self._formulas[state.index], self.token_multiple, noise)


@dataclass(frozen=True)
class Look:
    """One look at images: who decides, and the sizes (H, W) in which they are looked at: one for all, or one each.

    sizes: empty where they are taken as they are.
    """

    policy: Policy
    sizes: tuple[Size, ...] = ()

    def sizes_of(self, batch: int) -> tuple[Size, ...]:
        """One each, of a batch."""
        return self.sizes * batch if len(self.sizes) == 1 else self.sizes

    def may_leave(self, batch: int) -> Booleans:
        """Which images (B,) of a batch are asked for early answers."""
        thresholds = self.policy.threshold if isinstance(self.policy, EarlyExit) else NEVER
        asked: Booleans = (torch.as_tensor(thresholds).cpu() < NEVER).expand(batch).numpy()
        return asked

    def of(self, images: Tensor) -> Look:
        """The same for these images (n,) of the batch."""
        sizes = tuple(self.sizes[i] for i in images.tolist()) if len(self.sizes) > 1 else self.sizes
        return Look(self.policy_of(images), sizes)

    def policy_of(self, images: Tensor, leaving: bool = True) -> Policy:
        """Who decides for these images (n,) of the batch. leaving: False lets none of them leave early."""
        policy = self.policy
        if isinstance(policy, EarlyExit) and not leaving:
            policy = Full()
        elif isinstance(policy, EarlyExit) and isinstance(policy.threshold, Tensor) and policy.threshold.numel() > 1:
            policy = replace(policy, threshold=policy.threshold[images])
        elif isinstance(policy, Learned) and len(policy.log_price) > 1:
            policy = replace(policy, log_price=policy.log_price[images.to(policy.log_price.device)])
        return policy


@dataclass(frozen=True)
class RandomSizes(Look):
    """A control of looks: each image in one of two sizes, drawn by chance, from a seeded generator.

    sizes: two. share: of images that get the second one.
    """

    share: float = 0.5
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def sizes_of(self, batch: int) -> tuple[Size, ...]:
        drawn = torch.rand(batch, generator=self._generator) < self.share
        return tuple(self.sizes[one] for one in drawn.long().tolist())


@dataclass(frozen=True)
class TwoLooks:
    """A policy for `MIAFormer.run`: a first look, and a second one for images whose first answer is less confident.

    confidence: (B,) or (1,); 0: no second look.
    """

    first: Look
    second: Look
    confidence: Tensor

    def open_images(self, logits: Tensor) -> Tensor:
        """Which images (n,) of the first look's logits (B, classes) are to be looked at again."""
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        return (confidence < self.confidence.to(confidence)).nonzero().flatten()


AnyPolicy = Policy | Look | TwoLooks  # of one look, of one in other sizes, of two
