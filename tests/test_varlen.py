"""The path that CUDA alone takes, on the processor: a stand-in for its kernel checks all that it is given."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from torch import Tensor
from vits import STRUCTURES, lively, pictures, relative

from miaformer.engine import attention
from miaformer.engine.decisions import from_host
from miaformer.model.policy import Fixed

HALF = [torch.float16, torch.bfloat16]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nested, registers": ("registers", {}),
    "subset heads": ("plain", {"head_choice": "subset", "mlp_width": "full"}),
    "coupled, qk norm": ("layer_scale_qk_norm", {"mlp_width": "coupled", "token_scope": "per_block"}),
    "no class token": ("no_class_token_avg", {"depth_choice": "nested"}),
}


class Kernel:
    """`varlen_attn` by its definition; wrong is what FlashAttention does not take."""

    def __init__(self) -> None:
        self.calls = 0
        self.signature = inspect.signature(varlen.varlen_attn)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = self.signature.bind(*args, **kwargs).arguments
        q, k, v = given["query"], given["key"], given["value"]
        self.calls += 1
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in HALF
        assert all(one.ndim == 3 and one.stride(2) == 1 for one in (q, k, v))
        assert k.shape == v.shape
        assert q.shape[1:] == k.shape[1:]
        ends = []
        for rows, offsets, most in ((q, given["cu_seq_q"], given["max_q"]), (k, given["cu_seq_k"], given["max_k"])):
            assert offsets.dtype == torch.int32
            assert offsets.device == rows.device
            assert offsets.is_contiguous()
            assert offsets.ndim == 1
            steps = offsets.diff()
            assert (int(offsets[0]), int(offsets[-1])) == (0, len(rows))
            assert int(steps.min()) > 0
            assert type(most) is int
            assert most == int(steps.max())
            ends.append(offsets.tolist())
        assert len(ends[0]) == len(ends[1])
        outputs = []
        for (q0, q1), (k0, k1) in zip(*map(pairwise, ends), strict=True):
            parts = (rows.double().transpose(0, 1) for rows in (q[q0:q1], k[k0:k1], v[k0:k1]))
            outputs.append(F.scaled_dot_product_attention(*parts).transpose(0, 1))
        return torch.cat(outputs).to(q.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    stand_in = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_has_varlen", lambda q: q.dtype in HALF)
    return stand_in


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_the_kernel_is_given_what_it_takes(kernel: Kernel, case: str, dtype: torch.dtype) -> None:
    structure, config = CONFIGS[case]
    model = lively(1, STRUCTURES[structure], **config).eval()
    images = pictures(model.backbone, 9)
    half = lively(1, STRUCTURES[structure], **config).to(dtype).eval()
    with torch.inference_mode():
        for price in (0.3, 1.0, 3.0):
            decided = half.run(images.to(dtype), price=price)
            wanted = model.run(images, Fixed(decided.trace), execution="masked")
            assert relative(decided.logits.double(), wanted.logits) < 0.1
            for cap in (0.5, 0.8):
                assert half.run(images.to(dtype), price=price, cap=cap).trace.macs_fraction.max() <= cap
            alone = half.run(images[:1].to(dtype), Fixed(decided.trace[:1]))
            assert relative(alone.logits, decided.logits[:1]) < 0.05
    assert kernel.calls > 3 * len(model.backbone.blocks)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_pass_through_packed_rows(kernel: Kernel, dtype: torch.dtype) -> None:
    model = lively(1, STRUCTURES["plain"]).to(dtype).eval()
    images = pictures(model.backbone, 5).to(dtype)
    model.run(images, price=1.0).logits.float().square().sum().backward()
    assert kernel.calls
    gradients = [block.attn.qkv.weight.grad for block in model.backbone.blocks]
    reached = [gradient for gradient in gradients if gradient is not None]
    assert reached
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in reached)


def test_plans_go_to_cuda_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    class Pinned:
        def to(self, device: torch.device, non_blocking: bool = False) -> str:
            asked.append((device.type, non_blocking))
            return "there"

    monkeypatch.setattr(Tensor, "pin_memory", lambda self: Pinned())
    assert from_host(torch.arange(3), torch.device("cuda")) == "there"  # type: ignore[comparison-overlap]
    assert asked == [("cuda", True)]
    assert torch.equal(from_host(torch.arange(3).numpy(), torch.device("cpu")), torch.arange(3))
