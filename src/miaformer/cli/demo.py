"""`miaformer demo`: end to end on built-in data: train, calibrate, evaluate, draw; then time a ViT of useful size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_batches, open_device
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
    from torch import Tensor

    from miaformer.model.model import MIAFormer
    from miaformer.model.output import Output

DESCRIPTION = """\
Train a small adaptive ViT on built-in images of digits, calibrate its budgets, and show the results: accuracy at
three budgets, against policies of equal cost that do not look at the image; and the cost of images (mean, 95th
percentile and maximum). A model this small gains no time, so at the end the command times one of useful size, DeiT-S
with random weights, at half of the compute and dense, on this machine.

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
"""

BUNDLED_MODEL = "cifar10-small"
MOST_PICTURES = 64
BUDGETS = (0.35, 0.5, 0.7)
TIMED_MODEL = "deit_small_patch16_224"
TIMED_BUDGET = 0.5
TIMED_SECONDS = 15.0


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "demo", "train, evaluate and plot a small model", DESCRIPTION, EPILOG)
    parser.add_argument("--out", default="demo", metavar="DIR", help="output directory (default: demo)")
    parser.add_seed("training and of the random policy")
    parser.add_argument("--recipe", default="digits", metavar="R", help="recipe with data of its own (default: digits)")
    parser.add_number("--epochs-scale", 1.0, "train X times as long", "X")
    parser.add_device()
    parser.add_engine("auto")
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
        # A few images are run in less time than choosing an engine takes.
        return show_pictures(args.pictures, out, device, "eager" if args.engine == "auto" else args.engine)
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
        show(model.to(device), recipe.data, out, args.seed, args.engine)
    return 0


def show(model: MIAFormer, data: str, out: Path, seed: int, engine: str = "auto") -> None:
    """Evaluate a calibrated model on the test split, print the table, time a useful model, and write report and
    pictures.
    """
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
    report = {"model": str(out / "model"), "data": test.data.name, **report}

    print_table(report_table(report))
    for note in report_notes(report):
        say(note)
    say(f"Timing {TIMED_MODEL}, which takes about a minute ...")
    engines = ("eager", "onnx") if engine == "auto" else (engine,)
    report["timing"] = timing = time_useful(next(model.parameters()).device, engines, seed)
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
    for line in speed_lines(timing):
        say(line)


def time_useful(device: torch.device, engines: Sequence[str], seed: int) -> dict[str, Any]:
    """`bench` of a ViT of useful size, one image at a time: random weights, decisions drawn at random."""
    import timm
    import torch

    from miaformer import adapt
    from miaformer.evaluation import bench_data

    torch.manual_seed(seed)
    model = adapt(timm.create_model(TIMED_MODEL)).eval().to(device)
    settings: dict[str, Any] = {"batch_sizes": [1], "budgets": [TIMED_BUDGET], "grains": ["resolution"], "seed": seed}
    return bench_data(model, "digits", engines, seconds=TIMED_SECONDS, calibration_images=8, **settings)


def speed_lines(timing: Mapping[str, Any]) -> list[str]:
    """What half of the compute takes beside the dense model, each on the engine that is fastest here."""
    from miaformer.cli.bench import counted

    rows = [row for row in timing["rows"] if row["budget"] == TIMED_BUDGET]
    if not rows:
        return [f"{TIMED_MODEL} was not timed: {one['engine']}: {one['reason']}." for one in timing["left_out"]]
    row = min(rows, key=lambda row: row["ms"])
    environment, rounds = timing["environment"], counted(row["repeats"], "round")
    threads = counted(environment["threads"], "thread")
    dense, sparse = (
        f"{row['best_dense_ms']:.1f} ms ({row['best_dense_engine']})",
        f"{row['ms']:.1f} ms ({row['engine']})",
    )
    return [
        f"{TIMED_MODEL} on {environment['device']}, {threads}, an image at a time: dense "
        f"{dense}; with {row['macs_fraction']:.2f} of the MACs {sparse}, which is {row['best_time_fraction']:.2f} "
        f"± {row['best_spread']:.2f} of the dense time.",
        f"Medians over {row['images']} images and {rounds}; ± is the interquartile range. Weights are random, "
        "decisions too: only times mean anything.",
    ]


def show_pictures(sources: Sequence[str], out: Path, device: torch.device, engine: str) -> int:
    """Print what it says at each budget, and draw in `out` who gets least and most. Returns the exit status.

    sources: pictures, and folders of pictures; the first `MOST_PICTURES` are shown, broken ones are listed.
    Raises ImageError where there is none that can be read.
    """
    import torch

    from miaformer import Predictor, load
    from miaformer.cli.output import console, say
    from miaformer.data import Batch, build_transform
    from miaformer.data.images import ImageError, open_image
    from miaformer.prediction.sources import find_pictures
    from miaformer.reports.plots import plot_adaptivity

    paths, failed = find_pictures(sources)
    model = load(BUNDLED_MODEL).to(device)
    transform = build_transform(model.data_config())
    pictures: dict[Path, Tensor] = {}
    for path in paths[:MOST_PICTURES]:
        try:
            pictures[path] = transform(open_image(path))
        except ImageError as error:
            failed[str(path)] = str(error).removeprefix(f"{path}: ")
    if not pictures:
        raise ImageError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    images = torch.stack(list(pictures.values())).to(device)
    predictor = Predictor(model, engine=engine)
    outputs = {budget: predictor.run(images, budget=budget) for budget in BUDGETS}
    outputs[1.0] = predictor.run(images)
    names = model.label_names or [str(label) for label in range(model.num_classes)]
    console().print(_pictures_table([path.name for path in pictures], outputs, names))
    for name, reason in failed.items():
        say(f"{name}: {reason}")
    if len(paths) > MOST_PICTURES:
        more = f"{len(paths) - MOST_PICTURES:,} more pictures"
        say(f"{more}: `miaformer predict {BUNDLED_MODEL} PATH ... --out FILE` takes them all")
    if len(pictures) > 1:
        out.mkdir(parents=True, exist_ok=True)
        unknown = torch.full((len(images),), -1)
        batch = Batch(images, unknown, unknown)
        picture = out / "pictures.png"
        plot_adaptivity(model, [batch], picture, BUDGETS[1], classes=names)
        say(f"{picture}: the images that take the least and the most compute")
    return 1 if failed else 0


def _pictures_table(pictures: Sequence[str], outputs: dict[float, Output], names: Sequence[str]) -> Any:
    from rich.table import Table

    caption = f"most likely class out of {', '.join(names)}; in brackets: MACs as a fraction of the dense model's"
    table = Table(caption=caption)
    table.add_column("picture", overflow="ellipsis", no_wrap=True)
    for budget in outputs:
        table.add_column("everything" if budget == 1 else f"budget {budget:g}")
    for place, picture in enumerate(pictures):
        cells = [
            f"{names[int(output.logits[place].argmax())]} ({output.trace.macs_fraction[place]:.2f})"
            for output in outputs.values()
        ]
        table.add_row(picture, *cells)
    return table
