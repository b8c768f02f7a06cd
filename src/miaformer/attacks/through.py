"""Gradients through decisions: what an attacker who knows the gates differentiates.

A model that skips gives a piecewise loss: where decisions flip it jumps, and between the jumps its gradient says
nothing of them. So decisions are taken as the model makes them, and carried out masked by gates whose value is the
decision and whose gradient is that of a sigmoid of the controller's logit (straight-through, Bengio et al. 2013): the
output is the deployed model's own, to rounding, and the gradient leads across the jumps too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from miaformer.controller import Controller
from miaformer.cost import Cost
from miaformer.decisions import Decisions, Gates
from miaformer.engine.walk import State


@dataclass
class Through:
    """Carries decisions out, with gradients to the controllers that would make them, and through these to the image.

    decisions: of a trace, (B, L), (B, L, H), (B, L, N), whoever made them, under a cap or drawn. log_price: (B,) or
    (1,). temperature: of the sigmoids; the higher, the farther a decision may be from its threshold and still feel a
    gradient. leaves: whether an image that skips a block skips all that follow.
    """

    decisions: Decisions
    controllers: nn.ModuleList
    log_price: Tensor
    temperature: float
    leaves: bool
    _stays: Tensor | None = field(init=False, default=None, repr=False)  # (B,) probability, where images leave

    def decide(self, state: State) -> Gates:
        controller = cast(Controller, self.controllers[state.index])
        x, prefix = state.x, state.num_prefix_tokens
        taken = self.decisions.block(state.index)
        executed = taken.depth.to(x.device)
        active = state.active.to(x)
        log_price = self.log_price.to(x).expand(len(x))
        context = controller.context(x, (active > 0).detach(), prefix, log_price)
        shift = controller.shift(controller.predicted_difficulty(context), log_price)
        depth, heads = controller.depth_and_heads(context, shift)
        soft_depth = torch.sigmoid(depth / self.temperature)
        if self.leaves:
            soft_depth = soft_depth if self._stays is None else self._stays * soft_depth
            self._stays = soft_depth
        soft_heads = torch.sigmoid(heads / self.temperature)
        if controller.nested:
            soft_heads = torch.cat([torch.ones_like(heads[:, :1]), soft_heads[:, 1:].cumprod(dim=1)], dim=1)
        # A skipped block shows no head and no token in a trace: its gradient asks what it would have executed.
        hard_heads = _where(executed, taken.heads.to(x.device), controller.most_likely_heads(heads))
        tokens = active
        if controller.rank:
            query, shared = controller.token_query(context, shift)
            shared = shared[:, None] + torch.tensor(controller.thresholds(state.grid)).to(shared)
            logits = controller.token_logits(x[:, prefix:], query[:, None], shared)
            hard = _where(executed, taken.tokens.to(x.device), (logits > 0) & (active > 0))
            tokens = _straight_through(hard, torch.sigmoid(logits / self.temperature)) * active
        elif not bool(executed.all()) or not torch.equal(taken.tokens.to(x.device), active > 0):  # a cap took some
            tokens = _where(executed, taken.tokens.to(x.device), active > 0).to(x) * active
        return Gates(_straight_through(executed, soft_depth), _straight_through(hard_heads, soft_heads), tokens)

    def context_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).context_macs

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return cast(Controller, self.controllers[index]).token_score_macs


def _where(images: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for the images (B,) that are True, `no` for the others; (B, n) each."""
    return torch.where(images[:, None], yes, no)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.to(soft) + (soft - soft.detach())  # exactly `hard`: the bracket is 0
