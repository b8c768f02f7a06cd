"""`miaformer demo`: end to end on built-in data: train, calibrate, evaluate, time, draw."""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_batches, open_device
from miaformer.cli.demo_pictures import BUNDLED_MODEL, show_pictures
from miaformer.cli.processes import (
    STOPPED,
    add_processes,
    chosen_processes,
    is_one_of_several,
    run_in_processes,
    say_stopped,
)
from miaformer.data.files import holds_run

if TYPE_CHECKING:
    import torch

    from miaformer.data import Batches
    from miaformer.evaluation import Contender
    from miaformer.model.model import MIAFormer

DESCRIPTION = """\
Train a small adaptive ViT on built-in images of digits, calibrate its budgets, and show the results: accuracy at
three budgets, against policies of equal cost that do not look at the image; the cost of images (mean, 95th percentile
and maximum); and the measured time, relative to the dense model in eager PyTorch.

DIR gets model/ (ready for `miaformer eval` and `predict`), report.json, tradeoff.png and digits.png. After Ctrl-C,
the same command continues where it stopped. With --pictures, nothing is trained: the command runs a model that comes
with the package.
"""

EPILOG = """\
examples:
  miaformer demo
  miaformer demo --out /tmp/demo --seed 1 --threads 2
  miaformer demo --pictures photos/ cat.jpg
      train nothing: show what a bundled model predicts for your images, and what it spends on each

In small models at batch size 1, the overhead of each operation dominates, so time falls less than MACs.
"""

BUDGETS = (0.35, 0.5, 0.7)
TIMED_BATCHES = {1: 12, 64: 2}  # batch size: how many batches of test images are timed
TIMED_PAIRS = 3  # of each


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "demo", "train, evaluate and plot a small model", DESCRIPTION, EPILOG)
    parser.add_argument("--out", default="demo", metavar="DIR", help="output directory (default: demo)")
    parser.add_seed("training and of the random policy")
    parser.add_argument("--recipe", default="digits", metavar="R", help="recipe with data of its own (default: digits)")
    parser.add_number("--epochs-scale", 1.0, "train X times as long", "X")
    parser.add_device()
    add_processes(parser)
    parser.add_argument(
        "--pictures",
        nargs="+",
        metavar="PATH",
        help=f"train nothing, and run the bundled model {BUNDLED_MODEL} on images and folders of images",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    device = open_device(args.device, args.threads)
    if args.pictures:
        return show_pictures(args.pictures, out, device)
    processes = chosen_processes(args.processes, device.type == "cpu")
    if processes > 1 and not is_one_of_several() and not (out / "model" / "calibration.json").exists():
        status = run_in_processes([*args.argv, "--device", "cpu"], processes)  # each trains and comes back from here
        if status:
            return status
    return _train_and_show(args, out, device)


def _train_and_show(args: argparse.Namespace, out: Path, device: torch.device) -> int:
    """Train what is not trained yet, then show it; one of several processes has trained only."""
    from miaformer.training import Interrupted, get_recipe, train_recipe, trained_model

    recipe = get_recipe(args.recipe).scaled(args.epochs_scale)
    if not recipe.data:
        raise ValueError(f"--recipe {args.recipe} has no data of its own; use `miaformer train` with --data")
    model = trained_model(recipe, out, seed=args.seed)
    if model is None:
        resume = holds_run(out)
        on = "cpu" if device.type == "cpu" else None
        try:
            model = train_recipe(recipe, out, seed=args.seed, resume=resume, device=on)
        except Interrupted as stop:
            say_stopped(stop, "The same command goes on from there.")
            return STOPPED
    if not is_one_of_several():
        show(model.to(device), recipe.data, out, args.seed)
    return 0


def show(model: MIAFormer, data: str, out: Path, seed: int) -> None:
    """Evaluate and time a calibrated model on the test split, print the table, and write report and pictures."""
    from miaformer.cli.output import LiveProgress, print_table, report_notes, report_table, say, write_json
    from miaformer.data import open_data
    from miaformer.evaluation import compare, contenders
    from miaformer.reports.plots import plot_adaptivity, plot_tradeoff

    test = open_batches(model, open_data(data, "test"), 64)
    held_out = open_batches(model, open_data(data, "calibration"), 64)
    totals = {"controls": len(held_out.data), "evaluate": len(test.data)}
    with LiveProgress(totals) as on_progress:
        found, left_out = contenders(model, BUDGETS, calibration=held_out.epoch(0), seed=seed, on_progress=on_progress)
        report = compare(model, test.epoch(0), found, seed=seed, on_progress=on_progress, left_out=left_out)
        rows = _timed(model, found, test, on_progress)
    report = {"model": str(out / "model"), "data": test.data.name, **report, "timing": rows}

    print_table(report_table(report))
    for note in report_notes(report):
        say(note)
    if max(row["time_fraction"] for row in rows) > 1:
        say(
            "Time is that of eager PyTorch. A model this small spends it on the overhead of each operation, not on "
            "MACs: here skipping saves little or nothing."
        )

    write_json(out / "report.json", report)
    plot_tradeoff(report, out / "tradeoff.png")
    middle = [contender.budget for contender in found if contender.name == "learned"]
    budget = middle[len(middle) // 2] if middle else None
    plot_adaptivity(model, test.epoch(0), out / "digits.png", budget, classes=test.data.classes)
    for name, what in (
        ("model", "the model"),
        ("report.json", "all numbers"),
        ("tradeoff.png", "accuracy over MACs"),
        ("digits.png", "the images that get the least and the most compute"),
    ):
        say(f"{out / name}: {what}")


def _timed(model: MIAFormer, found: list[Contender], test: Batches, on_progress: Any) -> list[dict[str, Any]]:
    """Time against dense of every contender at each batch size of `TIMED_BATCHES`."""
    import torch

    from miaformer.evaluation import time_against_dense

    wanted = max(size * count for size, count in TIMED_BATCHES.items())
    some = islice(test.epoch(0), math.ceil(wanted / test.batch_size))
    images = torch.cat([batch.images for batch in some]).to(next(model.parameters()))
    rows = []
    for contender in found:
        for size, count in TIMED_BATCHES.items():
            batches = images[: size * count].split(size)
            times = time_against_dense(model, batches, contender.policy, repeats=TIMED_PAIRS)
            rows.append({"policy": contender.name, "budget": contender.budget, **times})
            on_progress("time", len(rows))
    return rows
