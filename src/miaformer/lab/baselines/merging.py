"""Token merging: similar tokens become one, the same number in every image (ToMe, Bolya et al., ICLR 2023).

Between attention and MLP of each block, tokens are split in two halves, each of one half finds its most similar in the
other by the mean of its keys over heads, and the most similar pairs become their mean. Attention counts a merged token
as many times as tokens are in it. Not a policy: tokens are not skipped but mixed, so blocks are executed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.cost import Cost
from miaformer.model.model import MIAFormer
from miaformer.training.objective import Objective, Outcome, Step, Targets
from miaformer.vit.layers import (
    attention_input,
    attention_result,
    by_heads,
    for_each_head,
    mlp_input,
    mlp_result,
    normed_keys,
    normed_queries,
    query_key_value_layers,
    turns_rows,
)


def merged_logits(model: MIAFormer, images: Tensor, merges: Sequence[int]) -> Tensor:
    """Logits (B, classes) of the backbone with `merges[l]` tokens merged away in block l.

    The last block of a class-token model computes the class token's row alone, as ours does. Differentiable.
    Raises ValueError for a backbone without exactly one prefix token, and for one with rotary position embeddings.
    """
    backbone, cost = model.backbone, model.cost()
    check_one_prefix_token(cost)
    x, blocks = model.embed(images)
    if any(turns_rows(block) for block in blocks):
        raise ValueError("token merging: a merged token lies in no one place, which rotary position embeddings ask for")
    size = x.new_ones(x.shape[:2])
    for index, block in enumerate(blocks):
        x, size = _block(block, x, size, merges[index], cost.trims(index))
    return backbone.forward_head(backbone.norm(x))


def check_one_prefix_token(cost: Cost) -> None:
    if cost.num_prefix_tokens != 1:
        raise ValueError(f"token merging keeps one class token apart; this backbone has {cost.num_prefix_tokens}")


def _block(block: Any, x: Tensor, size: Tensor, merge: int, class_token_only: bool) -> tuple[Tensor, Tensor]:
    """x: (B, n, C); size: (B, n), how many tokens each stands for."""
    attn, y = block.attn, attention_input(block, x)
    if class_token_only:
        x = x[:, :1]
    queries = y[:, :1] if class_token_only else y
    q, k, v = (
        by_heads(attn, F.linear(rows, *layer))
        for rows, layer in zip((queries, y, y), query_key_value_layers(attn), strict=True)
    )
    q, k, v = normed_queries(block, q), normed_keys(block, k), for_each_head(attn, v)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None, :].to(q.dtype))
    out = attn.proj(attn.norm(out.transpose(1, 2).flatten(2)))
    x = x + block.drop_path1(attention_result(block, out))
    if merge and not class_token_only:
        x, size = _merged(x, size, k.mean(dim=1), merge)
    return x + block.drop_path2(mlp_result(block, block.mlp(mlp_input(block, x)))), size


def _merged(x: Tensor, size: Tensor, metric: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """The `merge` most similar pairs become one token each; the class token, the first, is kept apart.

    x: (B, n, C); size: (B, n); metric: (B, n, D), by which tokens are compared.
    """
    with torch.no_grad():
        metric = F.normalize(metric, dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        similarity[:, 0] = float("-inf")
        best, partner = similarity.max(dim=-1)
        order = best.argsort(dim=1, descending=True)
        leaving, staying = order[:, :merge], order[:, merge:].sort(dim=1).values
        into = partner.gather(1, leaving)
    weighted = torch.cat([x * size[..., None], size[..., None]], dim=-1)
    from_half, to_half = weighted[:, ::2], weighted[:, 1::2]

    def rows(half: Tensor, index: Tensor) -> Tensor:
        return half.gather(1, index[..., None].expand(-1, -1, half.shape[-1]))

    to_half = to_half.scatter_add(1, into[..., None].expand(-1, -1, weighted.shape[-1]), rows(from_half, leaving))
    joined = torch.cat([rows(from_half, staying), to_half], dim=1)
    return joined[..., :-1] / joined[..., -1:], joined[..., -1]


def merged_macs(cost: Cost, merges: Sequence[int]) -> int:
    """MACs of an image, finding the pairs included."""
    n, dim, total = 1 + cost.num_patches, cost.embed_dim, cost.fixed
    for index, merge in enumerate(merges):
        read = 1 if cost.trims(index) else n
        merge = 0 if cost.trims(index) else merge
        total += 2 * n * dim * cost.key_channels(index) + 2 * read * dim * dim + 2 * read * n * dim
        if merge:
            total += (n - n // 2) * (n // 2) * cost.head_dim
            n -= merge
        total += (1 if cost.trims(index) else n) * (cost.mlp_inputs + 1) * dim * cost.mlp_hidden
    return total


def merges_drawn(cost: Cost, rate: float) -> list[int]:
    """Merges of each block at a rate from 0, none, to 1, as many as a block may: half of its tokens.

    As in ToMe the same number in every block, as far as there are so many; what is left over goes to the first ones.
    """
    blocks = cost.depth - cost.trims_last_block
    total = round(rate * blocks * (cost.num_patches // 2))
    merges, rows = [], 1 + cost.num_patches
    for index in range(blocks):
        merge = min(total // blocks + (index < total % blocks), (rows - 1) // 2)
        merges.append(merge)
        rows -= merge
    return [*merges, 0][: cost.depth]


def merges_for(cost: Cost, budget: float) -> list[int]:
    """How many tokens to merge in each block for MACs nearest to `budget` of the backbone's.

    Raises ValueError where merging all it may still costs more.
    """
    check_one_prefix_token(cost)
    most = cost.depth * (cost.num_patches // 2)
    candidates = [merges_drawn(cost, total / most) for total in range(most + 1)]
    merges = min(candidates, key=lambda merges: abs(merged_macs(cost, merges) - budget * cost.backbone))
    fraction = merged_macs(cost, merges) / cost.backbone
    if fraction > budget + 0.01:
        raise ValueError(f"budget={budget:.4g} is below {fraction:.3f}, the least that token merging can spend")
    return merges


class MergingObjective(Objective):
    """The backbone with as many tokens merged as each step draws."""

    def outcome(self, images: Tensor, targets: Targets, step: Step, cost: Cost) -> Outcome:
        merges = merges_drawn(cost, float(step.draws.shared[0]))
        logits = merged_logits(self.model, images, merges)
        return Outcome.of_all_alike(targets.loss(logits), logits, targets, merged_macs(cost, merges) / cost.backbone)
