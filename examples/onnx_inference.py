"""Classify pictures with a file that `miaformer export` wrote: onnxruntime, numpy and pillow are all that it needs.

    python examples/onnx_inference.py model.onnx cat.jpg dog.jpg --budget 0.5

Prints the five likeliest classes, the share of the dense model's compute that each picture took, and the time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--budget", type=float, default=1.0, help="mean compute, a fraction of the dense model's")
    parser.add_argument("--cap", type=float, default=2.0, help="the most that one picture may take; above 1: no cap")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as ONNX Runtime likes")
    args = parser.parse_args()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(args.model), options, providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    data_config, labels = json.loads(known["data_config"]), json.loads(known["label_names"])
    for path in args.pictures:
        image = prepared(Image.open(path), data_config)
        start = time.perf_counter()
        scores, macs = looked(session, image, args.budget, args.cap)
        ms = 1000 * (time.perf_counter() - start)
        best = scores.argsort()[::-1][:5]
        named = ", ".join(f"{labels[i] if labels else i} {100 * scores[i]:.1f} %" for i in best)
        print(f"{path}: {named}; {macs:.3f} of the dense MACs, {ms:.1f} ms")


def looked(session: Any, image: np.ndarray, budget: float, cap: float) -> tuple[np.ndarray, float]:
    """Probabilities (classes,) and MACs; in two looks where the file's table spends this budget so."""
    known = session.get_modelmeta().custom_metadata_map
    table, sizes = (json.loads(known.get(name, "[]")) for name in ("looks", "sizes"))
    rows = [row for row in table if abs(row["budget"] - budget) <= 0.0025]
    if not rows and table and sizes and budget < sizes[-1] - 0.0025:  # below the smallest size: the next row down
        rows = [row for row in table if row["budget"] <= budget][-1:] or table[:1]
    if not rows:
        return run(session, image, budget, cap)
    row = min(rows, key=lambda row: abs(row["budget"] - budget))
    scores, spent = run(session, image, row["first"], cap, row.get("leave", 2.0))
    left = cap - spent
    if scores.max() >= row["confidence"] or not any(spent + 1e-6 < one <= left + 1e-6 for one in sizes or [left]):
        return scores, spent
    scores, more = run(session, image, row["second"], left)
    return scores, spent + more


def run(session: Any, image: np.ndarray, budget: float, cap: float, leave: float = 2.0) -> tuple[np.ndarray, float]:
    """One look, which ends with an early answer of probability `leave`. The file answers whatever it is given, so what
    is no picture is refused here.
    """
    if not np.isfinite(image).all():
        raise ValueError("the image holds NaN or infinite values")
    spend = {"budget": budget, "cap": cap, "leave": leave}
    scalars = {name: np.asarray(value, np.float32) for name, value in spend.items()}
    feed = {one.name: scalars.get(one.name, image) for one in session.get_inputs()}
    logits, macs = session.run(["logits", "macs_fraction"], feed)
    scores = np.exp(logits[0] - logits[0].max())
    return scores / scores.sum(), float(macs[0])


def prepared(picture: Image.Image, data_config: dict[str, Any]) -> np.ndarray:
    """(1, channels, H, W) float32: shorter side to the size over crop_pct, centre cut out, normalised, as timm does."""
    channels, height, width = data_config["input_size"]
    picture = picture.convert("RGB" if channels == 3 else "L")
    scale = [int(side / data_config["crop_pct"]) for side in (height, width)]
    ratio = max(scale[0] / picture.height, scale[1] / picture.width)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    whole = math.floor if height == width else round  # as torchvision and timm do it
    size = whole(picture.width * ratio + 1e-9), whole(picture.height * ratio + 1e-9)
    picture = picture.resize(size, resample.get(data_config["interpolation"], Image.Resampling.BICUBIC))
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, np.float32).reshape(height, width, channels) / 255
    pixels = (pixels - np.array(data_config["mean"], np.float32)) / np.array(data_config["std"], np.float32)
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


if __name__ == "__main__":
    main()
