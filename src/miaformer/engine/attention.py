"""Attention behind two functions: over dense masked tensors, and over packed rows of images of different lengths.

Which backend runs is decided here and nowhere else: FlashAttention's variable-length kernel for half precision on
CUDA, `scaled_dot_product_attention` over runs of equally long images everywhere else.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_masked(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention among the kept keys.

    q, k, v: (B, H, rows, D); keys: (B, rows) bool, or gates in [0, 1] that gradients reach -> (B, H, rows, D).
    A kept key gate of 1 and a skipped one of 0 give the same output either way. Where an image keeps no key the
    result is finite and meaningless: its rows are not kept either.
    """
    if keys.dtype == torch.bool:
        if bool(keys.all()):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        mask = keys | ~keys.any(dim=1, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)
    # Gates in the softmax's sum, not in its logits: log(0) has no gradient, and a skipped key should learn what
    # attending to it would have done.
    gate = keys[:, None, None, :]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    kept = scores.masked_fill(gate <= 0, float("-inf")).amax(dim=-1, keepdim=True)
    kept = torch.where(kept.isfinite(), kept, torch.zeros_like(kept)).detach()
    weights = (scores - kept).clamp(max=20.0).exp() * gate
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return F.dropout(weights, dropout) @ v


def attend_packed(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """Attention of each image's rows among themselves.

    q: (Tq, H, D); k, v: (Tk, H, D); lengths of the images, in rows -> (Tq, H, D).
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
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


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    def offsets(lengths: list[int]) -> Tensor:
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(q.device, non_blocking=True)

    out = varlen_attn(q, k, v, offsets(q_lengths), offsets(k_lengths), max(q_lengths), max(k_lengths))
    assert isinstance(out, Tensor)
    return out
