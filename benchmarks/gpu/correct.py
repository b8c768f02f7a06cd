"""Is what a device computes what the definition says? Sparse against masked, against the processor, and each alone."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import miaformer
from miaformer import MIAFormer
from miaformer.evaluation.drawn import draw_controllers
from miaformer.model.policy import Fixed

from .record import Record

CONFIGS: dict[str, dict[str, Any]] = {
    "depth, heads and tokens": {},
    "tokens per block": {"grains": ("tokens",), "token_scope": "per_block"},
    "subset heads": {"head_choice": "subset", "mlp_width": "full"},
    "coupled heads": {"mlp_width": "coupled"},
    "images leave": {"depth_choice": "nested"},
    "two looks": {"looks": 2},
}
# Largest difference of logits, as a fraction of the largest logit.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 2}
SMALL = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}


def run(record: Record, device: torch.device, tiny: bool) -> None:
    for name, config in CONFIGS.items():
        model, images = _model(config, TINY if tiny else SMALL, 6 if tiny else 32)
        for dtype in TOLERANCE:
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            record.step(key, lambda m=model, x=images, d=dtype: check(m, x, device, d))
    model, images = _model({}, TINY if tiny else SMALL, 6 if tiny else 32)
    record.step("gradients", lambda: gradients(model, images, device))
    record.step("synchronisations", lambda: synchronisations(model, images, device))
    record.step("tests", lambda: marked_tests(tiny), least_seconds=60)


def check(model: MIAFormer, images: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences, each within the dtype's tolerance, else AssertionError."""
    ours, there = copy.deepcopy(model).to(device, dtype).eval(), images.to(device, dtype)
    found: dict[str, float] = {}
    with torch.inference_mode():
        everything = ours(there)
        found["everything, against the backbone"] = _apart(everything, ours.to_timm()(there))
        decided = ours.run(there, price=1.0)
        trace = decided.trace.to("cpu")
        masked = ours.run(there, Fixed(trace), execution="masked")
        found["sparse against masked"] = _apart(decided.logits, masked.logits)
        on_processor = model.run(images, Fixed(trace))
        found["against the processor in float32"] = _apart(decided.logits.cpu(), on_processor.logits)
        controllers = int(decided.trace.macs.sum() - masked.trace.macs.sum())
        assert controllers >= 0, "deciding takes MACs, and is counted"
        assert masked.trace.macs.tolist() == on_processor.trace.macs.tolist()
        alone = torch.cat([ours.run(there[k : k + 1], Fixed(trace[k : k + 1])).logits for k in range(4)])
        found["alone against with batch mates"] = _apart(alone, decided.logits[:4])
        for cap in (0.35, 0.6, 0.9):
            most = float(ours.run(there, price=0.3, cap=cap).trace.macs_fraction.max())
            assert most <= cap, f"cap {cap}: {most}"
        assert len({tuple(one.flatten().tolist()) for one in trace.tokens}) > 1, "images are decided on apart"
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[dtype]}
    assert not wrong, wrong
    return found


def gradients(model: MIAFormer, images: Tensor, device: torch.device) -> dict[str, float]:
    """Of the loss by weights, sparse against masked, in float32."""
    found = []
    trace = model.run(images, price=1.0).trace
    for execution in ("sparse", "masked"):
        ours = copy.deepcopy(model).to(device).eval()
        output = ours.run(images.to(device), Fixed(trace), execution=execution)  # type: ignore[arg-type]
        output.logits.square().mean().backward()
        found.append([p.grad for p in ours.backbone.parameters() if p.grad is not None])
    apart = max(_apart(sparse, masked) for sparse, masked in zip(*found, strict=True))
    assert apart <= 1e-3, apart
    return {"sparse against masked": apart}


def synchronisations(model: MIAFormer, images: Tensor, device: torch.device) -> dict[str, Any]:
    """How often the host waits for the device in a run: decisions are read once a block, and images checked once."""
    if device.type != "cuda":
        return {"not counted": f"on {device.type}"}
    ours, there = copy.deepcopy(model).to(device, torch.bfloat16).eval(), images.to(device, torch.bfloat16)
    found: dict[str, Any] = {"blocks": len(ours.backbone.blocks)}
    for name, settings in {"everything": {}, "decided": {"price": 1.0}, "capped": {"price": 1.0, "cap": 0.6}}.items():
        with torch.inference_mode():
            ours.run(there, **settings)  # what is made once
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    ours.run(there, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places: dict[str, int] = {}
        for one in said:
            if "synchroniz" in str(one.message):
                place = f"{Path(one.filename).name}:{one.lineno}"
                places[place] = places.get(place, 0) + 1
        found[name] = {"in all": sum(places.values()), "by place": places}
    return found


def marked_tests(tiny: bool) -> dict[str, Any]:
    """The tests that need CUDA, and those of the engine, where pytest is."""
    chosen = (
        ["tests/test_block.py"] if tiny else ["tests/test_block.py", "tests/test_execution.py", "tests/test_varlen.py"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], capture_output=True, text=True
    )
    said = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
    assert done.returncode == 0 or "No module named pytest" in done.stderr, said
    return {"status": done.returncode, "said": said}


def _model(config: dict[str, Any], shape: dict[str, int], count: int) -> tuple[MIAFormer, Tensor]:
    torch.manual_seed(0)
    model = miaformer.adapt(timm.create_model("vit_small_patch16_224", num_classes=10, **shape), **config).eval()
    generator = torch.Generator().manual_seed(1)
    side = shape["img_size"]
    contrast = torch.linspace(0.2, 1.5, count).view(-1, 1, 1, 1)
    images = contrast * torch.randn(count, 3, side, side, generator=generator)
    draw_controllers(model, images)
    return model, images


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-12))
