"""`miaformer eval`: accuracy per compute of a model, against the dense model and controls of equal cost."""

from __future__ import annotations

import argparse
from typing import Any

from miaformer.cli.arguments import (
    add_command,
    check_positive,
    open_batches,
    open_device,
    open_model,
    own_model,
    say_choice,
)

POLICIES = ("learned", "static", "random", "cls-attention", "full")

DESCRIPTION = """\
Evaluate MODEL on DATA: the accuracy of each policy at each budget, and the compute that images take.

policies:
  learned        the model's own decisions for each image
  static         the mean decisions of the learned policy, the same for every image: the baseline for `learned`
  random         keeps blocks, heads and tokens as often as the learned policy does, but at random
  cls-attention  keeps as many tokens as the budget allows: those that the class token attends to most (EViT)
  full           executes everything
`static` and `random` take the learned policy's means from the calibration split of DATA. --engine runs `learned` and
the dense model; PyTorch runs the other policies.

MODEL may also be timm:NAME, an unadapted timm ViT. It has no learned policy, and it has random weights unless
--weights FILE or --pretrained is given.
"""

EPILOG = """\
examples:
  miaformer eval runs/digits/model --data digits
  miaformer eval runs/photos/model --data photos/ --budgets 0.4 0.6 --cap 0.9 --json report.json --plot report.png
  miaformer eval runs/photos/model --data photos/ --budgets 0.5 --corruptions --severities 1 3 5
  miaformer eval timm:deit_small_patch16_224 --weights photos.pth --data photos/ --policy random full
  miaformer eval timm:deit_small_patch16_224 --pretrained --data imagenet/ --policy random cls-attention full

JSON:
  {"dense": {"accuracy", "macs"},
   "points": [{"policy", "budget", "price", "accuracy", "macs_fraction", "macs_fraction_p95", "macs_fraction_max",
               "macs_fraction_std", "depth_kept", "heads_kept", "tokens_kept"}],
   "adaptivity": {"spearman_difficulty_macs", "by_budget": [...]}, "left_out": [...], "controllers": {...}, "engine",
   "environment": {...}, ...}
  with --corruptions also "corruptions": [{"corruption", "severity", "policy", "budget", "accuracy", "macs_fraction",
               "macs_fraction_max"}]; its policies include the dense model
  macs_fraction is the mean over images, macs_fraction_p95 their 95th percentile. spearman_difficulty_macs is the rank
  correlation, over images, between the dense model's loss and the MACs that the learned policy spends, averaged over
  budgets.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "eval", "measure accuracy per compute, against controls", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_data(required=True)
    parser.add_budgets()
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=POLICIES,
        metavar="P",
        help="policies listed above (default: learned static random; for timm:NAME random full)",
    )
    parser.add_argument(
        "--corruptions",
        nargs="*",
        metavar="C",
        help="also evaluate under the 15 common corruptions of ImageNet-C, or only under those named",
    )
    parser.add_several("--severities", "S", int, (1, 2, 3, 4, 5), "severities of the corruptions")
    parser.add_number("--corrupted-images", 1000, "number of images to corrupt, evenly spaced")
    parser.add_cap()
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure the table from budgets to prices on the calibration split of DATA; MODEL stays unchanged",
    )
    parser.add_seed("the random policy and of random weights")
    parser.add_outputs("the report", "accuracy over MACs")
    parser.add_number("--batch-size", 64, "images per batch")
    parser.add_engine()
    parser.add_dtype()
    parser.add_device()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import (
        LiveProgress,
        print_table,
        report_notes,
        report_table,
        say,
        write_outputs,
    )
    from miaformer.data import open_data, spread
    from miaformer.evaluation import calibrate, evaluate_data
    from miaformer.export.engines import open_engine
    from miaformer.lab.corruptions import CORRUPTIONS, evaluate_corruptions
    from miaformer.reports.plots import plot_tradeoff

    check_positive(args, "corrupted_images")
    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    images = open_data(args.data, "test")
    model = open_model(args.model, device, args.dtype, num_classes=len(images.classes), **own_model(args))
    policies = args.policy or (
        ("random", "full") if args.model.startswith("timm:") else ("learned", "static", "random")
    )
    if model.calibration is None and {"learned", "static"} & set(policies) and not args.calibrate:
        raise ValueError(
            f"{args.model} is not calibrated, so its learned policy knows no budget: add --calibrate to measure its "
            f"table on the calibration split of {args.data}, or choose other policies, e.g. --policy random full"
        )
    open_batches(model, images, args.batch_size)  # or say what does not fit
    held_out = None
    if args.calibrate or model.calibration is not None:
        held_out = open_data(args.data, "calibration")
    totals = {"evaluate": len(images), "controls": 0 if held_out is None else len(held_out)}
    with LiveProgress(totals) as on_progress:
        if args.calibrate and held_out is not None:
            batches = open_batches(model, held_out, args.batch_size)
            calibrate(model, batches.epoch(0), held_out.name, on_progress=on_progress)
        settings: dict[str, Any] = {
            "cap": args.cap,
            "held_out": held_out,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "on_progress": on_progress,
            "engine": open_engine(args.engine, model, on_choice=say_choice) if args.engine != "eager" else None,
        }
        report = {"model": args.model, **evaluate_data(model, images, args.budgets, policies, **settings)}
        if args.corruptions is not None:
            some, names = spread(images, args.corrupted_images), args.corruptions or CORRUPTIONS
            report["corruptions"] = evaluate_corruptions(
                model, some, args.budgets, policies, names, args.severities, **settings
            )
    say(f"{args.model} on {images.name}")
    print_table(report_table(report))
    for note in report_notes(report):
        say(note)
    if model.calibration is None:
        say("The model is not calibrated: it has no learned policy at a budget.")
    elif args.calibrate:
        say(f"Calibrated for this evaluation on {model.calibration.data}.")
    if "corruptions" in report:
        print_table(_corruption_table(report["corruptions"]))
    write_outputs(args, report, lambda file: plot_tradeoff(report, file))
    return 0


def _corruption_table(rows: list[dict[str, Any]]) -> Any:
    """Accuracy, and MACs where they differ between images, mean over severities: a row a corruption."""
    from rich.table import Table

    from miaformer.lab.corruptions import mean_rows

    means = mean_rows(rows)
    columns = list(dict.fromkeys((row["policy"], row["budget"]) for row in means))
    shown = Table(caption="Accuracy, % (MACs), under corruptions: means over severities.")
    shown.add_column("corruption", no_wrap=True)
    for policy, budget in columns:
        shown.add_column(policy if budget is None else f"{policy} {budget:g}", justify="right", no_wrap=True)
    for corruption in dict.fromkeys(row["corruption"] for row in means):
        own = {(row["policy"], row["budget"]): row for row in means if row["corruption"] == corruption}
        cells = [
            f"{100 * row['accuracy']:.1f}" + ("" if row["policy"] == "dense" else f" ({row['macs_fraction']:.3f})")
            for row in (own[column] for column in columns)
        ]
        shown.add_row(corruption, *cells, style="bold" if corruption == "mean" else None)
    return shown
