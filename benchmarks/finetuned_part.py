"""A fine-tuned backbone as what it differs by from its pretrained weights: 12 MB for a ViT-S, so that it can be kept.

    python benchmarks/finetuned_part.py pack MODEL WEIGHTS PART --name TIMM_NAME
    python benchmarks/finetuned_part.py unpack PART WEIGHTS OUT

MODEL and OUT are model directories, WEIGHTS is the pretrained file, PART an npz file. Differences of matrices are
rounded to 31 steps with a scale a row, everything else is kept as it is. Measure on what `unpack` gives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from miaformer import MIAFormer, adapt

DIFFERENCE, SCALE = "difference", "scale"  # after a colon, of the parameter that comes before it
STEPS = 15  # on each side of zero


def create(name: str, weights: str, image_size: int, num_classes: int) -> VisionTransformer:
    """The pretrained backbone, position embeddings resampled."""
    return timm.create_model(
        name,
        pretrained=True,
        img_size=image_size,
        num_classes=num_classes,
        pretrained_cfg_overlay={"file": weights},
    )


def pack(model: str, weights: str, part: str, name: str) -> None:
    tuned = MIAFormer.from_pretrained(model).to_timm()
    shape = {"image_size": tuned.patch_embed.img_size[0], "num_classes": tuned.num_classes}
    before = create(name, weights, **shape).state_dict()
    packed = {}
    for key, value in tuned.state_dict().items():
        if value.ndim < 2 or key.startswith("head"):
            packed[key] = value.numpy()
            continue
        rows = (value - before[key]).flatten(1)
        scale = (rows.abs().amax(dim=1, keepdim=True) / STEPS).clamp(min=1e-12)
        packed[f"{key}:{DIFFERENCE}"] = (rows / scale).round().to(torch.int8).numpy()
        packed[f"{key}:{SCALE}"] = scale.numpy()
    described = {"name": name, **shape, "pretrained_cfg": dict(tuned.pretrained_cfg)}
    np.savez_compressed(part, backbone=np.array(json.dumps(described, default=str)), **packed)


def unpack(part: str, weights: str, out: str) -> None:
    with np.load(part) as arrays:
        described = json.loads(str(arrays["backbone"]))
        pretrained_cfg = described.pop("pretrained_cfg")
        backbone = create(weights=weights, **described)
        state = backbone.state_dict()
        for key in arrays.files:
            name, _, kind = key.partition(":")
            if kind == DIFFERENCE:
                difference = torch.from_numpy(arrays[key] * arrays[f"{name}:{SCALE}"])
                state[name] = state[name] + difference.view_as(state[name])
            elif not kind and name != "backbone":
                state[name] = torch.from_numpy(arrays[key])
    backbone.load_state_dict(state)
    backbone.pretrained_cfg = backbone.default_cfg = pretrained_cfg
    adapt(backbone).save_pretrained(Path(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write PART")
    for argument in ("model", "weights", "part"):
        packing.add_argument(argument)
    packing.add_argument("--name", required=True, help="timm's, of the pretrained weights")
    unpacking = commands.add_parser("unpack", help="write OUT")
    for argument in ("part", "weights", "out"):
        unpacking.add_argument(argument)
    args = vars(parser.parse_args())
    {"pack": pack, "unpack": unpack}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
