"""What do features lose? Nearest neighbours and a linear probe, on features of a model that was trained without labels.

    python benchmarks/features.py --model RUN/model --name TIMM_NAME --weights FILE --data IMAGES --json FILE

Each variant embeds training and test images. An image's answer is that of its 20 nearest training images (cosine
similarity, weighted as Wu et al. 2018 and DINO do), or of a linear classifier that was fitted to the training images'
features. `against_dense`: the training images are embedded by the dense model as it was, as in an index that exists
already. similarity: of features to the dense model's, mean cosine; patch_similarity: of patch tokens after the final
norm, those of smaller images resampled to the whole grid. Labels are read here alone.

Beside the trained model, in each size and in two sizes mixed at random: the dense backbone as it was; that backbone on
smaller images, with tokens dropped at random, and with tokens merged (ToMe).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import miaformer
from miaformer.data import Batches, ImageData, build_transform, open_data, spread
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.intervals import interval, resampled
from miaformer.lab.baselines.merging import merged_logits, merged_macs, merges_for
from miaformer.lab.comparison.resolution import any_size
from miaformer.model.model import MIAFormer
from miaformer.model.resolution import Size, resized
from miaformer.policy import Random
from miaformer.training.probe import fit

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' weights, as in Wu et al. 2018
Given = tuple[Tensor, Tensor | None]  # features (n, F), and patch tokens (n, N, C) where they are compared
DENSE, OURS = "dense", "ours"


@dataclass(frozen=True)
class Variant:
    name: str
    macs_fraction: float
    embed: Callable[[Tensor], Given]


@dataclass(frozen=True)
class Embedded:
    variant: Variant
    known: Tensor  # features of the training images (m, F)
    asked: Tensor  # of the test images (n, F)
    patches: Tensor | None  # of the test images (n, N, C), bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="trained with recipe features")
    parser.add_argument("--name", required=True, help="timm name of the backbone that it was trained from")
    parser.add_argument("--weights", required=True, help="its checkpoint file")
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5, 0.7])
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=1500)
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16 where that is fast")
    parser.add_argument("--only-ours", action="store_true", help="and the dense model, without baselines")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    ours = miaformer.load(args.model).eval().to(dtype)
    original = miaformer.load_backbone(args.name, args.weights, ours.image_size(), classes=0)
    before = any_size(miaformer.adapt(original.to(dtype), grains=("tokens",)).eval())
    known = spread(open_data(args.data, "train"), args.train_images)
    asked = spread(open_data(args.data, "test"), args.test_images)
    transform = build_transform(ours.data_config())
    batches = [
        list(Batches(data, transform, 50, seed=0, shuffle=False, drop_last=False).epoch(0)) for data in (known, asked)
    ]
    variants = [Variant(DENSE, 1.0, partial(in_size, before, before.image_size()))]
    if not args.only_ours:
        variants += [
            *smaller("smaller images", before),
            *dropping(before, args.budgets),
            *merging(before, args.budgets),
        ]
    variants += [Variant(OURS, fraction_of(ours, ours.image_size()), partial(in_size, ours, ours.image_size()))]
    variants += smaller(OURS, ours)
    found, rows = [], []
    for variant in variants:
        parts = [embedded(variant, part, dtype) for part in batches]
        found.append(Embedded(variant, parts[0][0], *parts[1]))
        rows.append(measured(found[-1], found[0], known, asked))
        show(rows[-1])
    for budget in args.budgets:
        rows.append(measured(mixed(found, budget), found[0], known, asked))
        show(rows[-1])
    if args.json is not None:
        taken = {budget: ours.calibration.within(budget) for budget in args.budgets} if ours.calibration else {}
        about = {"command": " ".join(["python", *sys.argv]), "data": asked.name, "images": [len(known), len(asked)]}
        environment = describe_environment(torch.device("cpu"), 0)
        args.json.write_text(
            json.dumps({**about, "taken": taken, "rows": rows, "environment": environment}, indent=1) + "\n"
        )


# Variants -------------------------------------------------------------------------------------------------------------


def fraction_of(model: MIAFormer, size: Size) -> float:
    return model.cost(size).everything / model.cost().backbone


def in_size(model: MIAFormer, size: Size, images: Tensor) -> Given:
    """Of a model without a classifier, executed whole."""
    tokens = model.forward_features(resized(images, size))
    prefix, (rows, columns) = model.num_prefix_tokens, model.cost(size).grid
    patches = tokens[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    whole = F.interpolate(patches, model.cost().grid, mode="bilinear", align_corners=False)
    return model.forward_head(tokens), whole.flatten(2).transpose(1, 2)


def smaller(name: str, model: MIAFormer) -> list[Variant]:
    sizes = model.image_sizes()[1:]
    return [Variant(name, fraction_of(model, size), partial(in_size, model, size)) for size in sizes]


def merging(model: MIAFormer, budgets: Sequence[float]) -> list[Variant]:
    def embed(merges: list[int], images: Tensor) -> Given:
        return merged_logits(model, images, merges), None

    cost, found = model.cost(), []
    for budget in budgets:
        merges = merges_for(cost, budget)
        found.append(Variant("ToMe", merged_macs(cost, merges) / cost.backbone, partial(embed, merges)))
    return found


def dropping(model: MIAFormer, budgets: Sequence[float]) -> list[Variant]:
    """Tokens that each image drops at random before the first block; how many, is searched for each budget."""
    free = miaformer.adapt(model.to_timm(), grains=("tokens",)).eval()
    example = next(free.parameters()).new_zeros(16, free.backbone.in_chans, *free.image_size())

    def embed(keep: float, images: Tensor) -> Given:
        return free.run(images, Random(tokens=keep, seed=0)).logits, None

    found = []
    for budget in budgets:
        low, high = 0.0, 1.0
        for _ in range(10):
            keep = (low + high) / 2
            spent = float(free.run(example, Random(tokens=keep, seed=0)).trace.macs_fraction.mean())
            low, high = (keep, high) if spent < budget else (low, keep)
        found.append(Variant("random tokens", budget, partial(embed, keep)))
    return found


def mixed(found: Sequence[Embedded], budget: float) -> Embedded:
    """Ours in two neighbouring sizes, drawn at random for each image, for a mean of `budget`."""
    sizes = sorted((one for one in found if one.variant.name == OURS), key=lambda one: one.variant.macs_fraction)
    above = next((one for one in sizes if one.variant.macs_fraction >= budget), sizes[-1])
    below = [sizes[0], *(one for one in sizes if one.variant.macs_fraction <= budget)][-1]
    low, high = below.variant.macs_fraction, above.variant.macs_fraction
    share = (budget - low) / max(high - low, 1e-9)  # of the larger size
    generator = torch.Generator().manual_seed(0)

    def mix(small: Tensor, large: Tensor) -> Tensor:
        return torch.where(torch.rand(len(small), 1, generator=generator) < share, large, small)

    variant = Variant("ours, two sizes at random", budget, below.variant.embed)
    return Embedded(variant, mix(below.known, above.known), mix(below.asked, above.asked), None)


# Measures -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def embedded(variant: Variant, batches: Sequence[Any], dtype: torch.dtype) -> Given:
    title = f"{variant.name} {variant.macs_fraction:.2f}"
    parts = [variant.embed(batch.images.to(dtype)) for batch in track(batches, title, transient=True)]
    features = torch.cat([one for one, _ in parts]).float()
    if parts[0][1] is None:
        return features, None
    return features, torch.cat([patches.bfloat16() for _, patches in parts if patches is not None])


def measured(one: Embedded, dense: Embedded, known: ImageData, asked: ImageData) -> dict[str, Any]:
    labels, answers = torch.from_numpy(known.labels), torch.from_numpy(asked.labels)
    right = (neighbours(one.known, labels, one.asked) == answers).double()
    dense_right = (neighbours(dense.known, labels, dense.asked) == answers).double()
    weights = resampled(len(right))
    patches = None
    if one.patches is not None and dense.patches is not None:
        pairs = zip(one.patches.split(100), dense.patches.split(100), strict=True)
        similar = [F.cosine_similarity(a.float(), b.float(), dim=2).mean(dim=1) for a, b in pairs]
        patches = float(torch.cat(similar).mean())
    return {
        "variant": one.variant.name,
        "macs_fraction": one.variant.macs_fraction,
        "neighbours": float(right.mean()),
        "neighbours_against_dense": float((neighbours(dense.known, labels, one.asked) == answers).double().mean()),
        "gained": float((right - dense_right).mean()),
        "gained_interval": interval((right - dense_right).numpy(), weights),
        "probe": float((probe(one.known, labels, one.asked) == answers).double().mean()),
        "similarity": float(F.cosine_similarity(one.asked, dense.asked, dim=1).mean()),
        "patch_similarity": patches,
    }


def neighbours(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The class (n,) that the nearest of the known features (m, F) say."""
    similarity, nearest = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(asked), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp()).argmax(dim=1)


def probe(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    layer = nn.Linear(known.shape[1], int(labels.max()) + 1)
    fit(layer, known, labels)
    with torch.no_grad():
        return layer(asked).argmax(dim=1)


def show(row: dict[str, Any]) -> None:
    numbers = " ".join(f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float))
    print(f"{row['variant']:<26} {numbers}", flush=True)


if __name__ == "__main__":
    main()
