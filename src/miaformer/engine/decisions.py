"""What is executed: depth, heads and tokens, per image and block.

Shapes of one thing. `Decisions` hold a whole forward pass and are always boolean. `Gates` hold one block;
they are boolean where decisions are carried out, and floating point where training differentiates through them.
`HostGates` are boolean gates on the host, where the engine plans with them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MlpWidth = Literal["coupled", "hidden", "full"]
TokenScope = Literal["progressive", "per_block"]
HeadChoice = Literal["nested", "subset"]
DepthChoice = Literal["nested", "any"]


@dataclass(frozen=True)
class Rules:
    """Which decisions there can be (docs/concepts.md)."""

    depth_choice: DepthChoice = "any"
    head_choice: HeadChoice = "nested"
    token_scope: TokenScope = "progressive"

    @property
    def leaves(self) -> bool:
        """Whether an image that skips a block skips all that follow: early exit."""
        return self.depth_choice == "nested"

    @property
    def nested_heads(self) -> bool:
        """Whether the kept heads are always the first ones."""
        return self.head_choice == "nested"

    @property
    def progressive(self) -> bool:
        """Whether a token that was skipped once stays skipped."""
        return self.token_scope == "progressive"


@dataclass(frozen=True)
class Gates:
    """The decisions of one block: 1 executes, 0 skips. Boolean, or floating point in training."""

    depth: Tensor  # (B,)
    heads: Tensor  # (B, H)
    tokens: Tensor  # (B, N)
    token_scores: Tensor | None = None  # (B, N): what a cap drops first, lowest score first; None: the last tokens

    @staticmethod
    def full(batch: int, num_heads: int, num_patches: int, device: torch.device | str = "cpu") -> Gates:
        def ones(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=torch.bool, device=device)

        return Gates(ones(batch), ones(batch, num_heads), ones(batch, num_patches))


@dataclass(frozen=True)
class Decisions:
    """What to execute in every block, per image. B images, L blocks, H heads, N patch tokens."""

    depth: Tensor  # (B, L) bool
    heads: Tensor  # (B, L, H) bool
    tokens: Tensor  # (B, L, N) bool

    def __post_init__(self) -> None:
        for field, ndim in (("depth", 2), ("heads", 3), ("tokens", 3)):
            value = getattr(self, field)
            if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim != ndim:
                found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
                raise TypeError(f"Decisions.{field} must be a bool tensor with {ndim} dimensions, got {found}")
        if not self.depth.shape == self.heads.shape[:2] == self.tokens.shape[:2]:
            shapes = {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}
            raise ValueError(f"Decisions disagree on (images, blocks): {shapes}")

    @staticmethod
    def full(batch: int, depth: int, num_heads: int, num_patches: int) -> Decisions:
        return Decisions(
            torch.ones(batch, depth, dtype=torch.bool),
            torch.ones(batch, depth, num_heads, dtype=torch.bool),
            torch.ones(batch, depth, num_patches, dtype=torch.bool),
        )

    def block(self, index: int) -> Gates:
        return Gates(self.depth[:, index], self.heads[:, index], self.tokens[:, index])

    def __len__(self) -> int:
        return self.depth.shape[0]

    def __getitem__(self, images: slice | Tensor | list[int]) -> Decisions:
        """The decisions of some of the images."""
        return Decisions(self.depth[images], self.heads[images], self.tokens[images])

    def to(self, device: torch.device | str) -> Decisions:
        return Decisions(self.depth.to(device), self.heads.to(device), self.tokens.to(device))


Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class HostGates:
    """Boolean gates of one block where Python can count them. What to compute is decided on the host, block by block;
    there the small arrays of decisions are numpy's, whose operations take a third of the time of torch's.
    """

    depth: Booleans  # (B,)
    heads: Booleans  # (B, H)
    tokens: Booleans  # (B, N)
    token_scores: NDArray[Any] | None = None  # (B, N)
    is_effective: bool = False  # whether `effective` would change nothing

    @staticmethod
    def of(gates: Gates | HostGates) -> HostGates:
        """The same gates. On CPU no copy, from other devices one."""
        if isinstance(gates, HostGates):
            return gates
        if gates.depth.device.type == "cpu" == gates.tokens.device.type:
            depth, heads, tokens = gates.depth.numpy(), gates.heads.numpy(), gates.tokens.numpy()
        else:
            together = torch.cat([gates.depth[:, None], gates.heads, gates.tokens], dim=1).cpu().numpy()
            num_heads = gates.heads.shape[1]
            depth, heads, tokens = together[:, 0], together[:, 1 : 1 + num_heads], together[:, 1 + num_heads :]
        scores = gates.token_scores
        return HostGates(depth, heads, tokens, None if scores is None else _numpy(scores))

    def to(self, device: torch.device | str) -> Gates:
        """Depth, heads and tokens as tensors. On CPU no copy."""
        depth, heads, tokens = (torch.from_numpy(part) for part in (self.depth, self.heads, self.tokens))
        return Gates(depth.to(device), heads.to(device), tokens.to(device))

    def effective(self, active: Booleans, num_prefix_tokens: int, rules: Rules) -> HostGates:
        """What the gates mean, once the semantics' rules are applied. Idempotent.

        Only active tokens can be kept; nested heads are the first k, k the number of heads asked for; an executed
        block keeps at least one head; without any row left (no prefix tokens, no patch token kept) there is nothing
        to execute; and a skipped block executes no head and no token.

        active: (B, N), the patch tokens that may be kept (all of them, or in progressive scope what is left).
        """
        if self.is_effective:
            return self
        tokens = self.tokens & active
        depth = self.depth if num_prefix_tokens else self.depth & tokens.any(axis=1)
        if rules.nested_heads:
            heads = np.arange(self.heads.shape[1]) < np.maximum(self.heads.sum(axis=1), 1)[:, None]
        else:
            heads = self.heads.copy()
            heads[:, 0] |= ~self.heads.any(axis=1)
        if not depth.all():
            heads, tokens = heads & depth[:, None], tokens & depth[:, None]
        return HostGates(depth, heads, tokens, self.token_scores, True)


def from_host(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """A plan made on the host, where the device reads it. CUDA takes it from pinned memory, and nobody waits for it."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


Logits = TypeVar("Logits", Tensor, NDArray[Any])


def likelier_heads(logits: Logits, nested: bool) -> Logits:
    """The heads (B, H) bool that are kept rather than not, at least one. logits: (B, H), on the host or as a tensor.

    nested: head j is kept only if head j-1 is.
    """
    kept = logits > 0
    if nested:
        kept[:, 0] = True
        return kept.cumprod(1) > 0
    kept[list(range(len(kept))), logits.argmax(1)] = True
    return kept


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Gates whose value is that of `hard`, exactly, and whose gradient is that of `soft` (Bengio et al. 2013)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def chained(kept: Tensor) -> Tensor:
    """Nested heads: head j is kept if all before it are; the first always is. kept: (B, H), numbers."""
    return torch.cat([torch.ones_like(kept[:, :1]), kept[:, 1:].cumprod(dim=1)], dim=1)
