"""Controllers as inference runs them: the formula of `controller`, in the fewest operations.

Each operation on a block's few numbers takes as long as a small matrix product, so: the linear layers that read one
context are one, what depends on the price alone is computed for all blocks at once, products run where the tokens are,
and the arithmetic on their results, a dozen numbers an image, on the host with numpy. Token query and keys are one
layer too: tokens are compared, not by a product of low rank for each, but with the direction that the query has among
them, one for an image. `native` takes the same numbers and loops over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from miaformer.engine.changes import Seen
from miaformer.engine.controller import DIFFICULTY_BOUND, LOGIT_BOUND, Controller, price_features
from miaformer.engine.decisions import Booleans
from miaformer.model.config import AdaptConfig

Array = NDArray[Any]
SQRT_HALF = 0.5**0.5


@dataclass(frozen=True)
class Folded:
    """One controller at given prices. J logits: of depth, of the H heads, and where tokens are decided the part of
    their logits that they share.
    """

    nested: bool
    decides_tokens: bool
    thresholds: Callable[[tuple[int, int]], NDArray[np.float32]]  # `Controller.thresholds`
    pooled: Tensor  # (2C, hidden)
    pooled_bias: Tensor  # (B or 1, hidden), the price's part in it
    outputs: Tensor  # (hidden, J + 1 or, where tokens are decided, J + 1 + C): see `logits`
    outputs_bias: Tensor
    bounds: Array  # (J + 1,), of logits and difficulty
    gain: Array  # (J,), what difficulty adds to each
    shift: Array  # (B or 1, J), what does not depend on the image

    @staticmethod
    @torch.no_grad()
    def of(controllers: Sequence[Controller], log_price: Tensor) -> list[Folded]:
        """log_price: (B,) or (1,)."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for c in controllers:
            weights += [c.gates.weight, c.difficulty.weight]
            biases += [c.gates.bias, c.difficulty.bias]
            if c.rank:  # its last row is a logit, which belongs before difficulty
                key = c.key.weight.t()[:, :, None]  # products are sums here: who counts those of images finds no others
                weights[-1:] = [c.query.weight[-1:], c.difficulty.weight, (key * c.query.weight[:-1]).sum(dim=1)]
                biases[-1:] = [c.query.bias[-1:], c.difficulty.bias, (key * c.query.bias[:-1, None]).sum(dim=(1, 2))]
        rows = [c.gates.out_features + 1 + (1 + c.embed_dim if c.rank else 0) for c in controllers]
        exact = torch.promote_types(weights[0].dtype, torch.float32)  # half precision could tip a decision
        outputs = (0.5 * torch.cat(weights).to(exact)).split(rows)  # of a context that comes doubled, see `logits`
        outputs_bias = torch.cat(biases).to(exact).split(rows)
        log_price = log_price.to(exact)
        features = price_features(log_price)  # (B, features)
        price = torch.stack([c.price.weight for c in controllers])
        pooled_bias = torch.stack([c.pooled.bias for c in controllers])[:, None]
        pooled_bias = pooled_bias + (features[:, None] * price[:, None]).sum(dim=3)  # (L, B, hidden)
        slopes, gains = (
            F.softplus(torch.stack([getattr(c, name) for c in controllers]).to(exact)).cpu().numpy()  # (L, 3)
            for name in ("slope", "gain")
        )
        prices = log_price.cpu().numpy()[:, None]
        made = []
        for index, c in enumerate(controllers):
            grains = [0] + [1] * (c.gates.out_features - 1) + [2] * bool(c.rank)
            made.append(
                Folded(
                    c.nested,
                    bool(c.rank),
                    c.thresholds,
                    c.pooled.weight.t().to(exact),
                    pooled_bias[index],
                    outputs[index].t(),
                    outputs_bias[index],
                    np.array([LOGIT_BOUND] * len(grains) + [DIFFICULTY_BOUND], dtype=prices.dtype),
                    gains[index][grains] * DIFFICULTY_BOUND,
                    np.array(c.keep_logits, dtype=prices.dtype)[grains] - prices * slopes[index][grains],
                )
            )
        return made

    def logits(self, pooled: Tensor, prefix: Tensor) -> tuple[Array, Tensor]:
        """Logits (B, J) of images whose active patch tokens and whose prefix tokens have these means, (B, C); and the
        direction (B, C) that their tokens are compared with, (B, 0) where none are.
        """
        seen = torch.layer_norm(torch.stack([pooled, prefix], dim=1), pooled.shape[1:]).flatten(1)
        read = torch.addmm(self.pooled_bias.expand(len(seen), -1), seen, self.pooled)
        # Twice GELU, in three operations of 3 us; on CPU that of PyTorch sets up oneDNN, which takes 30.
        context = torch.addcmul(read, read, torch.erf(read * SQRT_HALF))
        out = torch.addmm(self.outputs_bias, context, self.outputs)
        count = len(self.bounds)
        content = np.tanh(_numpy(out[:, :count]) / self.bounds)
        return content[:, :-1] * self.bounds[:-1] + content[:, -1:] * self.gain + self.shift, out[:, count:]

    def heads(self, logits: Array) -> Booleans:
        """The heads (B, H) that are kept rather than not, at least one. logits: (B, H), of heads."""
        kept: Booleans = logits > 0
        if self.nested:
            kept[:, 0] = True
            return np.logical_and.accumulate(kept, axis=1)
        kept[np.arange(len(kept)), logits.argmax(axis=1)] = True
        return kept

    @staticmethod
    def token_logits(tokens: Tensor, direction: Tensor, shared: Array) -> Array:
        """Logits (T,) of keeping tokens (T, C). direction: (T or 1, C); shared: (T or 1,)."""
        seen = torch.layer_norm(tokens, tokens.shape[1:])
        if len(direction) == 1:
            scores = torch.mm(seen, direction.t()).squeeze(1)
        else:
            scores = torch.bmm(seen.unsqueeze(1), direction.unsqueeze(2)).flatten()
        logits: Array = np.tanh(_numpy(scores) / LOGIT_BOUND) * LOGIT_BOUND + shared
        return logits

    @cached_property
    def native(self) -> tuple[Array, ...]:
        """What `miaformer.engine.native` is given of it."""
        products = (self.pooled, self.pooled_bias, self.outputs, self.outputs_bias)
        arrays = (*(_numpy(p.detach().float()) for p in products), self.bounds, self.gain, self.shift)
        return tuple(np.ascontiguousarray(a, np.float32) for a in arrays)


def _numpy(tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()


class Controllers(nn.ModuleList):
    """The controllers of all blocks, which remember how they were folded last while their weights stay."""

    _known: tuple[list[float], Seen, list[Folded]] | None = None

    @classmethod
    def of(cls, config: AdaptConfig, depth: int, embed_dim: int, num_heads: int) -> Self:
        """Untrained ones for a backbone of so many blocks, channels and heads; none where sizes are chosen instead."""
        if config.chooses_resolution:
            return cls()
        hidden = config.controller_hidden or min(32, max(8, embed_dim // 3))
        rank = config.controller_rank or min(16, max(4, embed_dim // 12))
        leaves, token_blocks = config.depth_choice == "nested", config.token_blocks(depth)
        return cls(
            Controller(
                embed_dim,
                num_heads,
                hidden,
                rank if index in token_blocks else 0,
                nested=config.head_choice == "nested",
                depth="depth" in config.grains and not (leaves and index == 0),  # nobody leaves before the first
                heads="heads" in config.grains,
                dithers=config.dither,
                leaves=leaves,
                even=config.token_choice == "even",
            )
            for index in range(depth)
        )

    def folded(self, log_price: Tensor) -> list[Folded]:
        prices, parameters = log_price.tolist(), self._now()
        known = self._known  # once: another thread may fold at other prices meanwhile
        if known is None or known[0] != prices or not known[1].still(parameters):
            known = (prices, Seen(parameters), Folded.of(cast(list[Controller], list(self)), log_price))
            self._known = known
        return known[2]

    def _now(self) -> list[Tensor]:
        """The parameters, whoever has put them there; `parameters()` takes ten times as long."""
        found: list[Tensor] = []
        left: list[nn.Module] = [self]
        while left:
            module = left.pop()
            found += [p for p in module._parameters.values() if p is not None]
            left += [m for m in module._modules.values() if m is not None]
        return found

    def train(self, mode: bool = True) -> Self:
        self._known = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_known"}
