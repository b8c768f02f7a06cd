"""The compiled loop decides what PyTorch and numpy decide, and steps aside where it cannot, or is watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vits import STRUCTURES, enliven, lively, pictures, vit

import miaformer
from miaformer import MIAFormer
from miaformer.engine import native
from miaformer.engine.controller import token_scores
from miaformer.engine.cost import count_macs
from miaformer.engine.dither import dither

pytest.importorskip("numba")


def decided(model: MIAFormer, images: torch.Tensor, **arguments: Any) -> Any:
    with torch.inference_mode():
        return model.run(images, **arguments).trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["plain", "registers", "no_class_token_avg", "uneven_groups"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"head_choice": "subset", "token_scope": "per_block"},
        {"token_multiple": 4},
        {"depth_choice": "nested"},
        {"token_choice": "even"},
    ],
)
def test_the_loop_decides_as_operations_do(
    monkeypatch: pytest.MonkeyPatch, structure: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = lively(0, STRUCTURES[structure], **config).to(dtype).eval()
    images = pictures(model.backbone, 12).to(dtype)
    differing = kept = 0
    for arguments in ({"price": 1.0}, {"price": torch.linspace(0.01, 3.0, 12)}, {"price": 0.3, "cap": 0.7}):
        ours = decided(model, images, **arguments)
        alone = [decided(model, images[i : i + 1], price=1.0) for i in range(12)] if "cap" not in arguments else []
        with monkeypatch.context() as context:
            context.setattr(native, "enabled", False)
            theirs = decided(model, images, **arguments)
        for name in ("depth", "heads", "tokens"):
            differing += int((getattr(ours, name) != getattr(theirs, name)).sum())
            kept += int(getattr(ours, name).sum())
        if alone and isinstance(arguments["price"], float):  # I3, exactly
            assert torch.equal(ours.tokens, torch.cat([one.tokens for one in alone])) or dtype == torch.bfloat16
    assert kept
    # A logit within rounding of its threshold may fall on either side of it.
    assert differing <= (0.002 if dtype == torch.float32 else 0.08) * kept


@pytest.mark.parametrize("image", [0, 3])
def test_logits_of_tokens_are_those_of_operations(image: int) -> None:
    torch.manual_seed(1)
    model = enliven(miaformer.adapt(vit(1)), 1).float().eval()
    with torch.inference_mode():
        x = model.embed(pictures(model.backbone, 4).float()).tokens
        formula = model.controllers.formulas(torch.zeros(1))[-1]
        prefix, active = model.num_prefix_tokens, np.ones((4, x.shape[1] - model.num_prefix_tokens), bool)
        depth, _, _, scores = native.decide(
            x, active, None, prefix, model.cost().num_heads, 1, formula, model.cost().grid
        )
        content, direction = formula.content(x[:, prefix:].mean(dim=1), x[:, :prefix].mean(dim=1))
        logits = formula.logits(content).numpy()
        wanted = token_scores(x[image, prefix:], direction[image]).numpy() + logits[image, -1]
        wanted = wanted + dither(*model.cost().grid)
    assert depth[image] == (logits[image, 0] > 0)
    if depth[image]:
        np.testing.assert_allclose(scores[image], wanted, rtol=1e-4, atol=1e-5)


def test_who_counts_operations_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(0).float().eval()
    images = pictures(model.backbone, 3).float()
    calls = []
    decide = native.decide
    monkeypatch.setattr(native, "decide", lambda *args: calls.append(1) or decide(*args))  # type: ignore[func-returns-value]
    trace = decided(model, images, price=1.0)
    assert len(calls) == model.cost().depth
    calls.clear()
    assert count_macs(lambda: decided(model, images, price=1.0)) == int(trace.macs.sum())
    assert not calls


def test_without_numba_operations_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(native, "import_module", missing)
    native._loop.cache_clear()
    try:
        model = lively(0).float().eval()
        images = pictures(model.backbone, 3).float()
        assert not native.can_decide(images)
        assert decided(model, images, price=1.0).tokens.any()
    finally:
        monkeypatch.undo()
        native._loop.cache_clear()
    assert native.can_decide(images)
