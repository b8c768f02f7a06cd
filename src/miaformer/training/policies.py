"""What decides in training: random (elastic), relaxed (supervised), and sampled with their log-probability (reinforce).

Everything random is drawn for the global batch from a generator of the step, then cut to this process's images: the
same training whatever the number of processes, and from wherever it is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaformer.engine.controller import Controller, Logits
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import Decisions, Gates, HostGates, chained, straight_through
from miaformer.engine.dither import dither
from miaformer.engine.walk import State, Steps
from miaformer.model.config import AdaptConfig, ControlledGrain
from miaformer.model.policy import AsksControllers
from miaformer.training.recipes import Stage


@dataclass(frozen=True)
class Draws:
    """The randomness of one training step, for this process's images."""

    full: Tensor  # (B,) bool: images that execute everything, so that weights do not drift from the full model
    budgets: Tensor  # (B,) in (0, 1), what each other image is asked to spend
    depth: Tensor  # (B, L) uniform in (0, 1)
    heads: Tensor  # (B, L, H)
    tokens: Tensor  # (B, L, N)
    rates: Tensor  # (B, 4): image-wide keep rates of elastic training, before scaling
    shared: Tensor  # (B,): one number for all images of the global batch
    leaving: Tensor  # (B,): the block after which an early answer is supervised, as a share of those it can be

    @staticmethod
    def of_step(
        generator: torch.Generator,
        batch: int,
        cost: Cost,
        full_share: float,
        budgets: tuple[float, float],
        part: slice,
    ) -> Draws:
        """generator: of the step; batch: images of the global batch; part: those of this process."""
        uniform = partial(_uniform, generator)
        low, high = budgets
        # Stratified, so that every step sees the whole range of budgets.
        strata = (torch.randperm(batch, generator=generator) + uniform(batch)) / batch
        full = torch.randperm(batch, generator=generator) < round(full_share * batch)
        return Draws(
            full[part],
            (low + (high - low) * strata)[part],
            uniform(batch, cost.depth)[part],
            uniform(batch, cost.depth, cost.num_heads)[part],
            uniform(batch, cost.depth, cost.num_patches)[part],
            uniform(batch, 4)[part],
            uniform(1).expand(batch)[part],
            uniform(batch)[part],
        )

    def again(self, generator: torch.Generator, batch: int, part: slice) -> Draws:
        """The same images asked for the same budgets, with gates drawn anew."""
        names = ("depth", "heads", "tokens")
        anew = {name: _uniform(generator, batch, *getattr(self, name).shape[1:])[part] for name in names}
        return replace(self, **anew)

    def to(self, device: torch.device) -> Draws:
        return Draws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """In (0, 1), ends excluded."""
    return torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)


ELASTIC_NOISE = 0.5  # of token gates where thresholds spread them


def elastic_decisions(draws: Draws, cost: Cost, stage: Stage, config: AdaptConfig) -> Decisions:
    """Random decisions at every grain that controllers decide: each image draws its keep rates, down to `stage.keep`.

    Tokens leave at one of the blocks that decide them, of half of the images at the first, as in a progressive scope;
    where they are dithered those that stay are spread nearly evenly. Blocks are skipped anywhere, or, where
    `depth_choice` is nested, all that follow one: so weights learn to say early what they know, and an image that is
    easy can leave.
    """
    controlled = zip(get_args(ControlledGrain), stage.keep, strict=True)
    least = [keep if grain in config.grains else 1.0 for grain, keep in controlled]
    lowest = torch.tensor(least, device=draws.rates.device)
    rates = lowest + (1 - lowest) * draws.rates[:, :3]
    block = torch.arange(cost.depth, device=rates.device)
    depth = block < (rates[:, :1] * cost.depth).round() if config.rules.leaves else draws.depth < rates[:, :1]
    heads = draws.heads < rates[:, 1, None, None]
    decided = config.token_blocks(cost.depth)
    onset = decided.start + (len(decided) * (1.6 * draws.rates[:, 3:] - 0.8).clamp(min=0)).floor()
    noise = torch.logit(draws.tokens[:, :1])
    if config.dither:
        noise = ELASTIC_NOISE * noise + torch.tensor(dither(*cost.grid), device=rates.device)
    tokens = (torch.logit(rates[:, 2:], 1e-6)[:, :, None] + noise > 0) | (block < onset)[:, :, None]
    everything = draws.full[:, None]
    return Decisions(depth | everything, heads | everything[:, :, None], tokens | everything[:, :, None])


SURVIVAL = 0.02  # an image that executes a block with less probability does not


class Leaving:
    """Nested depth in training: nothing is drawn, since the loss after every block is known.

    A block is executed for whom it may be, and the probability (B,) of that is remembered for each block; so the
    expected loss and the expected cost are exact, and so are their gradients.
    """

    def __init__(self) -> None:
        self.survival: list[Tensor] = []

    def execute(self, depth: Tensor, temperature: float, full: Tensor) -> Tensor:
        """Whether (B,) images execute the next block, given its depth logits (B,)."""
        goes_on = torch.sigmoid(depth / max(temperature, 1e-3))
        before = self.survival[-1] if self.survival else torch.ones_like(goes_on)
        self.survival.append(torch.where(full, torch.ones_like(goes_on), before * goes_on))
        return self.survival[-1].detach() > SURVIVAL

    def probabilities(self) -> Tensor:
        """(B, L + 1) of leaving after so many blocks; those that were cut off count for the last one executed."""
        survival = torch.stack(self.survival, dim=1)
        survival = survival * (survival.detach() > SURVIVAL)
        ones, zeros = torch.ones_like(survival[:, :1]), torch.zeros_like(survival[:, :1])
        return torch.cat([ones, survival], dim=1) - torch.cat([survival, zeros], dim=1)

    def expected_macs(self, steps: Steps, cost: Cost) -> Tensor:
        """MACs (B,) as expected over leaving, of a walk that executed all that is not too unlikely."""
        device = self.survival[0].device
        gates = [one.to(device) if isinstance(one, HostGates) else one for one in steps.gates]
        blocks = torch.stack([cost.block(index, one) for index, one in enumerate(gates)], dim=1)
        return steps.macs - ((1 - torch.stack(self.survival, dim=1)) * blocks).sum(dim=1)


@dataclass
class Relaxed(AsksControllers):
    """Gumbel-sigmoid gates: hard forward, straight-through backward; temperature 0 means no noise.

    The controllers' logits get logistic noise of scale `temperature` and are cut at 0; gradients flow as if they had
    been passed through a sigmoid. leaving: given where depth is nested; then its gates are those of `Leaving`.
    """

    controllers: nn.ModuleList
    log_price: Tensor  # (B,)
    draws: Draws
    temperature: float
    leaving: Leaving | None = None
    difficulties: list[Tensor] = field(default_factory=list)  # (B,) of each block, as its controller predicts it
    relaxed: ClassVar[bool] = True

    def decide(self, state: State) -> Gates:
        said = _logits(self.controllers, state, self.log_price)
        depth, heads, tokens = said.depth, said.heads, said.tokens
        self.difficulties.append(said.difficulty)
        index, draws = state.index, self.draws
        if self.leaving is not None:
            d_hard = d_soft = self.leaving.execute(depth, self.temperature, draws.full).to(depth.dtype)
        else:
            d_hard, d_soft = self._gate(depth, draws.depth[:, index])
        h_hard, h_soft = self._gate(heads, draws.heads[:, index])
        if cast(Controller, self.controllers[index]).nested:
            h_hard, h_soft = chained(h_hard), chained(h_soft)
        else:
            h_hard = _at_least_one(h_hard, heads)
        active = state.active.to(depth)
        if tokens is None:
            kept = active
        else:
            t_hard, t_soft = self._gate(tokens, draws.tokens[:, index])
            kept = straight_through(t_hard, t_soft) * active
        full = draws.full
        return Gates(
            _where_full(full, straight_through(d_hard, d_soft)),
            _where_full(full, straight_through(h_hard, h_soft)),
            _where_full(full, kept),
        )

    def _gate(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        noisy = logits + self.temperature * torch.logit(uniform)
        return (noisy > 0).to(logits.dtype), torch.sigmoid(noisy)


@dataclass
class Sampled(AsksControllers):
    """Real decisions, sampled; remembers their log-probability and the expected cost, both differentiable.

    log_prob: (B,), of all decisions that were executed. expected_macs: (B,), of the blocks, in closed form from the
    probabilities along the sampled path; a token's probability carries on into later blocks.
    """

    controllers: nn.ModuleList
    log_price: Tensor  # (B,)
    draws: Draws
    temperature: float
    cost: Cost
    progressive: bool
    leaving: Leaving | None = None  # where depth is nested
    difficulties: list[Tensor] = field(default_factory=list)  # (B,) of each block, as its controller predicts it
    log_prob: Tensor = field(init=False)
    expected_macs: Tensor = field(init=False)
    _still_active: Tensor = field(init=False)  # (B, N) probability that a token is active

    def decide(self, state: State) -> Gates:
        index, draws = state.index, self.draws
        said = _logits(self.controllers, state, self.log_price)
        self.difficulties.append(said.difficulty)
        depth, heads = said.depth / self.temperature, said.heads / self.temperature
        tokens = None if said.tokens is None else said.tokens / self.temperature
        if index == 0:
            self.log_prob = torch.zeros_like(depth)
            self.expected_macs = torch.zeros_like(depth)
            self._still_active = depth.new_ones(state.active.shape)
        nested = cast(Controller, self.controllers[index]).nested
        if self.leaving is not None:
            executed = self.leaving.execute(said.depth, self.temperature, draws.full)
            depth_p, depth_log_prob = executed.to(depth.dtype), torch.zeros_like(depth)
        else:
            depth_p, executed = depth.sigmoid(), draws.depth[:, index] < depth.sigmoid()
            depth_log_prob = _log_prob(depth, executed)
        going_on = draws.heads[:, index] < heads.sigmoid()
        head_log_prob = _log_prob(heads, going_on)
        if nested:
            kept_heads, head_p = chained(going_on.to(depth.dtype)).bool(), chained(heads.sigmoid())
            reached = torch.cat([torch.zeros_like(kept_heads[:, :1]), kept_heads[:, :-1]], dim=1)
            head_log_prob = head_log_prob * reached  # head j is decided where j-1 is kept; the first never
        else:
            kept_heads, head_p = _at_least_one(going_on.to(depth.dtype), heads).bool(), heads.sigmoid()
        chosen = head_log_prob.sum(dim=1)
        active = state.active.to(depth.device)
        kept_tokens, token_p = active, self._still_active
        if tokens is not None:
            kept_tokens = (draws.tokens[:, index] < tokens.sigmoid()) & active
            chosen = chosen + (_log_prob(tokens, kept_tokens) * active).sum(dim=1)
            token_p = tokens.sigmoid() * self._still_active
        sampled = ~draws.full
        self.log_prob = self.log_prob + (depth_log_prob + chosen * executed) * sampled
        expected = self.cost.block(index, Gates(depth_p, head_p, token_p))
        if self.leaving is not None:
            expected = expected * self.leaving.survival[-1]
        self.expected_macs = self.expected_macs + expected * sampled
        if self.progressive:
            stays = depth_p[:, None]
            self._still_active = stays * token_p + (1 - stays) * self._still_active
        full = draws.full
        return Gates(executed | full, kept_heads | full[:, None], kept_tokens | full[:, None])


def _logits(controllers: nn.ModuleList, state: State, log_price: Tensor) -> Logits:
    """Dense logits of one block.

    Controllers read the residual stream without changing what it learns: gradients stop at their input.
    """
    x = state.x.detach()
    active = (state.active > 0).detach().to(x.device)
    controller = cast(Controller, controllers[state.index])
    return controller.logits(x, active, state.num_prefix_tokens, log_price, state.grid, through_difficulty=False)


def _at_least_one(hard: Tensor, logits: Tensor) -> Tensor:
    best = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(hard.dtype)
    return torch.where(hard.any(dim=1, keepdim=True), hard, best)


def _where_full(full: Tensor, gate: Tensor) -> Tensor:
    return torch.where(full if gate.ndim == 1 else full[:, None], torch.ones_like(gate), gate)


def _log_prob(logits: Tensor, kept: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none")
