"""`miaformer compare`: our method against baselines, one backbone, trained and measured alike."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_device, seed_number
from miaformer.cli.processes import (
    STOPPED,
    add_processes,
    chosen_processes,
    is_first_process,
    is_one_of_several,
    run_in_processes,
    say_stopped,
)

if TYPE_CHECKING:
    from miaformer.lab.comparison import Comparison
    from miaformer.lab.comparison.harness import Run

DESCRIPTION = """\
Train and measure methods that adapt one backbone, and plot their curves together: accuracy over MACs and over time.

All methods start from the same backbone (the recipe's first stage, its pretrained weights, or --backbone). Those that
train do so for the same number of epochs, with the same teacher and augmentation. Each method is timed on the fastest
engine that runs it, at batch sizes 1 and 32, next to the backbone on its own fastest engine. DIR keeps what is trained
and measured, and a later call does not repeat it, so a comparison can grow over days. Ctrl-C saves the state, and the
same command continues.

methods:
  learned        our method; the `static` and `random` policies are measured on its weights at the same budgets
  dense          the backbone, trained further for the same number of epochs
  shallow-0.35 shallow-0.5 shallow-0.7
                 static ViTs with fewer blocks: the first ones of the backbone
  resolution resolution-free
                 smaller images; fine-tuned on all sizes at once, and without training
  resolution-looks
                 the model of `resolution`: a small image first, a larger one if the answer is not confident
  int8           the backbone in 8-bit integers, without training, run by ONNX Runtime
  cls-attention  EViT: keeps the tokens that the class token attends to
  top-tokens     DynamicViT: keeps the tokens that trained scorers prefer
  merging merging-free
                 ToMe: merges similar tokens; fine-tuned, and without training
  exits          executes blocks until the classifier is confident
  even-exits     the same on an evenly spread share of the tokens: our method without controllers
  ablations      all of: only-depth only-heads only-tokens no-depth no-heads no-tokens all-grains no-elastic
                 no-supervised no-reinforce only-reinforce no-distillation subset-heads coupled-mlp full-mlp
                 later-tokens per-block-tokens content-tokens, and only-0.35 only-0.5 only-0.7 (trained for one
                 budget)
"""

EPILOG = """\
examples:
  miaformer compare --recipe cifar10-small --data cifar10/ --out runs/compare --methods learned dense
  miaformer compare --recipe cifar10-small --data cifar10/ --out runs/compare --json compare.json --plot compare.png
      all default methods, with three seeds of `learned`
  miaformer compare --recipe cifar10-small --data cifar10/ --out runs/quick --epochs-scale 0.1 --test-images 1000
      a quick look
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "compare", "train and measure our method against baselines", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="recipe with adaptation stages, and usually with a backbone stage"
    )
    parser.add_data("data set: a folder, a CSV file, or a name that timm knows (default: the recipe's)")
    parser.add_argument(
        "--backbone",
        metavar="MODELDIR",
        help="model directory whose fine-tuned backbone all methods share (default: the recipe's)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="directory for runs; existing runs in it are reused"
    )
    parser.add_argument("--methods", nargs="+", metavar="M", help="methods listed above (default: all but ablations)")
    parser.add_several("--seeds", "N", seed_number, (0, 1, 2), "seeds of `learned`; other methods have one")
    parser.add_budgets((0.25, 0.35, 0.5, 0.7))
    parser.add_number("--epochs-scale", 1.0, "make every stage X times as long", "X")
    parser.add_argument(
        "--test-images", type=int, metavar="N", help="measure on the first N test images (default: all)"
    )
    parser.add_argument("--only-measured", action="store_true", help="show existing results; train and measure nothing")
    parser.add_argument(
        "--no-times", action="store_true", help="skip timing, to run it in a later call on an idle machine"
    )
    parser.add_argument(
        "--only-times",
        action="store_true",
        help="time the methods that are measured but not timed yet; their models must be in DIR",
    )
    parser.add_outputs("all figures", "the curves")
    parser.add_argument(
        "--pictures",
        metavar="FILE.png",
        help="draw the cheapest and the most expensive images of each class to this file",
    )
    parser.add_device()
    add_processes(parser)
    parser.add_argument("--train", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)  # of its own processes
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from miaformer.lab.comparison import ABLATIONS, BASELINES, Comparison
    from miaformer.lab.comparison.harness import runs
    from miaformer.lab.comparison.method import adapting
    from miaformer.model.budget import check_fraction
    from miaformer.training import get_recipe

    device = open_device(args.device, args.threads)
    recipe = get_recipe(args.recipe).scaled(args.epochs_scale)
    adapting(recipe)  # or say that there is nothing to compare
    data = args.data or recipe.data
    if not data:
        raise ValueError(f"recipe {recipe.name!r} has no data of its own: give --data")
    if args.only_times and (args.no_times or args.only_measured):
        raise ValueError("--only-times goes neither with --no-times nor with --only-measured")
    if args.test_images is not None and args.test_images < 10:
        raise ValueError(f"--test-images {args.test_images}: give at least 10")
    budgets = tuple(sorted({check_fraction("budget", budget) for budget in args.budgets}))
    given = None if args.backbone is None else Path(args.backbone)
    comparison = Comparison(recipe, data, Path(args.out), budgets, args.test_images, given)
    on = "cpu" if device.type == "cpu" else None
    if args.train is not None:
        return _train(comparison, args.train, on)
    groups = {"ablations": list(ABLATIONS)}
    named = [name for given in args.methods or ["learned", *BASELINES] for name in groups.get(given, [given])]
    wanted = runs(named, args.seeds)
    if args.only_times:
        _time([one for one in wanted if comparison.is_measured(one)], comparison, device)
    elif not args.only_measured:
        processes = chosen_processes(args.processes, on == "cpu")
        status = _do_what_is_missing(args, comparison, wanted, processes, device)
        if status:
            return status
    measured = [one for one in wanted if comparison.is_measured(one)]
    _report(args, comparison, measured, [one for one in wanted if one not in measured])
    return 0


def _do_what_is_missing(
    args: argparse.Namespace, comparison: Comparison, wanted: list[Run], processes: int, device: Any
) -> int:
    """Train and measure, one run after the other; the exit status of the first training to fail, else 0."""
    from miaformer.cli.output import LiveProgress, console
    from miaformer.data import open_data

    say = console(stderr=True).print
    if not comparison.backbone_is_trained():
        open_data(comparison.data, "train")  # or say what is wrong with it, before anything is begun
        say(f"{'Training' if comparison.trains_backbone else 'Fetching'} the shared backbone ...")
        status = _in_processes(args, ["backbone", "0"], comparison, processes, device)
        if status:
            return status
    for place, one in enumerate(wanted, start=1):
        what = f"{one.method.name}, seed {one.seed} ({place} of {len(wanted)})"
        is_trained = comparison.is_trained(one)  # or another recipe was, and says so
        if comparison.is_done(one, timed=not args.no_times):
            continue
        if not is_trained:
            say(f"Training {what}: {one.method.about} ...", markup=False)
            status = _in_processes(args, [one.method.name, str(one.seed)], comparison, processes, device)
            if status:
                return status
        if not comparison.is_measured(one) and is_first_process():
            say(f"Measuring {what} ...", markup=False)
            with LiveProgress({}) as on_progress:
                comparison.measure(one, device, on_progress)
        if not args.no_times and is_first_process():
            _time([one], comparison, device)
    return 0


def _time(measured: list[Run], comparison: Comparison, device: Any) -> None:
    """Those that are not timed yet."""
    from miaformer.cli.output import console

    say = console(stderr=True).print
    for one in measured:
        if not comparison.is_timed(one):
            say(f"Timing {one.method.name}, seed {one.seed} ...", markup=False)
            comparison.time(one, device)


def _in_processes(
    args: argparse.Namespace, what: list[str], comparison: Comparison, processes: int, device: Any
) -> int:
    if processes == 1 or is_one_of_several():
        return _train(comparison, what, "cpu" if device.type == "cpu" else None)
    return run_in_processes([*args.argv, "--device", "cpu", "--train", *what], processes)


def _train(comparison: Comparison, what: list[str], device: str | None) -> int:
    from miaformer.lab.comparison import METHODS
    from miaformer.lab.comparison.harness import Run
    from miaformer.training import Interrupted

    name, seed = what[0], int(what[1])
    try:
        if name == "backbone":
            comparison.train_backbone(device)
        else:
            comparison.train(Run(METHODS[name], seed), device)
    except Interrupted as stop:
        say_stopped(stop, "The same command goes on from there.")
        return STOPPED
    return 0


def _report(args: argparse.Namespace, comparison: Comparison, measured: list[Run], missing: list[Run]) -> None:
    import torch

    from miaformer.cli.output import print_table, say, write_outputs
    from miaformer.evaluation.environment import describe_environment
    from miaformer.lab.comparison.report import comparison_report
    from miaformer.reports.comparison_plot import plot_comparison

    found = comparison_report([comparison.directory(one) for one in measured], comparison.backbone.parent)
    environment = describe_environment(torch.device("cpu"), 0)
    report = {"recipe": comparison.recipe.to_json(), **found, "environment": environment}
    print_table(comparison_table(report))
    for line in conclusions(report):
        say(line)
    for one in missing:
        say(f"not measured: {one.method.name}, seed {one.seed}")
    title = f"{comparison.recipe.name}, {report['num_images']:,} test images"
    write_outputs(args, report, lambda file: plot_comparison(report["rows"], file, title))
    if args.pictures:
        learned = next((one for one in measured if one.method.name == "learned"), None)
        if learned is None:
            raise ValueError("--pictures shows what `learned` does, which is not measured yet")
        _draw_classes(comparison, learned, args.pictures)
        say(f"wrote {args.pictures}")


def comparison_table(report: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from miaformer.reports.comparison_rows import COLUMNS, OURS, written

    shown = Table(
        caption=f"{report['num_images']:,} test images; intervals of 95 % over images; hardest: the tenth with the "
        "greatest dense loss; ours minus it: the lead of `learned`, in points. MACs and time: of the backbone's."
    )
    shown.add_column(COLUMNS[0], no_wrap=True)
    for name in COLUMNS[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    rows = written(report["rows"], report["differences"])
    for (row, cells), (following, _) in zip(rows, [*rows[1:], ({"budget": -1.0}, ())], strict=True):
        style = "bold" if row["name"] == OURS else None
        shown.add_row(*cells, style=style, end_section=following["budget"] != row["budget"])
    return shown


def conclusions(report: Mapping[str, Any]) -> Iterator[str]:
    from miaformer.reports.comparison_rows import OURS, between

    for name, fraction in report["at_equal_accuracy"].items():
        yield f"{name}: half a point below dense at {fraction:.3f} of the MACs"
    below = report["one_point_below"]
    for name, one in below.get("methods", {}).items():
        yield f"{name}: one point below dense at {one['macs_fraction']:.3f} {between(one['interval'])} of the MACs"
    best = below.get("best_baseline")
    if best is not None:
        ratio = f"{best['ratio']:.3f} {between(best['ratio_interval'])}"
        yield f"There ours takes {ratio} of the MACs of the best baseline, {best['name']}."
    for at in report["adaptivity"]:
        yield (
            f"Does compute follow difficulty? At {at['budget']:g}: rank correlation of MACs with the backbone's loss "
            f"{at['loss']:+.3f}, with minus its margin {at['margin']:+.3f}."
        )
    share = report["adaptation"].get(OURS, {}).get("share_of_backbone")
    if share is not None:
        yield f"Adapting took {share:.2f} of the time that training the backbone took."


def _draw_classes(comparison: Comparison, learned: Run, path: str) -> None:
    from miaformer.data import open_data
    from miaformer.reports.comparison_pictures import plot_classes

    budget = comparison.budgets[len(comparison.budgets) // 2]
    classes = open_data(comparison.data, "test").classes
    plot_classes(comparison.model(learned), comparison.batches("test"), path, budget, classes)
