"""Dense and sparse are timed in turn, and medians are those of each batch. No test here takes a real time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vits import lively, pictures

from miaformer.evaluation import time_against_dense, timing
from miaformer.model import policy


def test_efficiency_is_saved_macs_over_saved_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively().train()
    batches = [pictures(model.backbone, 2, seed=seed) for seed in range(3)]
    middle = [10.0, 4.0, 10.0, 6.0, 20.0, 6.0]  # dense and sparse in turn, batch by batch
    times = iter([*middle, *(9 * ms for ms in middle), *(ms / 2 for ms in middle)])

    def milliseconds(call: Callable[[], Any]) -> float:
        call()
        return next(times)

    monkeypatch.setattr(timing, "_milliseconds", milliseconds)
    found = time_against_dense(model, batches, policy.Random(depth=0.5), repeats=3)
    assert model.training
    with torch.inference_mode():
        chance = policy.Random(depth=0.5)
        macs = torch.cat([model.eval().run(images, policy=chance).trace.macs_fraction for images in batches])
    assert found["batch"] == 2
    assert found["ms"] == pytest.approx(16 / 3)
    assert found["dense_ms"] == pytest.approx(40 / 3)
    assert found["time_fraction"] == pytest.approx(0.4)
    assert found["macs_fraction"] == pytest.approx(macs.mean().item())
    assert found["efficiency"] == pytest.approx(macs.mean().item() / 0.4)


def test_at_least_one_repeat() -> None:
    model = lively()
    with pytest.raises(ValueError, match="repeats=0"):
        time_against_dense(model, [pictures(model.backbone, 2)], policy.Full(), repeats=0)


def test_timing_needs_batches() -> None:
    with pytest.raises(ValueError, match="no batches"):
        time_against_dense(lively(), [], policy.Full())
