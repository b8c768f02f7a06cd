"""`miaformer eval`: accuracy per compute of a model, against the dense model and controls of equal cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import (
    add_command,
    add_compute,
    add_data,
    add_model,
    open_batches,
    open_device,
    open_model,
    own_model,
    seed_number,
)

if TYPE_CHECKING:
    from miaformer.data import ImageData
    from miaformer.evaluation import Contender
    from miaformer.model.model import MIAFormer

POLICIES = ("learned", "static", "random", "cls-attention", "full")

DESCRIPTION = """\
Evaluate MODEL on DATA: the accuracy of each policy at each budget, and the compute that images take.

policies:
  learned        the model's controllers, which decide for each image
  static         the mean decisions of the learned policy, the same for every image: the baseline for `learned`
  random         keeps blocks, heads and tokens as often as the learned policy does, but at random
  cls-attention  keeps as many tokens as the budget allows: those that the class token attends to most (EViT)
  full           executes everything
`static` and `random` take the learned policy's means from the calibration split of DATA.

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
   "adaptivity": {"spearman_difficulty_macs", "by_budget": [...]}, "left_out": [...], "controllers": {...},
   "environment": {...}, ...}
  with --corruptions also "corruptions": [{"corruption", "severity", "policy", "budget", "accuracy", "macs_fraction",
               "macs_fraction_max"}]; its policies include the dense model
  macs_fraction is the mean over images, macs_fraction_p95 their 95th percentile. spearman_difficulty_macs is the rank
  correlation, over images, between the dense model's loss and the MACs that the learned policy spends, averaged over
  budgets.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "eval", "measure accuracy per compute, against controls", DESCRIPTION, EPILOG)
    add_model(parser)
    add_data(parser, "data set: digits, a folder, a CSV file, or a name that timm knows", required=True)
    parser.add_argument(
        "--split",
        default="test",
        choices=("train", "calibration", "test"),
        metavar="S",
        help="split of DATA: train, calibration or test (default: test)",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[0.35, 0.5, 0.7],
        metavar="B",
        help="mean MACs, as fractions of the dense model's (default: 0.35 0.5 0.7)",
    )
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
    parser.add_argument("--severities", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="S",
                        help="severities of the corruptions (default: 1 2 3 4 5)")  # fmt: skip
    parser.add_argument("--corrupted-images", type=int, default=1000, metavar="N",
                        help="number of images to corrupt, evenly spaced (default: 1000)")  # fmt: skip
    parser.add_argument(
        "--cap", type=float, metavar="C", help="hard limit on the MACs of one image, as a fraction of the dense model's"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure the table from budgets to prices on the calibration split of DATA; MODEL stays unchanged",
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the random policy and of random weights (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    parser.add_argument("--plot", metavar="FILE.png", help="plot accuracy over MACs to this file")
    add_compute(parser, batch_size=64)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import LiveProgress, console, print_table, report_notes, report_table, write_json
    from miaformer.data import open_data
    from miaformer.evaluation import calibrate, compare, contenders

    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    images = open_data(args.data, args.split)
    model = open_model(args.model, device, args.dtype, num_classes=len(images.classes), **own_model(args))
    policies = args.policy or (
        ("random", "full") if args.model.startswith("timm:") else ("learned", "static", "random")
    )
    if model.calibration is None and {"learned", "static"} & set(policies) and not args.calibrate:
        raise ValueError(
            f"{args.model} is not calibrated, so its learned policy knows no budget: add --calibrate to measure its "
            f"table on the calibration split of {args.data}, or choose other policies, e.g. --policy random full"
        )
    batches = open_batches(model, images, args.batch_size)
    held_out = None
    if args.calibrate or model.calibration is not None:
        held_out = open_batches(model, open_data(args.data, "calibration"), args.batch_size)
    totals = {"evaluate": len(images), "controls": len(held_out.data) if held_out is not None else 0}
    with LiveProgress(totals) as on_progress:
        if args.calibrate:
            assert held_out is not None
            calibrate(model, held_out.epoch(0), held_out.data.name, on_progress=on_progress)
        calibration = None if held_out is None else held_out.epoch(0)
        found, left_out = contenders(model, args.budgets, policies, args.cap, calibration, args.seed, on_progress)
        report = compare(model, batches.epoch(0), found, args.cap, args.seed, on_progress, left_out)
        if args.corruptions is not None:
            report["corruptions"] = _under_corruptions(model, images, found, args, on_progress)
    report = {"model": args.model, "data": images.name, "calibration": _calibration(model), **report}
    out = console()
    out.print(f"{args.model} on {images.name}")
    print_table(out, report_table(report))
    for note in report_notes(report):
        out.print(note, soft_wrap=True, markup=False)
    if model.calibration is None:
        out.print("The model is not calibrated: it has no learned policy at a budget.", soft_wrap=True)
    elif args.calibrate and model.calibration is not None:
        out.print(f"Calibrated for this evaluation on {model.calibration.data}.", soft_wrap=True, markup=False)
    if "corruptions" in report:
        print_table(out, _corruption_table(report["corruptions"]))
    if args.json:
        write_json(args.json, report)
        out.print(f"wrote {args.json}", soft_wrap=True, markup=False)
    if args.plot:
        from miaformer.reports.plots import plot_tradeoff

        plot_tradeoff(report, args.plot)
        out.print(f"wrote {args.plot}", soft_wrap=True, markup=False)
    return 0


def _under_corruptions(
    model: MIAFormer, images: ImageData, found: list[Contender], args: argparse.Namespace, on_progress: Any
) -> list[dict[str, Any]]:
    from miaformer.data import spread
    from miaformer.lab.corruptions import CORRUPTIONS, evaluate_corruptions

    if args.corrupted_images < 1:
        raise ValueError(f"--corrupted-images {args.corrupted_images} must be at least 1")
    return evaluate_corruptions(
        model,
        spread(images, args.corrupted_images),
        found,
        args.corruptions or CORRUPTIONS,
        args.severities,
        args.cap,
        args.batch_size,
        args.seed,
        on_progress,
    )


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


def _calibration(model: Any) -> dict[str, Any] | None:
    """Where the model's budgets were measured, and which it can meet."""
    table = model.calibration
    if table is None:
        return None
    return {"data": table.data, "num_images": table.num_images, "least": table.range[0], "most": table.range[1]}
