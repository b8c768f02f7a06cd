"""Where the time of one batch goes: kernels, and the gaps between them, in which the device waits for the host."""

from __future__ import annotations

import copy
import time
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import miaformer
from miaformer.evaluation.drawn import draw_controllers

from .record import Record

MODELS = {"deit_small_patch16_224": (64, 256), "vit_base_patch14_dinov2": (64,)}
TINY_MODELS = {"vit_tiny_patch16_224": (2,)}


def run(record: Record, device: torch.device, tiny: bool) -> None:
    for name, batches in (TINY_MODELS if tiny else MODELS).items():
        for batch in batches:
            record.step(f"kernels of {name}, batch {batch}", lambda n=name, b=batch: profiled(n, b, device), 60)


def profiled(name: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a batch, dense and at half of the MACs: in all, of kernels, and of the ten dearest ones."""
    torch.manual_seed(0)
    model = miaformer.adapt(timm.create_model(name, num_classes=10, img_size=224))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *model.image_size(), generator=generator)
    images *= torch.linspace(0.2, 1.5, batch).view(-1, 1, 1, 1)
    model.to(device)
    draw_controllers(model, images.to(device))
    model.calibration = None
    ours = copy.deepcopy(model).to(dtype).eval()
    there = images.to(device, dtype)
    with torch.inference_mode():
        price = _price_of_half(ours, there)
        calls = {"dense": lambda: ours.backbone(there), "ours": lambda: ours.run(there, price=price)}
        found: dict[str, Any] = {"macs_fraction": float(ours.run(there, price=price).trace.macs_fraction.mean())}
        for kind, call in calls.items():
            for _ in range(3):
                call()
            found[kind] = _profile(call, device)
    return found


def _price_of_half(model: miaformer.MIAFormer, images: torch.Tensor) -> float:
    low, high = 1e-3, 1e3
    for _ in range(12):
        middle = (low * high) ** 0.5
        spent = float(model.run(images, price=middle).trace.macs_fraction.mean())
        low, high = (middle, high) if spent > 0.5 else (low, middle)
    return high


def _profile(call: Any, device: torch.device) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    rounds = 5
    began = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ms = 1000 * (time.perf_counter() - began) / rounds
    with profile(activities=activities) as seen:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, column))
    if device.type == "cuda":
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(getattr(event, column) for event in events) / 1000
    return {
        "ms": ms,
        "busy_ms": busy,
        "gaps": max(0.0, 1 - busy / ms),
        "launches": sum(event.count for event in events),
        "dearest": [[event.key[:90], event.count, getattr(event, column) / 1000] for event in events[:10]],
        "peak_mb": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
    }
