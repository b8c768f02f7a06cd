"""A hard cap: each image carries the MACs it may still spend, and what would exceed them is not executed.

Fewer tokens first, then fewer heads, then no block at all. Nothing is trusted to stay below the cap: what is handed
to a block has been paid for, whatever the policy asked and whatever the image shows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from miaformer.engine.cost import Cost, Counts
from miaformer.engine.decisions import Booleans, HostGates


class RemainingMacs:
    """The MACs that each image of a batch may still spend.

    macs: (B,), the cap of each image; contexts: MACs that the policy takes for any image. They are set aside
    at once, with the patch embedding and the classifier: every image pays them whatever is decided.
    """

    def __init__(self, cost: Cost, macs: Counts, contexts: int) -> None:
        self.cost = cost
        set_aside = cost.fixed + contexts
        if (macs < set_aside).any():
            raise ValueError(
                f"cap={macs.min() / cost.backbone:.4g} is less than the {set_aside / cost.backbone:.4f} of the "
                "backbone's MACs that patch embedding, controllers and classifier take: give a larger cap"
            )
        self.left = macs - set_aside

    def affordable(self, index: int, scoring: Counts) -> Booleans:
        """Which images (B,) can pay for block `index` at its least, and `scoring` MACs (B,) before it."""
        can: Booleans = self.left >= self._least(index) + scoring
        return can

    def _least(self, index: int) -> Counts:
        """MACs (1,) of the smallest execution of block `index`: one head, one row."""
        heads, tokens = (np.zeros((1, n), dtype=bool) for n in (self.cost.num_heads, self.cost.num_patches))
        heads[:, 0] = True
        tokens[:, 0] = not self.cost.num_prefix_tokens
        return self.cost.of_host(index, HostGates(np.ones(1, dtype=bool), heads, tokens))

    def limit(self, index: int, gates: HostGates) -> HostGates:
        """`gates` cut down to what each image can still pay."""
        over = np.flatnonzero(self.cost.of_host(index, gates) > self.left)
        if not len(over):
            return gates
        depth, heads, tokens = gates.depth.copy(), gates.heads.copy(), gates.tokens.copy()
        for image in over.tolist():
            kept = self._fit(index, _of_image(gates, image), int(self.left[image]))
            depth[image], heads[image], tokens[image] = kept.depth[0], kept.heads[0], kept.tokens[0]
        return replace(gates, depth=depth, heads=heads, tokens=tokens)

    def _fit(self, index: int, gates: HostGates, left: int) -> HostGates:
        """The gates of one image (B = 1), cut down to `left` MACs."""
        kept_tokens = np.flatnonzero(gates.tokens[0])
        if gates.token_scores is not None:
            kept_tokens = kept_tokens[np.argsort(-gates.token_scores[0, kept_tokens], kind="stable")]
        kept_heads = np.flatnonzero(gates.heads[0])
        fewest_tokens = 0 if self.cost.num_prefix_tokens else 1

        def using(num_tokens: int, num_heads: int) -> HostGates:
            heads, tokens = np.zeros_like(gates.heads), np.zeros_like(gates.tokens)
            heads[:, kept_heads[:num_heads]] = True
            tokens[:, kept_tokens[:num_tokens]] = True
            return replace(gates, heads=heads, tokens=tokens)

        def fits(num_tokens: int, num_heads: int) -> bool:
            return int(self.cost.of_host(index, using(num_tokens, num_heads))[0]) <= left

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
        depth, heads, tokens = map(np.zeros_like, (gates.depth, gates.heads, gates.tokens))
        return HostGates(depth, heads, tokens)

    def pay(self, macs: Counts) -> None:
        """Take MACs (B,) of what was executed."""
        self.left = self.left - macs


def _of_image(gates: HostGates, image: int) -> HostGates:
    row = slice(image, image + 1)
    scores = None if gates.token_scores is None else gates.token_scores[row]
    return HostGates(gates.depth[row], gates.heads[row], gates.tokens[row], scores)
