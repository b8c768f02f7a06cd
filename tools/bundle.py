"""Puts a trained model into the package: in half precision if that changes no decision on any test image, else whole.

    .venv/bin/python tools/bundle.py runs/cifar10-small/learned/seed0/model cifar10-small --data cifar10/

What stands beside the model in the package (its README.md, the card) is left alone.
"""

from __future__ import annotations

import argparse
import copy

import torch

from miaformer import MIAFormer
from miaformer.data import Batches, build_transform, open_data
from miaformer.model.loading import BUNDLED

BUDGETS = (0.25, 0.35, 0.5, 0.7)


@torch.inference_mode()
def changed(model: MIAFormer, other: MIAFormer, data: str) -> tuple[int, int]:
    """Of the test images at all budgets: how many get another decision, and how many another class."""
    transform = build_transform(model.data_config())
    batches = Batches(open_data(data, "test"), transform, 250, seed=0, shuffle=False, drop_last=False)
    decisions = classes = 0
    for batch in batches.epoch(0):
        for budget in BUDGETS:
            one, two = (m.run(batch.images, budget=budget) for m in (model, other))
            traces = (
                (one.trace.depth, two.trace.depth),
                (one.trace.heads, two.trace.heads),
                (one.trace.tokens, two.trace.tokens),
            )
            decisions += int(torch.stack([(a != b).flatten(1).any(dim=1) for a, b in traces]).any(dim=0).sum())
            classes += int((one.logits.argmax(dim=1) != two.logits.argmax(dim=1)).sum())
    return decisions, classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that `miaformer train` or `compare` wrote")
    parser.add_argument("name", help="under which it is loaded")
    parser.add_argument("--data", required=True, help="whose test images tell whether half precision changes anything")
    args = parser.parse_args()
    model = MIAFormer.from_pretrained(args.model).float().eval()
    rounded = copy.deepcopy(model).half()
    decisions, classes = changed(model, copy.deepcopy(rounded).float(), args.data)
    print(f"half precision changes {decisions} decisions and {classes} classes")
    kept = model if decisions else rounded
    directory = BUNDLED / args.name
    card = directory / "README.md"
    told = card.read_text() if card.exists() else None
    kept.save_pretrained(directory)
    if told is not None:
        card.write_text(told)
    print(f"{directory.relative_to(BUNDLED.parents[2])}: {sum(p.stat().st_size for p in directory.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
