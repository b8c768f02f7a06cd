"""Fused products say what PyTorch's own say, are counted, and are used where they pay."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import GELU, GELUTanh
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from vits import enliven, pictures, relative, vit

import miaformer
from miaformer import MIAFormer
from miaformer.engine import kernels, processor, products
from miaformer.engine.cost import count_macs
from miaformer.engine.decisions import Decisions
from miaformer.engine.products import _ONEDNN_DTYPES, OneDnn, Packed, Plain, products_for
from miaformer.engine.sparse import ROWS_THAT_COME_AGAIN
from miaformer.model.policy import Fixed, Full, Random

HAS_ONEDNN = torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch was built without oneDNN")
DTYPES = [d for d in (torch.float32, torch.bfloat16) if d in _ONEDNN_DTYPES]  # some processors lack bfloat16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
# Wide enough that products of a whole image pay for oneDNN's overhead, and 144 patches, so that rows come in 16s.
WIDE: dict[str, Any] = {"img_size": 48, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4.0, "depth": 4}


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def wide(dtype: torch.dtype, **config: Any) -> MIAFormer:
    return enliven(miaformer.adapt(vit(1, **WIDE), **config), 1).to(dtype).eval()


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["whole", "rows", "columns"])
@pytest.mark.parametrize("rows", [0, 1, 48, 200])
def test_fused_products_are_the_plain_ones(dtype: torch.dtype, cut: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in [(rows, 256), (512, 256), (512,)])
    if cut == "rows":
        weight, bias = weight[:320], bias[:320]
    if cut == "columns":
        weight, x = weight[:, :192], x[:, :192].contiguous()
    residual = torch.randn(rows, len(weight), generator=generator)
    x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, residual))
    plain, fused = Plain(), OneDnn()
    with torch.no_grad():
        for b in (bias, None):
            for act in (nn.GELU(), nn.GELU("tanh"), GELU(), GELUTanh(), nn.SiLU()):
                found, wanted = fused.activated(x, weight, b, act), plain.activated(x, weight, b, act)
                assert relative(found.float(), wanted.float()) < TOLERANCE[dtype]
            assert relative(fused.linear(x, weight, b).float(), plain.linear(x, weight, b).float()) < TOLERANCE[dtype]
            kept = residual.clone()
            found, wanted = fused.added(x, weight, b, residual), plain.added(x, weight, b, residual)
            assert relative(found.float(), wanted.float()) < TOLERANCE[dtype]
            assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{}, {"mlp_width": "coupled"}, {"head_choice": "subset"}])
def test_fused_execution_is_the_masked_one(dtype: torch.dtype, config: dict[str, Any]) -> None:
    """I2 where products are fused, for decisions of the learned policy (rows in multiples) and for any others."""
    model = wide(dtype, **config)
    images = pictures(model.backbone, 5)
    with torch.inference_mode():
        decided = model.run(images, price=1.0)
        for policy in (Fixed(decided.trace), Random(0.7, 0.7, 0.6, seed=3), Full()):
            again = Random(0.7, 0.7, 0.6, seed=3) if isinstance(policy, Random) else policy
            sparse, masked = model.run(images, policy), model.run(images, again, execution="masked")
            assert torch.equal(sparse.trace.tokens, masked.trace.tokens)
            assert relative(sparse.logits.float(), masked.logits.float()) < TOLERANCE[dtype]


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_products_are_counted(dtype: torch.dtype) -> None:
    """I4, also by whoever counts with PyTorch's counter alone."""
    model = wide(dtype)
    images = pictures(model.backbone, 3)
    model.cost()
    with torch.inference_mode():
        trace = model.run(images, price=1.0).trace
        assert count_macs(lambda: model.run(images, price=1.0)) == int(trace.macs.sum())
        with FlopCounterMode(display=False) as counter:
            model.run(images, price=1.0)
    assert counter.get_total_flops() == 2 * int(trace.macs.sum())


@needs_onednn
def test_fused_products_are_used_where_nobody_differentiates() -> None:
    model = wide(torch.float32)
    images = pictures(model.backbone, 2)
    with torch.inference_mode(), Calls() as fused:
        model.run(images, price=0.0)
    assert any("_linear_pointwise" in name for name in fused.count)
    with Calls() as differentiable:
        output = model.run(images, price=0.0)
    assert not any("_linear_pointwise" in name for name in differentiable.count)
    assert output.logits.requires_grad
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False), Calls() as switched_off:
        model.run(images, price=0.0)
    assert not any("_linear_pointwise" in name for name in switched_off.count)
    assert isinstance(products_for(images.double()), Plain)


@needs_onednn
def test_products_too_small_to_pay_are_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some processors those are many, whether weights are packed or not."""
    model = wide(torch.float32)
    images = pictures(model.backbone, 2)
    monkeypatch.setattr(products, "onednn_pays", lambda *product: False)
    with torch.inference_mode():
        wanted = model.run(images, price=0.0, execution="masked").logits
        for prepacked in (False, True):
            if prepacked:
                model.prepack()
            with Calls() as calls:
                found = model.run(images, price=0.0).logits
            assert not any("_linear_pointwise" in name for name in calls.count)
            assert relative(found, wanted) < 1e-5
        # A whole image's MLP pays, its projection does not.
        monkeypatch.setattr(products, "onednn_pays", lambda rows, size, *product: rows * size >= 10_000_000)
        with Calls() as calls:
            found = model.run(images[:1], price=0.0).logits
        assert 0 < sum(count for name, count in calls.count.items() if "_linear_pointwise" in name) <= 3 * 4
        assert any("addmm" in name for name in calls.count)
        assert relative(found, wanted[:1]) < 1e-5


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon\n\nprocessor : 1\n", "Xeon"),
        ("processor : 0\nvendor_id : AuthenticAMD\nmodel name : AMD EPYC: 9\n\n", "AMD EPYC: 9"),
        ("processor : 0\nBogoMIPS : 50\n", None),
    ],
)
def test_the_processor_is_known_by_what_linux_says(
    cpuinfo: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.described.cache_clear()
    monkeypatch.setattr(processor.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    try:
        assert processor.processor_name() == (name or processor.platform.machine())
    finally:
        processor.described.cache_clear()


def forget() -> None:
    """What is known of this machine in this process."""
    kernels.onednn_pays.cache_clear()
    kernels._measured.cache_clear()


@pytest.fixture
def measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody says which kernels to use, and no race was ever run."""
    monkeypatch.delenv("MIAFORMER_PRODUCTS")
    monkeypatch.setenv("MIAFORMER_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.mark.usefixtures("measured_anew")
def test_kernels_are_those_that_were_fastest_when_this_machine_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def race() -> dict[str, float]:
        """oneDNN is faster with packed weights of less than 64 rows, and with plain ones of the widest ViT."""
        measured.append(torch.get_num_threads())
        taken = {}
        for width in kernels.WIDTHS:
            for rows in kernels.ROWS:
                one = f"{width} x {rows}"
                taken[f"{one}, pytorch"] = 1.0
                taken[f"{one}, plain"] = 0.8 if width == 768 else 0.99  # a gain of a hundredth is none
                taken[f"{one}, packed"] = 0.9 if rows < 64 else 1.1
        return taken

    monkeypatch.setattr(kernels, "race", race)
    small, large = 4 * 200**2, 4 * 1000**2
    for _ in range(2):
        assert kernels.onednn_pays(10, small, True, 1)
        assert not kernels.onednn_pays(300, small, True, 1)
        assert kernels.onednn_pays(10, large, False, 1)
        assert not kernels.onednn_pays(1, large, False, 1), "a call of oneDNN takes longer"
        assert not kernels.onednn_pays(300, small, False, 1)
        assert [kernels.onednn_pays(50, 4 * width**2, False, 1) for width in (384, 450, 640, 768)] == [0, 0, 1, 1]
        forget()
    assert measured == [1], "the second process reads what the first one found"
    kernels.onednn_pays(10, small, True, 2)
    assert measured == [1, 2], "the number of threads matters"


def test_a_busy_machine_does_not_tell_which_kernel_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take their time or much longer; what counts is the least, and there are more of them until it is sure."""
    own = {"pytorch": 2.0, "plain": 3.0, "packed": 1.0}
    clock, calls = 0.0, Counter[str]()
    hindered = random.Random(3)

    def kernel(kind: str) -> Callable[..., None]:
        def call(*layer: Any) -> None:
            nonlocal clock
            calls[kind] += 1
            clock += own[kind] * hindered.choice([1, 1, 5, 9, 20])

        return call

    monkeypatch.setattr(kernels, "_KINDS", {kind: kernel(kind) for kind in own})
    monkeypatch.setattr(kernels, "_packed", lambda layer: layer)
    monkeypatch.setattr(kernels, "_COLD", 0)
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: clock)
    taken = kernels.race()
    assert {kind: taken[f"384 x 64, {kind}"] for kind in own} == pytest.approx(own)
    shapes = len(kernels.WIDTHS) * len(kernels.ROWS)
    assert 5 * shapes < calls["plain"] < 25 * shapes
    hindered.choice = lambda choices: 1  # type: ignore[method-assign, assignment]
    calls.clear()
    kernels.race()
    assert calls["plain"] == 5 * shapes, "an idle machine is sure at once"


@needs_onednn
@pytest.mark.usefixtures("measured_anew")
def test_measuring_kernels_is_no_operation_of_the_call_that_starts_it() -> None:
    counted = []
    for misses in (1, 1):
        model = wide(torch.float32)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model.run(pictures(model.backbone, 2), price=0.0)
        assert kernels._measured.cache_info().misses == misses
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.usefixtures("measured_anew")
def test_kernels_may_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in kernels.GIVEN:
        forget()
        monkeypatch.setenv("MIAFORMER_PRODUCTS", given)
        assert kernels.onednn_pays(200, 10**6, False, 1) is (given == "onednn")
    forget()
    monkeypatch.setenv("MIAFORMER_PRODUCTS", "blas")
    with pytest.raises(ValueError, match="pytorch, onednn, got 'blas'"):
        kernels.onednn_pays(200, 10**6, False, 1)


def test_an_images_rows_come_in_few_numbers() -> None:
    model = wide(torch.float32)
    trace = model.run(pictures(model.backbone, 8), price=1.0).trace
    rows = trace.tokens.sum(dim=2)[trace.depth] + model.num_prefix_tokens
    few = (rows % ROWS_THAT_COME_AGAIN == 0) | (rows == 145) | (rows == 1)  # all of them, or no patch token at all
    assert few.all()
    assert len(rows.unique()) > 1


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_mates_do_not_matter_to_fused_products(dtype: torch.dtype) -> None:
    """I3, at rounding: the number of rows of a call may change the order of its sums."""
    model = wide(dtype)
    images = pictures(model.backbone, 6)
    with torch.inference_mode():
        together = model.run(images, price=1.0)
        fixed = miaformer.model.policy.Fixed
        for image in range(6):
            alone = model.run(images[image : image + 1], fixed(together.trace[[image]]))
            assert relative(alone.logits.float(), together.logits[image : image + 1].float()) < TOLERANCE[dtype]


@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{}, {"mlp_width": "coupled"}])
def test_prepacked_weights_compute_the_same(dtype: torch.dtype, config: dict[str, Any]) -> None:
    model = wide(dtype, **config)
    images = pictures(model.backbone, 5)
    with torch.inference_mode():
        decided = Fixed(model.run(images, price=1.0).trace)
        heads = Random(heads=0.6, seed=2)
        before = [model.run(images, policy).logits for policy in (decided, Full(), heads)]
        model.prepack()
        after = [model.run(images, policy).logits for policy in (decided, Full(), Random(heads=0.6, seed=2))]
        for found, wanted in zip(after, before, strict=True):
            assert relative(found.float(), wanted.float()) < TOLERANCE[dtype]
        assert count_macs(lambda: model.run(images, price=1.0)) == int(model.run(images, price=1.0).trace.macs.sum())
    assert model._packed is not None
    assert model._packed.nbytes > 0


@needs_onednn
def test_layers_side_by_side_may_differ_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of queries and of keys that heads share."""
    monkeypatch.setattr(products, "onednn_pays", lambda *product: True)
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(rows, 64, generator=generator) for rows in (48, 64, 16, 16))
    layers = [(weight, torch.randn(len(weight), generator=generator)) for weight in weights]
    with torch.inference_mode():
        for found, wanted in zip(Packed().side_by_side(x, layers), Plain().side_by_side(x, layers), strict=True):
            assert relative(found, wanted) < 1e-5


@needs_onednn
def test_prepacked_weights_follow_changes() -> None:
    model = wide(torch.float32).prepack()
    images = pictures(model.backbone, 2)
    with torch.inference_mode():
        before = model.run(images, Full()).logits
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight.mul_(1.5)
    with torch.inference_mode():
        after = model.run(images, Full()).logits
        masked = model.run(images, Full(), execution="masked").logits
    assert relative(after, masked) < 1e-5
    assert relative(after, before) > 1e-3
    copied = copy.deepcopy(model)
    assert copied._packed is not None
    assert copied._packed.nbytes == 0
    assert model.train()._packed is None
    assert copied.eval()._packed is not None
    copied.load_state_dict(model.state_dict())
    assert copied._packed is None


@needs_onednn
def test_weights_gathered_for_one_call_are_not_kept() -> None:
    """Subsets of heads copy what they pick: packing such copies would keep one for every call."""
    model = wide(torch.float32, head_choice="subset").prepack()
    images = pictures(model.backbone, 2)
    last = torch.zeros(1, model.cost().depth, model.cost().num_heads, dtype=torch.bool)
    last[..., -1] = True
    full = Decisions.full(1, model.cost().depth, model.cost().num_heads, model.cost().num_patches)
    assert model._packed is not None
    with torch.inference_mode():
        model.run(images, Fixed(Decisions(full.depth, last, full.tokens)))
        assert model._packed.nbytes == 0
        model.run(images, Full())
        assert model._packed.nbytes > 0


def test_onednn_is_never_given_a_weight_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run a loop, 200 times slower, and give the same answer."""
    given: list[bool] = []

    class Recorder:
        def default(self, x: Any, weight: Any, *rest: Any) -> Any:
            given.append(weight.is_contiguous())
            return x.new_zeros(len(x), len(weight))

        def binary(self, x: Any, residual: Any, weight: Any, *rest: Any) -> Any:
            given.append(weight.is_contiguous())
            return residual

    monkeypatch.setattr(products, "POINTWISE", Recorder())
    x, weight = torch.ones(400, 192, dtype=torch.bfloat16), torch.ones(512, 256, dtype=torch.bfloat16)[:, :192]
    fused = OneDnn()
    with torch.no_grad():
        fused.linear(x, weight, None)
        fused.activated(x, weight, None, nn.GELU())
        fused.added(x, weight, None, x.new_zeros(400, 512))
        fused.linear(x.float(), weight.float(), None)
    assert given
    assert all(given)
