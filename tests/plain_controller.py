"""A controller's formula as one writes it down, layer by layer: what `controller.Formula` has to come to."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.controller import DIFFICULTY_BOUND, KEEP_LOGIT, LOGIT_BOUND, Controller, price_features


class Plain(NamedTuple):
    depth: Tensor  # (B,)
    heads: Tensor  # (B, H)
    tokens: Tensor | None  # (B, N), without thresholds
    difficulty: Tensor  # (B,)
    shared: Tensor | None  # (B,), the part of token logits that all tokens of an image have


def _bounded(logits: Tensor, bound: float = LOGIT_BOUND) -> Tensor:
    return bound * torch.tanh(logits / bound)


def plain(controller: Controller, x: Tensor, active: Tensor, num_prefix_tokens: int, log_price: Tensor) -> Plain:
    """x: (B, P+N, C); active: (B, N) bool; log_price: (B,)."""
    patches, dim = x[:, num_prefix_tokens:], x.shape[-1:]
    weight = active.to(x.dtype).unsqueeze(-1)
    pooled = (patches * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    prefix = x[:, :num_prefix_tokens].mean(dim=1) if num_prefix_tokens else pooled
    read = torch.cat([F.layer_norm(pooled, dim), F.layer_norm(prefix, dim)], dim=1)
    context = F.gelu(controller.pooled(read) + controller.price(price_features(log_price)))
    difficulty = _bounded(controller.difficulty(context).squeeze(1), DIFFICULTY_BOUND)
    moved = F.softplus(controller.gain) * difficulty[:, None] - F.softplus(controller.slope) * log_price[:, None]
    gates = _bounded(controller.gates(context))
    keep_depth, keep_heads, _ = controller.keep_logits
    depth, heads = gates[:, 0] + keep_depth + moved[:, 0], gates[:, 1:] + keep_heads + moved[:, 1:2]
    if not controller.rank:
        return Plain(depth, heads, None, difficulty, None)
    query = controller.query(context)
    shared = KEEP_LOGIT + _bounded(query[:, -1]) + moved[:, 2]
    keys = controller.key(F.layer_norm(patches, dim))
    tokens = _bounded((keys * query[:, None, :-1]).sum(dim=-1)) + shared[:, None]
    return Plain(depth, heads, tokens, difficulty, shared)
