"""What does each part of a look earn? A model that chooses resolutions: one look or two, with early exits or without,
and the blocks before which images may leave.

    python benchmarks/looks.py --model RUN/learned/seed0/model --data IMAGES --json benchmarks/results/looks-NAME.json

The answers after every block, in every size, are computed once on the calibration and the test images. Each variant's
sizes and thresholds are then chosen on the calibration images as calibration does; accuracy and MACs are of the test
images.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

import miaformer
from miaformer.data import open_data
from miaformer.evaluation.calibration import View, choose_looks, leaving_views
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.on_data import ordered_batches
from miaformer.model.early_exit import ASKING, NEVER, EarlyExit, left_at, macs_of_leaving
from miaformer.model.looks import Looks, row_of
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Look
from miaformer.model.resolution import Size

Answers = dict[Size, Tensor]  # (n, L, classes), after each block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model that chooses resolutions")
    parser.add_argument("--data", required=True, help="its data set")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = miaformer.load(args.model).eval()
    calibration, _ = answers_of(model, args.data, "calibration")
    test, labels = answers_of(model, args.data, "test")
    depth = model.cost().depth
    half, last = depth // 2, depth - 1
    variants = {
        "two looks": Variant((), 2),
        "one look, with exits": Variant(tuple(range(half, depth, 2)), 1),
        "two looks, with exits": Variant(tuple(range(half, depth, 2)), 2),
        "exits before every block of the second half": Variant(tuple(range(half, depth)), 2),
        "exits from a third of the depth on": Variant(tuple(range(depth // 3, depth, 2)), 2),
        "exits before one block": Variant((half + (last - half) // 2,), 2),
    }
    rows, least = [], model.least_macs() / model.cost().backbone
    for name, variant in variants.items():
        table = variant.table(model, calibration)
        for budget in args.budgets:
            row = row_of(table, budget, least)
            if row is not None:
                accuracy, macs = variant.spent(model, row, test, labels)
                rows.append(
                    {
                        "variant": name,
                        "exits": variant.exits,
                        "budget": budget,
                        "accuracy": accuracy,
                        "macs_fraction": macs,
                    }
                )
                print(f"{name:44s} {budget:.2f}  {accuracy:5.2f} % at {macs:.3f}", flush=True)
    if args.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "environment": describe_environment(torch.device("cpu"), 0),
        }
        args.json.write_text(json.dumps({"images": len(labels), "rows": rows, **about}, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Variant:
    exits: tuple[int, ...]  # blocks before which images may leave
    looks: int

    def table(self, model: MIAFormer, answers: Answers) -> tuple[Looks, ...]:
        views = []
        for size in model.image_sizes():
            whole, each = model.cost().backbone, self._asked(answers[size])
            fraction = model.cost(size).everything / whole
            views.append(View.of(each[:, -1], torch.full((len(each),), fraction).double()))
            views += leaving_views(fraction, each, self._macs(model, size))
        return choose_looks(views, between=False, looks=self.looks)

    def spent(self, model: MIAFormer, row: Looks, answers: Answers, labels: Tensor) -> tuple[float, float]:
        """Accuracy in per cent, and the mean MACs."""
        table = {model.cost(size).everything / model.cost().backbone: size for size in model.image_sizes()}
        first, second = (table[min(table, key=lambda one, w=w: abs(one - w))] for w in (row.first, row.second))  # type: ignore[misc]
        each = self._asked(answers[first])
        confidence = each.softmax(dim=2).amax(dim=2)
        left = left_at(confidence, row.leave) if row.leave < NEVER else torch.full((len(each),), each.shape[1] - 1)
        images = torch.arange(len(each))
        again = confidence[images, left] < row.confidence
        given = torch.where(again, answers[second][:, -1].argmax(dim=1), each[images, left].argmax(dim=1))
        asking = self._macs(model, first)[left]
        if row.leave == NEVER:
            asking = torch.full((len(each),), model.cost(first).everything / model.cost().backbone).double()
        macs = asking + again * model.cost(second).everything / model.cost().backbone
        return 100 * float((given == labels).double().mean()), float(macs.mean())

    def _asked(self, answers: Tensor) -> Tensor:
        return answers[:, [*(index - 1 for index in self.exits), answers.shape[1] - 1]]

    def _macs(self, model: MIAFormer, size: Size) -> Tensor:
        return torch.tensor(macs_of_leaving(model.cost(size), self.exits)).double() / model.cost().backbone


@torch.inference_mode()
def answers_of(model: MIAFormer, data: str, split: str) -> tuple[Answers, Tensor]:
    batches = list(ordered_batches(model, open_data(data, split)).epoch(0))
    found: dict[Size, list[Tensor]] = {size: [] for size in model.image_sizes()}
    policy = EarlyExit(model.backbone, ASKING, tuple(range(1, model.cost().depth)))
    for batch in track(batches, description=split):
        for size, parts in found.items():
            logits = model.run(batch.images, policy=Look(policy, (size,))).logits
            parts.append(torch.stack([*policy.answers, logits], dim=1).float())
    return {size: torch.cat(parts) for size, parts in found.items()}, torch.cat([batch.labels for batch in batches])


if __name__ == "__main__":
    main()
