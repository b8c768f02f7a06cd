"""ONNX Runtime behind a predictor decides and answers as PyTorch does, and `auto` takes the faster one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vits import enliven, pictures, vit

from miaformer import MIAFormer, Predictor, load
from miaformer.data import Batch
from miaformer.evaluation import calibrate
from miaformer.model.adapt import adapt
from miaformer.prediction import engines
from miaformer.prediction.engines import Chosen, Eager, OnnxRuntime, faster, open_engine, why_not_onnx

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIAFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calibrated(**config: Any) -> MIAFormer:
    model = adapt(vit(img_size=32, patch_size=4).float(), **config).eval()
    if not model.adapt_config.chooses_resolution:
        enliven(model, 3)
    labels = torch.zeros(40, dtype=torch.int64)
    calibrate(model, [Batch(pictures(model.backbone, 40, seed=9).float(), labels, labels)])
    return model


CONFIGS: list[Any] = [
    {"depth_choice": "nested", "token_choice": "even", "first_token_block": 0, "last_token_block": 0},
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"token_scope": "per_block"}, marks=pytest.mark.slow),
    pytest.param({"looks": 2}, marks=pytest.mark.slow),
    {"grains": ("resolution",)},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_onnx_decides_and_answers_as_eager(config: dict[str, Any]) -> None:
    """At one budget for all and one for each, under caps, alone and in batches; MACs to the last one."""
    model = calibrated(**config)
    eager, onnx = Predictor(model), Predictor(model, engine="onnx")
    images = pictures(model.backbone, 12).float()
    least, most = model.calibration.range if model.calibration else (0.0, 1.0)
    between = torch.linspace(least, most, 12).tolist()
    least_cap = model.least_macs() / model.cost().backbone
    cap = least_cap + 0.4 * (1 - least_cap)
    asked: list[dict[str, Any]] = [
        {"budget": (least + most) / 2},
        {"budget": between},
        {"cap": cap},
        {"budget": most, "cap": cap},
        {"budget": between, "cap": [cap] * 6 + [1.0] * 6},
    ]
    for spend in asked:
        wanted, found = eager.run(images, **spend), onnx.run(images, **spend)
        for name in ("depth", "heads", "tokens", "macs", "looks", "grid"):
            assert torch.equal(getattr(wanted.trace, name), getattr(found.trace, name)), (spend, name)
        torch.testing.assert_close(found.trace.macs_fraction, wanted.trace.macs_fraction)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    alone = onnx.run(images[:1], budget=between[:1])
    assert torch.equal(alone.trace.tokens, onnx.run(images, budget=between).trace.tokens[:1])
    torch.testing.assert_close(onnx.dense(images), eager.dense(images), atol=1e-4, rtol=1e-4)


def test_what_asks_for_no_budget_is_run_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated()
    onnx = Predictor(model, engine="onnx")
    monkeypatch.setattr(OnnxRuntime, "run", None)
    images = pictures(model.backbone, 2).float()
    assert torch.equal(onnx.run(images).logits, model(images))
    assert torch.equal(onnx.run(images, price=1.0).logits, model(images, price=1.0))


def test_budgets_and_caps_that_cannot_be_are_refused_alike() -> None:
    onnx = Predictor(calibrated(), engine="onnx")
    images = pictures(onnx.model.backbone, 2).float()
    for spend in ({"budget": 1.5}, {"budget": 1e-4}, {"cap": 1e-4}, {"budget": [0.5] * 3}, {"budget": "much"}):
        with pytest.raises((ValueError, TypeError)) as of_eager:
            Predictor(onnx.model).run(images, **spend)  # type: ignore[arg-type]
        with pytest.raises(type(of_eager.value)) as of_onnx:
            onnx.run(images, **spend)  # type: ignore[arg-type]
        assert str(of_onnx.value) == str(of_eager.value)
    with pytest.raises(ValueError, match="NaN"):
        onnx.run(torch.full_like(images, torch.nan), budget=0.9)


def test_files_are_made_once_for_a_model(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated()
    images = pictures(model.backbone, 1).float()
    first = Predictor(model, engine="onnx").run(images, budget=0.9)
    (made,) = empty_cache.glob("*.onnx")
    written = made.stat().st_mtime_ns
    again = Predictor(model, engine="onnx")
    assert torch.equal(pickle.loads(pickle.dumps(again.engine)).run(images, [0.9], None).logits, first.logits)
    assert made.stat().st_mtime_ns == written
    with torch.no_grad():
        model.backbone.head.bias += 1  # another model: another file
    assert Predictor(model, engine="onnx").run(images, budget=0.9).logits.sum() != first.logits.sum()
    assert len(list(empty_cache.glob("*.onnx"))) == 2


def test_what_onnx_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated()
    for change, reason in [
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.to("meta"), "on meta"),
        (lambda m: setattr(m, "calibration", None), "not calibrated"),
    ]:
        changed = pickle.loads(pickle.dumps(model))
        change(changed)
        assert reason in str(why_not_onnx(changed))
        with pytest.raises(ValueError, match=reason):
            Predictor(changed, engine="onnx")
        assert isinstance(Chosen(changed).engines.get("eager"), Eager)
        assert "onnx" not in Chosen(changed).engines
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match="pip install onnxscript"):
        open_engine("onnx", model)
    with pytest.raises(ValueError, match="engine='tensorrt' must be one of auto, eager, onnx"):
        Predictor(model, engine="tensorrt")


def test_auto_goes_on_in_pytorch_where_a_model_cannot_be_exported_or_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = load("cifar10-small")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MIAFORMER_CACHE", str(tmp_path / "file"))
    auto = Predictor(model, engine="auto")
    assert torch.equal(auto.run(images, budget=0.5).logits, model(images, budget=0.5))
    assert "onnx is left out" in caplog.text
    assert "MIAFORMER_CACHE" in caplog.text
    with pytest.raises(ValueError, match="cannot be written"):
        Predictor(model, engine="onnx").run(images, budget=0.5)

    monkeypatch.setenv("MIAFORMER_CACHE", str(tmp_path / "cache"))
    many_heads = calibrated(head_choice="subset")
    monkeypatch.setattr("miaformer.export.files.MOST_SUBSET_HEADS", 1)
    own = pictures(many_heads.backbone, 2).float()
    assert torch.equal(Predictor(many_heads, engine="auto").run(own, budget=0.9).logits, many_heads(own, budget=0.9))
    assert "subset of heads" in caplog.text


# What `auto` takes -----------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[], None]:
        """A call that takes the first of these, then the next ..., the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_the_faster_one_by_the_median_comes_first() -> None:
    """Neither the first call, which prepares, nor one that is interrupted counts."""
    clock = Clock()
    slow_start = clock.taking(100.0, 0.02)
    interrupted = clock.taking(0.03, 0.03, 0.03, 5.0, 0.03)
    found = faster({"one": interrupted, "other": slow_start}, seconds=1.0, clock=clock)
    assert list(found) == ["other", "one"]
    assert found == pytest.approx({"other": 0.02, "one": 0.03})


def test_slow_candidates_are_timed_five_times_at_least() -> None:
    clock = Clock()
    calls = {"one": 0, "other": 0}

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        clock.now += seconds

    faster({"one": lambda: call("one", 9.0), "other": lambda: call("other", 8.0)}, seconds=1.0, clock=clock)
    assert calls == {"one": 6, "other": 6}


@pytest.mark.parametrize(
    ("single", "batches"), [("onnx", "eager"), ("eager", "onnx"), ("onnx", "onnx"), ("eager", "eager")]
)
def test_auto_takes_what_was_faster_of_its_kind_and_remembers(
    single: str, batches: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("cifar10-small")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ran: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        kind = Eager if name == "eager" else OnnxRuntime
        run = kind.run

        def noted(self: Any, images: Tensor, *rest: Any) -> Any:
            ran.append((name, len(images)))
            return run(self, images, *rest)

        monkeypatch.setattr(kind, "run", noted)

    timed: list[int] = []

    def injected(calls: Any) -> dict[str, float]:
        for call in calls.values():
            call()
        timed.append(ran[-1][1])
        fast = single if ran[-1][1] == 1 else batches
        return {fast: 0.001, "onnx" if fast == "eager" else "eager": 0.002}

    for name in ("eager", "onnx"):
        note(name)
    monkeypatch.setattr(engines, "faster", injected)
    said: list[tuple[str, dict[str, float]]] = []
    auto = Predictor(model, engine="auto", on_choice=lambda *choice: said.append(choice))
    for batch in (images[:1], images, images[:2], images[1:2]):
        auto.run(batch, budget=0.5)
        assert ran[-1] == (single if len(batch) == 1 else batches, len(batch))
    assert timed == [1, 3], "a kind is timed once"
    assert [kind for kind, _ in said] == ["single pictures", "batches"]
    assert said[1][1][batches] == pytest.approx(1 / 3)  # ms a picture

    again = Predictor(model, engine="auto")  # in another process it would read the same file
    again.run(images[:1], budget=0.5)
    assert ran[-1][0] == single
    assert timed == [1, 3]
    (empty_cache / engines.TIMED).write_text("{ no JSON")
    Predictor(model, engine="auto").run(images[:1], budget=0.5)
    assert timed == [1, 3, 1]
    assert json.loads((empty_cache / engines.TIMED).read_text())
