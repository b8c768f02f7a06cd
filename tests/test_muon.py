"""The optimiser of matrices: orthogonal steps for them, AdamW's for the rest, one state to save and one to schedule."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from miaformer.training.muon import MuonAdamW


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 16)).double()


def optimiser(model: nn.Module, lr: float = 1e-2) -> MuonAdamW:
    matrices, others = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    return MuonAdamW(
        [
            {"params": matrices, "matrices": True, "weight_decay": 0.1},
            {"params": others, "matrices": False, "lr": 0.5 * lr},
        ],
        lr=lr,
    )


def train(model: nn.Module, optimizer: MuonAdamW, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 24, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_matrices_step_in_all_directions_alike() -> None:
    model = layers()
    before = copy.deepcopy(model)
    optimizer = optimiser(model, lr=1e-2)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    train(model, optimizer, seed=1, steps=1)
    for old, new in zip(before, model, strict=True):
        assert isinstance(old, nn.Linear)
        assert isinstance(new, nn.Linear)
        step = (new.weight - old.weight) / (1e-2 * 0.2 * 24**0.5)
        singular = torch.linalg.svdvals(step.detach())
        # The iteration ends around 1, not at it; of a gradient of eight images, eight directions are its own.
        assert (singular[:8] > 0.5).all()
        assert (singular < 1.4).all()


def test_weights_decay() -> None:
    model = nn.Linear(8, 8).double()
    optimizer = MuonAdamW([{"params": [model.weight], "matrices": True, "weight_decay": 0.5}], lr=0.1)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5))


def test_others_take_the_steps_of_adamw() -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
        for grad in torch.randn(3, 5, generator=torch.Generator().manual_seed(2)):
            weight.grad = grad.clone()
            optimizer.step()
        return weight.detach()

    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    found = steps(MuonAdamW([{"params": [ours], "weight_decay": 0.3}], lr=0.1), ours)
    wanted = steps(torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3), theirs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scheduled", [False, True])
def test_saved_and_loaded_goes_on_as_it_would_have(scheduled: bool) -> None:
    model = layers()
    optimizer = optimiser(model)
    train(model, optimizer, seed=1)
    other = copy.deepcopy(model)
    resumed = optimiser(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for part, kept in ((model, optimizer), (other, resumed)):
        if scheduled:
            for group in kept.param_groups:
                group["lr"] *= 0.1
        train(part, kept, seed=2)
    before = layers()
    train(before, optimiser(before), seed=1)
    for a, b, c in zip(model.parameters(), other.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert (a - c).abs().max() < (2e-2 if scheduled else 1)


def train_as_one_of_two(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model = layers()  # two matrices of one shape, which are shared, and one of another
    train(model, optimiser(model), seed=1)
    torch.save(model.state_dict(), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_work_and_step_alike(tmp_path: Path) -> None:
    model = layers()
    train(model, optimiser(model), seed=1)
    multiprocessing.spawn(train_as_one_of_two, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value)
