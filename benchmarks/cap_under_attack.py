"""Does any input break a cap? 10,000 of them, in PyTorch and in the exported ONNX file alike.

    .venv/bin/python benchmarks/cap_under_attack.py --data CIFAR10

A fifth each: images attacked through the decisions to cost the most, images as they are, noise, one colour, and finite
numbers up to 1e38. Writes benchmarks/results/cap-under-attack.json: the most expensive image of each kind, and how many
cost more than the cap.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import miaformer
from miaformer.data import Batches, build_transform, open_data
from miaformer.evaluation import describe_environment
from miaformer.export import export_onnx, open_session, run_session
from miaformer.lab.attacks import Ball, Climb
from miaformer.lab.attacks.compute import raise_macs
from miaformer.lab.attacks.evaluate import frozen
from miaformer.lab.attacks.target import Pixels, adaptive_target

RESULTS = Path(__file__).parent / "results" / "cap-under-attack.json"
BUDGET = 0.7  # above the caps, so that they bind
EPS = 16 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what `miaformer eval --data` takes")
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--caps", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--steps", type=int, default=5, help="of the attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = miaformer.load(args.model).eval()
    kinds = inputs(model, args)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx")
        session = open_session(Path(folder) / "model.onnx")
        rows = [row(model, session, kind, images, cap) for kind, images in kinds.items() for cap in args.caps]
    report = {
        "command": f"python benchmarks/cap_under_attack.py --data CIFAR10 --inputs {args.inputs}",
        "model": args.model,
        "budget": BUDGET,
        "rows": rows,
        "environment": describe_environment(torch.device("cpu"), args.seed),
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    for one in rows:
        print(one)
    print(f"written to {args.json}")


def inputs(model: Any, args: argparse.Namespace) -> dict[str, Tensor]:
    """Normalised, as the model takes them, by kind."""
    count = args.inputs // 5
    rng = torch.Generator().manual_seed(args.seed)
    data = open_data(args.data, "test")
    batches = Batches(data, build_transform(model.data_config()), count, seed=0, shuffle=False, drop_last=False)
    clean = next(iter(batches.epoch(0))).images
    between = Pixels.of(model)
    pixels = between.restored(clean)
    target = adaptive_target(model, model.learned(model.price_of(BUDGET)))
    with frozen(model):
        attacked = [
            raise_macs(target, part, Ball(EPS), Climb(steps=args.steps), seed=args.seed)
            for part in track(pixels.split(200), description="attacking")
        ]
    shape = clean.shape
    extreme = torch.randn(shape, generator=rng) * 10 ** (37 * torch.rand(len(clean), 1, 1, 1, generator=rng))
    return {
        "attacked": between.normalised(torch.cat(attacked)),
        "as they are": clean,
        "noise": between.normalised(torch.rand(shape, generator=rng)),
        "one colour": between.normalised(torch.rand(len(clean), 3, 1, 1, generator=rng).expand(shape)).contiguous(),
        "extreme": extreme,
    }


def row(model: Any, session: Any, kind: str, images: Tensor, cap: float) -> dict[str, Any]:
    with torch.inference_mode():
        spent = np.concatenate(
            [model.run(part, budget=BUDGET, cap=cap).trace.macs_fraction.numpy() for part in images.split(250)]
        )
    exported = []
    for image in track(images.split(1), description=f"ONNX, {kind}, cap {cap:g}"):
        exported.append(run_session(session, image.numpy(), BUDGET, cap)["macs_fraction"].item())
    return {
        "inputs": kind,
        "cap": cap,
        "num_inputs": len(images),
        "pytorch_mean": float(spent.mean()),
        "pytorch_most": float(spent.max()),
        "pytorch_above": int((spent > cap).sum()),
        "onnx_most": float(np.max(exported)),
        "onnx_above": int((np.array(exported) > cap).sum()),
        "differ": float((np.abs(spent - np.array(exported)) > 1e-6).mean()),
    }


if __name__ == "__main__":
    main()
