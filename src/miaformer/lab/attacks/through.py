"""Gradients through decisions: what an attacker who knows the gates differentiates.

A model that skips gives a piecewise loss: where decisions flip it jumps, and between the jumps its gradient says
nothing of them. So decisions are taken as the model makes them, and carried out masked by gates whose value is the
decision and whose gradient is that of a sigmoid of the controller's logit (straight-through, Bengio et al. 2013): the
output is the deployed model's own, to rounding, and the gradient leads across the jumps too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from miaformer.engine.controller import Controller
from miaformer.engine.decisions import Decisions, Gates, chained, likelier_heads, straight_through
from miaformer.engine.walk import State
from miaformer.model.policy import AsksControllers


@dataclass
class Through(AsksControllers):
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
    relaxed: ClassVar[bool] = True
    _stays: Tensor | None = field(init=False, default=None, repr=False)  # (B,) probability, where images leave

    def decide(self, state: State) -> Gates:
        controller = cast(Controller, self.controllers[state.index])
        x = state.x
        taken = self.decisions.to(x.device).block(state.index)
        active = state.active.to(x)
        can = active > 0
        log_price = self.log_price.to(x).expand(len(x))
        said = controller.logits(
            x, can.detach(), state.num_prefix_tokens, log_price, state.grid, through_difficulty=True
        )
        stays, heads = (torch.sigmoid(logits / self.temperature) for logits in (said.depth, said.heads))
        if self.leaves:
            stays = self._stays = stays if self._stays is None else self._stays * stays
        if controller.nested:
            heads = chained(heads)
        # A skipped block shows no head and no token in a trace: its gradient asks what it would have executed.
        likely = can if said.tokens is None else (said.tokens > 0) & can
        kept = _where(taken.depth, taken.tokens, likely)  # less than is active where a cap took some
        tokens = kept.to(x)
        if said.tokens is not None:
            tokens = straight_through(kept, torch.sigmoid(said.tokens / self.temperature))
        kept_heads = _where(taken.depth, taken.heads, likelier_heads(said.heads.detach(), controller.nested))
        return Gates(straight_through(taken.depth, stays), straight_through(kept_heads, heads), tokens * active)


def _where(images: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for the images (B,) that are True, `no` for the others; (B, n) each."""
    return torch.where(images[:, None], yes, no)
