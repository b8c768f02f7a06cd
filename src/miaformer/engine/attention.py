"""Attention behind two functions: over dense masked tensors, and over packed rows of images of different lengths.

Which backend runs is decided here and nowhere else: FlashAttention's variable-length kernel for half precision on
CUDA, `scaled_dot_product_attention` over runs of equally long images everywhere else.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.decisions import from_host


def attend_masked(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention among the kept keys.

    q, k, v: (B, H, rows, D); keys: (B, rows) bool, or gates of 0 and 1 that gradients reach -> (B, H, rows, D).
    Where an image keeps no key the result is finite and meaningless: its rows are not kept either.
    """
    kept = keys if keys.dtype == torch.bool else keys.detach() > 0
    mask = None
    if not bool(kept.all()):
        mask = (kept | ~kept.any(dim=1, keepdim=True))[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if not keys.requires_grad:
        return out
    with_gradient: Tensor = _EffectOfGates.apply(keys, q.detach(), k.detach(), v.detach(), mask, out)
    return with_gradient


class _EffectOfGates(torch.autograd.Function):
    """`out` as it is; a key's gate gets the gradient of what keeping the key rather than not does to it.

    For a skipped key that is the weight it would have, not the derivative of the masked softmax: the latter grows with
    the exponential of the key's score, and one such key drowned all other gradients of a step (by 1e5, measured).
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.gate_dtype = gates.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        among_kept = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        above = scores - among_kept.logsumexp(dim=-1, keepdim=True)
        weight = above.exp() if mask is None else torch.where(mask, above.exp(), above.sigmoid())
        # With key j, output i moves towards its value, by the key's weight: w_ij (v_j - out_i).
        effect = grad @ v.transpose(-2, -1) - (grad * out).sum(dim=-1, keepdim=True)
        return (weight * effect).sum(dim=(1, 2)).to(ctx.gate_dtype), None, None, None, None, grad


def attend_packed(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """Attention of each image's rows among themselves.

    q: (Tq, H, D); k, v: (Tk, H, D); lengths of the images, in rows -> (Tq, H, D).
    """
    if _has_varlen(q):
        return _attend_varlen(q, k, v, q_lengths, k_lengths)
    outputs = []
    q_start = k_start = 0
    for (q_length, k_length), run in groupby(zip(q_lengths, k_lengths, strict=True)):
        images = len(list(run))
        q_stop, k_stop = q_start + images * q_length, k_start + images * k_length
        out = F.scaled_dot_product_attention(
            *(
                rows.unflatten(0, (images, -1)).transpose(1, 2)
                for rows in (q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop])
            )
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        q_start, k_start = q_stop, k_stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _has_varlen(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    def offsets(lengths: list[int]) -> Tensor:
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return from_host(ends, q.device)

    out = varlen_attn(q, k, v, offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths))
    assert isinstance(out, Tensor)
    return out
