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
    return out + _effect_of_gates(q, k, v, keys, mask, out)


def _effect_of_gates(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """Zero, with the gradient by each key's gate that keeping the key rather than not has on the output.

    For a skipped key that is the weight it would have, not the derivative of the masked softmax: the latter grows with
    the exponential of the key's score, and one such key drowned all other gradients of a step (by 1e5, measured).
    """
    with torch.no_grad():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        among_kept = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        log_total = among_kept.logsumexp(dim=-1, keepdim=True)
        weight = (scores - log_total).exp()  # of kept keys
        if mask is not None:
            weight = torch.where(mask, weight, (scores - torch.logaddexp(log_total, scores)).exp())
    change = weight * (gates - gates.detach())[:, None, None, :]
    return change @ v.detach() - change.sum(dim=-1, keepdim=True) * out.detach()


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
