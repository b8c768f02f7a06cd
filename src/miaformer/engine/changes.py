"""Whether weights are still those that something was made from.

A tensor counts its changes in place, but fused optimisers change it without counting, and what is made in inference
mode counts nothing. So every step of any optimiser of PyTorch's counts as a change of everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0  # of all optimisers in this process


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


class Seen:
    """Tensors as they are now. They are kept: while they live, no other can be taken for one of them."""

    __slots__ = ("_identities", "_tensors", "_versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._identities, self._versions = list(map(id, tensors)), versions(tensors)

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same, unchanged."""
        return self._identities == list(map(id, tensors)) and self._versions == versions(tensors)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was changed, as far as it counts, and how often any optimiser has stepped."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors] + [_steps]
