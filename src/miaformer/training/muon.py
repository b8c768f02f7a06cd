"""Muon for the weight matrices of blocks, AdamW for all other parameters, as one optimiser.

Muon (Jordan et al. 2024) makes every singular value of a matrix's momentum one before it steps. timm's and PyTorch's do
that in bfloat16 whatever the device, which a processor without it emulates: 71 ms a step of the `digits` ViT against 7
here, in the parameters' own precision and all matrices of a shape at once. The iteration itself is timm's. Processes
that train together share this work: it was 54 of the 396 ms of a step of `cifar10-small` in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor
from torch.optim import AdamW, Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration, by Jordan et al.
_ITERATIONS = 5


class MuonAdamW(Optimizer):
    """Groups of parameters with `matrices` true get Muon, the others (fused) AdamW.

    Steps of both have the size of AdamW's at the same learning rate (Liu et al. 2025: 0.2 root mean square).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        groups = list(groups)
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "matrices": False})
        others = [group for group in self.param_groups if not group["matrices"]]
        self._adamw = AdamW(others, lr=lr, betas=(0.9, 0.95), fused=True) if others else None
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """AdamW works on the groups and the state of this optimiser, so that they are saved and scheduled as one."""
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, without a closure."""
        for group in self.param_groups:
            if group["matrices"]:
                self._muon(group)
        if self._adamw is not None:
            self._adamw.step()

    def _muon(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike.setdefault((matrix.shape, matrix.device), []).append(matrix)
        for (shape, _), matrices in alike.items():
            updates = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
            directions = _shared_by_processes(_orthogonal, updates)
            step_size = group["lr"] * get_lr_scale(shape, "match_rms_adamw")
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-step_size)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(matrix.grad, 1 - momentum)  # type: ignore[arg-type]
        return average


def _orthogonal(updates: Tensor) -> Tensor:
    """Matrices (M, rows, columns) with every singular value near one."""
    return zeropower_via_newtonschulz(updates, _ITERATIONS, [_QUINTIC], dtype=updates.dtype)


# torch's new name for it, where there is one: the old one warns of it.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _shared_by_processes(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function(rows), for one that treats each of the rows (M, ...) by itself: each process does as many of them.

    All processes hold the same rows. What cannot be shared evenly each does alone.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1 or len(rows) % processes:
        return function(rows)
    own = function(rows.chunk(processes)[dist.get_rank()]).contiguous()
    whole = torch.empty_like(rows)
    _gather(whole, own)
    return whole
