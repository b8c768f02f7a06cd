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
    wanted = {one.name for one in session.get_inputs()}
    for path in args.pictures:
        feed: dict[str, Any] = {
            "images": prepared(Image.open(path), data_config),
            "budget": np.array(args.budget, np.float32),
            "cap": np.array(args.cap, np.float32),
        }
        start = time.perf_counter()
        logits, macs = session.run(["logits", "macs_fraction"], {k: v for k, v in feed.items() if k in wanted})
        ms = 1000 * (time.perf_counter() - start)
        scores = np.exp(logits[0] - logits[0].max())
        scores /= scores.sum()
        best = scores.argsort()[::-1][:5]
        named = ", ".join(f"{labels[i] if labels else i} {100 * scores[i]:.1f} %" for i in best)
        print(f"{path}: {named}; {macs[0]:.3f} of the dense MACs, {ms:.1f} ms")


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
