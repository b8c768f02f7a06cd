"""What is executed: depth, heads and tokens, per image and block.

Two shapes of one thing. `Decisions` hold a whole forward pass and are always boolean. `Gates` hold one block;
they are boolean where decisions are carried out, and floating point where training differentiates through them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

MlpWidth = Literal["coupled", "hidden", "full"]
TokenScope = Literal["progressive", "per_block"]
HeadChoice = Literal["nested", "subset"]


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


def effective(gates: Gates, active: Tensor, num_prefix_tokens: int, head_choice: HeadChoice) -> Gates:
    """What boolean gates mean, once the semantics' rules are applied. Idempotent.

    Only active tokens can be kept; nested heads are the first k, k the number of heads asked for; an executed
    block keeps at least one head; without any row left (no prefix tokens, no patch token kept) there is nothing to
    execute; and a skipped block executes no head and no token.

    active: (B, N) bool, the patch tokens that may be kept (all of them, or in progressive scope what is left).
    """
    tokens = gates.tokens & active
    depth = gates.depth if num_prefix_tokens else gates.depth & tokens.any(dim=1)
    if head_choice == "nested":
        count = gates.heads.sum(dim=1, keepdim=True).clamp(min=1)
        heads = torch.arange(gates.heads.shape[1], device=count.device) < count
    else:
        heads = gates.heads.clone()
        heads[:, 0] |= ~gates.heads.any(dim=1)
    executed = depth[:, None]
    return Gates(depth, heads & executed, tokens & executed, gates.token_scores)
