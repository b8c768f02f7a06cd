"""Every engine decides and answers as eager PyTorch does, and `auto` takes the fastest."""

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
from miaformer.engine.races import faster, remembered
from miaformer.evaluation import calibrate
from miaformer.export.engines import ENGINES, EngineUnavailableError, auto, onnx_runtime, open_engine
from miaformer.export.engines.auto import Auto, Choice
from miaformer.export.engines.onnx_runtime import OnnxRuntime
from miaformer.export.engines.pytorch import Compiled, Eager
from miaformer.model.adapt import adapt
from miaformer.model.policy import Full

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIAFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that several tests share, for exporting takes seconds."""
    return tmp_path_factory.mktemp("exported")


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


OTHERS = [
    "packed",
    "onnx",
    pytest.param("compile", marks=pytest.mark.slow),  # compiles for a minute
    pytest.param("graphs", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on CUDA only")),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", OTHERS)
def test_every_engine_decides_and_answers_as_eager(name: str, config: dict[str, Any]) -> None:
    """At one budget for all and one for each, under caps, alone and in batches; MACs to the last one."""
    model = calibrated(**config)
    eager, other = Predictor(model), Predictor(model, engine=name)
    images = pictures(model.backbone, 12).float()
    torch.testing.assert_close(other.dense(images), eager.dense(images), atol=1e-4, rtol=1e-4)
    least, most = model.calibration.range if model.calibration else (0.0, 1.0)
    if isinstance(other.engine, Compiled):
        with pytest.raises(EngineUnavailableError, match="on the host"):
            other.run(images, budget=most)
        return
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
        wanted, found = eager.run(images, **spend), other.run(images, **spend)
        for part in ("depth", "heads", "tokens", "macs", "looks", "grid"):
            assert torch.equal(getattr(wanted.trace, part), getattr(found.trace, part)), (spend, part)
        torch.testing.assert_close(found.trace.macs_fraction, wanted.trace.macs_fraction)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    alone = other.run(images[:1], budget=between[:1])
    assert torch.equal(alone.trace.tokens, other.run(images, budget=between).trace.tokens[:1])


@pytest.mark.parametrize("name", ["eager", "onnx"])
def test_what_asks_for_no_budget_executes_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine itself, calibrated or not; prices are PyTorch's."""
    model = calibrated(**CONFIGS[0])
    predictor = Predictor(model, engine=name)
    monkeypatch.setattr(OnnxRuntime, "run", None)
    images = pictures(model.backbone, 2).float()
    for spend in ({}, {"policy": Full()}):
        found = predictor.run(images, **spend)
        torch.testing.assert_close(found.logits, model.backbone(images), atol=1e-4, rtol=1e-4)
        assert found.trace.depth.all()
        assert found.trace.tokens.all()
        if name == "onnx":  # where PyTorch leaves out what nobody reads of the last block
            assert found.trace.macs.tolist() == [model.cost().backbone] * 2
            assert found.trace.macs_fraction.tolist() == [1.0, 1.0]
    assert torch.equal(predictor.run(images, price=1.0).logits, model(images, price=1.0))
    model.calibration = None
    torch.testing.assert_close(predictor.run(images).logits, model.backbone(images), atol=1e-4, rtol=1e-4)


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
    ]:
        changed = pickle.loads(pickle.dumps(model))
        change(changed)
        with pytest.raises(EngineUnavailableError, match=reason):
            Predictor(changed, engine="onnx")
        assert list(Auto(changed).engines) == ["eager"]
    images = pictures(model.backbone, 1).float()
    onnx = open_engine("onnx", model)
    model.calibration = None
    with pytest.raises(EngineUnavailableError, match="not calibrated"):
        onnx.run(images, [0.5])
    monkeypatch.setattr(onnx_runtime, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(EngineUnavailableError, match="pip install onnxscript"):
        open_engine("onnx", model)
    with pytest.raises(ValueError, match=f"engine='tensorrt' must be one of {', '.join(ENGINES)}"):
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


def test_a_race_is_remembered_until_others_take_part(tmp_path: Path) -> None:
    file, runs = tmp_path / "cache" / "races.json", []

    def race(*names: str) -> dict[str, float]:
        def run() -> dict[str, float]:
            runs.append(names)
            return dict.fromkeys(names, 1.0)

        return remembered(file, "one", set(names), run)

    for _ in range(2):
        assert race("a", "b") == {"a": 1.0, "b": 1.0}
    assert race("a", "b", "c") == {"a": 1.0, "b": 1.0, "c": 1.0}
    file.write_text('{"one": 3}')
    race("a", "b")
    file.write_text("no JSON")
    race("a", "b")
    assert runs == [("a", "b"), ("a", "b", "c"), ("a", "b"), ("a", "b")]


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


def injected(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[int]:
    """Let every timing find these; gives the list of how many candidates each of them had."""
    timed: list[int] = []

    def found(calls: dict[str, Callable[[], object]], limit: float) -> dict[str, float]:
        timed.append(len(calls))
        return {name: seconds[name] for name in calls}

    monkeypatch.setattr(auto, "faster", found)
    return timed


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What ran from here on: engine, method, images."""
    ran: list[tuple[str, str, int]] = []

    def note(kind: type[Eager] | type[OnnxRuntime], method: str) -> None:
        original = getattr(kind, method)

        def call(self: Any, images: Tensor, *rest: Any) -> Any:
            ran.append((kind.name, method, len(images)))
            return original(self, images, *rest)

        monkeypatch.setattr(kind, method, call)

    for kind in (Eager, OnnxRuntime):
        for method in ("run", "everything"):
            note(kind, method)
    return ran


@pytest.mark.parametrize("fastest", ["eager", "onnx"])
@pytest.mark.parametrize("dense", ["eager", "onnx"])
@pytest.mark.parametrize("saves", [True, False])
def test_auto_takes_the_fastest_and_says_where_dense_is(
    fastest: str, dense: str, saves: bool, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIAFORMER_CACHE", str(exported))
    (exported / auto.TIMED).unlink(missing_ok=True)
    model = load("cifar10-small")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seconds = {"eager": 0.020, "onnx": 0.020, "eager, dense": 0.040, "onnx, dense": 0.040}
    seconds[fastest], seconds[f"{dense}, dense"] = 0.010, 0.015 if saves else 0.008
    injected(monkeypatch, seconds)
    ran = noted(monkeypatch)
    said: list[Choice] = []
    predictor = Predictor(model, engine="auto", on_choice=said.append)
    for batch in (images[:1], images):
        predictor.run(batch, budget=0.5)
        assert ran[-1] == (fastest, "run", len(batch))
        predictor.run(batch)
        assert ran[-1] == (dense, "everything", len(batch))
    assert [choice.kind for choice in said] == ["single images", "batches"]
    assert said[1].ms[fastest] == pytest.approx(10 / 3)  # an image
    lines = said[0].lines()
    assert lines[0].startswith(f"engine for single images: {fastest}, 10 ms an image")
    assert len(lines) == (1 if saves else 2)
    if not saves:
        assert f"the dense model is faster, {dense}, 8 ms" in lines[1]
        assert "budget 0.5 saves MACs here, not time" in lines[1]


def test_auto_chooses_for_each_kind_of_call_once_and_remembers(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIAFORMER_CACHE", str(exported))
    (exported / auto.TIMED).unlink(missing_ok=True)
    model = load("cifar10-small")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    timed = injected(monkeypatch, {"eager": 0.02, "onnx": 0.01, "eager, dense": 0.03, "onnx, dense": 0.04})
    ran = noted(monkeypatch)
    predictor = Predictor(model, engine="auto")
    for batch in (images[:1], images, images[:2], images[1:2]):
        predictor.run(batch, budget=0.5)
    assert timed == [4, 4]
    again = Predictor(model, engine="auto")  # in another process it would read the same file
    again.run(images[:1], budget=0.5)
    assert timed == [4, 4]
    Predictor(model, engine="auto").run(images[:1], budget=0.7)
    assert timed == [4, 4, 4], "what is fastest at one budget need not be at another"
    (exported / auto.TIMED).write_text("{ no JSON")
    Predictor(model, engine="auto").run(images[:1], budget=0.5)
    assert timed == [4, 4, 4, 4]
    assert json.loads((exported / auto.TIMED).read_text())
    model.calibration = None
    Predictor(model, engine="auto").run(images)
    assert timed[-1] == 2, "without a budget, only the two ways to execute everything"
    assert ran[-1] == ("eager", "everything", 3)
