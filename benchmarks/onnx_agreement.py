"""Does the exported model decide and classify as PyTorch does? DeiT-S with drawn controllers, on pictures.

    .venv/bin/python benchmarks/onnx_agreement.py --data PICTURES

Exports at each budget, runs both on every picture, and writes benchmarks/results/onnx-agreement.json: the share of
pictures with any decision that differs, and the greatest difference of logits, relative to their scale, over the
pictures where none does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.progress import track

import miaformer
from miaformer.data import build_transform
from miaformer.data.unlabelled import read_pictures
from miaformer.evaluation.drawn import draw_controllers
from miaformer.evaluation.environment import describe_environment
from miaformer.export import export_onnx, open_session

RESULTS = Path(__file__).parent / "results" / "onnx-agreement.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of pictures")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = miaformer.adapt(timm.create_model(args.model)).eval()
    pictures = read_pictures(args.data, build_transform(model.data_config()), args.pictures + 32, args.seed)
    images, held_out = pictures[:-32], pictures[-32:]
    draw_controllers(model, held_out, args.seed)
    miaformer.calibrate(model, [_Batch(held_out)], "pictures")
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx", trace=True)
        session = open_session(Path(folder) / "model.onnx")
        rows = [compared(model, session, images, budget) for budget in args.budgets]
    result = {
        "command": f"python benchmarks/onnx_agreement.py --data PICTURES --pictures {args.pictures}",
        "model": args.model,
        "pictures": len(images),
        "rows": rows,
        "environment": describe_environment(torch.device("cpu"), args.seed),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(
            f"budget {row['budget']:g}: {row['macs_fraction']:.3f} of the MACs, decisions differ on "
            f"{100 * row['differing_share']:.1f} % of pictures, logits elsewhere by {row['logits_difference']:.1e}"
        )
    print(f"written to {args.json}")


def compared(model: Any, session: Any, images: torch.Tensor, budget: float) -> dict[str, float]:
    """One budget, picture by picture."""
    differing, worst, spent = 0, 0.0, []
    for image in track(images.split(1), description=f"budget {budget:g}"):
        with torch.inference_mode():
            ours = model.run(image, budget=budget)
        feed = {"images": image.numpy(), "budget": np.array(budget, np.float32), "cap": np.array(2.0, np.float32)}
        names = [output.name for output in session.get_outputs()]
        theirs = dict(zip(names, session.run(names, feed), strict=True))
        spent.append(float(ours.trace.macs_fraction))
        same = all(
            np.array_equal(getattr(ours.trace, name).numpy(), theirs[name]) for name in ("depth", "heads", "tokens")
        )
        if not same:
            differing += 1
            continue
        logits = ours.logits.numpy()
        worst = max(worst, float(np.abs(logits - theirs["logits"]).max() / np.abs(logits).max()))
    return {
        "budget": budget,
        "macs_fraction": float(np.mean(spent)),
        "macs_fraction_std": float(np.std(spent)),
        "differing_share": differing / len(images),
        "logits_difference": worst,
    }


class _Batch:
    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.labels = images, torch.zeros(len(images), dtype=torch.long)


if __name__ == "__main__":
    main()
