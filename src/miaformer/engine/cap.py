"""A hard cap: each image carries the MACs it may still spend, and what would exceed them is not executed.

Fewer tokens first, then fewer heads, then no block at all. Nothing is trusted to stay below the cap: what is handed
to a block has been paid for, whatever the policy asked and whatever the image shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from miaformer.cost import Cost
from miaformer.decisions import Gates


class Purse:
    """What each of a batch's images may still spend, in MACs.

    macs: (B,) int64, the cap of each image; contexts: MACs that the policy takes for any image. They are set aside
    at once, with the patch embedding and the classifier: every image pays them whatever is decided.
    """

    def __init__(self, cost: Cost, macs: Tensor, contexts: int) -> None:
        self.cost = cost
        set_aside = cost.fixed + contexts
        if bool((macs < set_aside).any()):
            raise ValueError(
                f"cap={macs.min().item() / cost.backbone:.4g} is less than the {set_aside / cost.backbone:.4f} of the "
                "backbone's MACs that patch embedding, controllers and classifier take: give a larger cap"
            )
        self.left = macs - set_aside

    def affordable(self, index: int, scoring: Tensor) -> Tensor:
        """Which images (B,) bool can pay for block `index` at its least, and `scoring` MACs (B,) before it."""
        return self.left >= self._least(index) + scoring

    def _least(self, index: int) -> Tensor:
        """MACs (1,) of the smallest execution of block `index`: one head, one row."""
        return self.cost.block(index, _first(self.cost, [1], [0 if self.cost.num_prefix_tokens else 1], self.left))

    def limit(self, index: int, gates: Gates) -> Gates:
        """`gates` cut down to what each image can still pay."""
        over = (self.cost.block(index, gates) > self.left).nonzero().flatten()
        if len(over) == 0:
            return gates
        depth, heads, tokens = gates.depth.clone(), gates.heads.clone(), gates.tokens.clone()
        for image in over.tolist():
            part = _of_image(gates, image)
            kept = self._fit(index, part, int(self.left[image]))
            depth[image], heads[image], tokens[image] = kept.depth[0], kept.heads[0], kept.tokens[0]
        return replace(gates, depth=depth, heads=heads, tokens=tokens)

    def _fit(self, index: int, gates: Gates, left: int) -> Gates:
        """The gates of one image (B = 1), cut down to `left` MACs."""
        kept_tokens = gates.tokens[0].nonzero().flatten()
        if gates.token_scores is not None:
            kept_tokens = kept_tokens[gates.token_scores[0, kept_tokens].argsort(descending=True, stable=True)]
        kept_heads = gates.heads[0].nonzero().flatten()
        fewest_tokens = 0 if self.cost.num_prefix_tokens else 1

        def using(num_tokens: int, num_heads: int) -> Gates:
            heads, tokens = torch.zeros_like(gates.heads), torch.zeros_like(gates.tokens)
            heads[:, kept_heads[:num_heads]] = True
            tokens[:, kept_tokens[:num_tokens]] = True
            return replace(gates, heads=heads, tokens=tokens)

        def fits(num_tokens: int, num_heads: int) -> bool:
            return int(self.cost.block(index, using(num_tokens, num_heads))) <= left

        num_heads, num_tokens = len(kept_heads), len(kept_tokens)
        if fits(fewest_tokens, num_heads):
            low, high = fewest_tokens, num_tokens  # fits at low, does not at high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle, num_heads) else (low, middle)
            return using(low, num_heads)
        for fewer in range(num_heads - 1, 0, -1):
            if fits(fewest_tokens, fewer):
                return using(fewest_tokens, fewer)
        return Gates(torch.zeros_like(gates.depth), torch.zeros_like(gates.heads), torch.zeros_like(gates.tokens))

    def pay(self, macs: Tensor) -> None:
        """Take MACs (B,) of what was executed."""
        self.left = self.left - macs


def _first(cost: Cost, heads: list[int], tokens: list[int], like: Tensor) -> Gates:
    """Gates keeping the first heads and tokens, as many as said for each image."""
    depth = torch.ones(len(heads), dtype=torch.bool, device=like.device)
    kept_heads = torch.arange(cost.num_heads, device=like.device) < like.new_tensor(heads)[:, None]
    kept_tokens = torch.arange(cost.num_patches, device=like.device) < like.new_tensor(tokens)[:, None]
    return Gates(depth, kept_heads, kept_tokens)


def _of_image(gates: Gates, image: int) -> Gates:
    row = slice(image, image + 1)
    scores = None if gates.token_scores is None else gates.token_scores[row]
    return Gates(gates.depth[row], gates.heads[row], gates.tokens[row], scores)
