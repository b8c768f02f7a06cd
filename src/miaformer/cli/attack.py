"""`miaformer attack`: accuracy and compute of a model under attack, against its static backbone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from miaformer.cli.arguments import (
    add_command,
    check_positive,
    open_batches,
    open_device,
    open_model,
    own_model,
    radius,
)

DEFAULT_ATTACKS = ("fgsm", "pgd", "adaptive", "transfer")

DESCRIPTION = """\
Attack MODEL on images of DATA, and report how much of its accuracy and of its savings is left.

attacks on accuracy:
  fgsm         one step along the sign of the gradient
  pgd          --steps projected gradient steps from --restarts random starts; decisions are treated as fixed
  adaptive     the same steps with gradients through the decisions, on cross-entropy and on the margin
  transfer     adversarial examples made on the static backbone
  autoattack   standard AutoAttack: APGD-CE, APGD-T, FAB-T and Square (Croce and Hein), through the decisions; slow;
               apgd-ce and square can also be run alone
If a target draws its decisions at random, every attack follows the mean over draws.

attacks on compute:
  macs         gradient steps that raise the cost of an image; macs-kept also keeps its predicted class
  patch        one patch for all images, learned on the calibration split; patch-kept also keeps predicted classes

targets:
  backbone     the static model
  adaptive     the learned policy at --budget
  sampled      the same policy, with decisions drawn at random
  static, random, cls-attention
               other policies on the same weights, at the same cost

The row `worst` counts an image as correct only if it is correct under all attacks on accuracy. Radii are in pixel
values from 0 to 1. A check for gradient masking follows; where it fails, do not trust the gradient-based attacks. The
check and the parts of AutoAttack need the extra `attack`; --no-masking-check skips the check.
"""

EPILOG = """\
examples:
  miaformer attack runs/photos/model --data photos/ --eps 1/255 4/255 --images 500
  miaformer attack cifar10-small --data cifar10/ --attacks macs macs-kept patch --targets adaptive static --budget 0.5
      test whether images can be made to cost more; with --cap 0.6, none can cost more than that
  miaformer attack cifar10-small --data cifar10/ --attacks fgsm pgd adaptive transfer autoattack --cascade \\
      --eps 1/255 2/255 4/255 8/255 --out runs/attack --json attack.json --plot attack.png
      takes hours on a CPU; finished results are kept in --out, and the same command continues from them

JSON:
  {"rows": [{"attack", "eps", "norm", "target", "clean", "robust", "robust_interval", "macs_fraction_clean",
             "macs_fraction_attacked", "macs_fraction_max", "num_images"}],
   "masking": [{"target", "check", "value", "wanted", "passed"}], "environment": {...}, ...}
  clean and robust: accuracy before and under attack; macs_fraction_max: of the most expensive image under attack.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "attack", "measure accuracy and compute under attack", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_data(required=True)
    parser.add_several("--attacks", "A", str, DEFAULT_ATTACKS, "attacks listed above")
    parser.add_several("--eps", "E", str, ("4/255",), "attack radii, in pixel values from 0 to 1")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="norm of the radii (default: linf)")
    parser.add_argument("--targets", nargs="+", metavar="T", help="targets listed above (default: backbone adaptive)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="budget of all targets except backbone (default: 0.5)",
    )
    parser.add_cap()
    parser.add_number("--images", 1000, "number of images, evenly spaced")
    parser.add_number("--steps", 50, "steps of gradient attacks")
    parser.add_number("--restarts", 1, "random starts of gradient attacks")
    parser.add_argument(
        "--cascade",
        action="store_true",
        help="attack only images that withstood the attacks before: same `worst` in less time, other rows are "
        "cumulative",
    )
    parser.add_number("--patch-area", 0.02, "area of the patch, as a fraction of the image", "A")
    parser.add_number("--patch-steps", 200, "steps to learn the patch")
    parser.add_argument("--no-masking-check", action="store_true", help="skip the check for gradient masking")
    parser.add_seed("everything random")
    parser.add_argument("--out", metavar="DIR", help="keep finished results in this directory, and continue from them")
    parser.add_outputs("the report", "accuracy over the radius")
    parser.add_number("--batch-size", 250, "images per batch")
    parser.add_dtype()
    parser.add_device()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import LiveProgress, print_table, say, write_outputs
    from miaformer.data import open_data, spread
    from miaformer.lab.attacks import Ball, Climb, attack, check_attacks, needs_held_out
    from miaformer.reports.robustness_plot import plot_robustness

    check_attacks(args.attacks, masking=not args.no_masking_check)
    balls = [Ball(radius("--eps", text), args.norm) for text in dict.fromkeys(args.eps)]
    if args.norm == "linf" and max(ball.eps for ball in balls) > 1:
        raise ValueError(f"--eps {' '.join(args.eps)}: pixels go from 0 to 1, and so do radii: 4/255, say")
    climb = Climb(steps=args.steps, restarts=args.restarts)
    check_positive(args, "images")
    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    data = spread(open_data(args.data, "test"), args.images)
    model = open_model(args.model, device, args.dtype, num_classes=len(data.classes), **own_model(args))
    open_batches(model, data, args.batch_size)  # or say what does not fit
    held_out = open_data(args.data, "calibration") if needs_held_out(args.attacks, args.targets or ()) else None
    try:
        with LiveProgress({}) as on_progress:
            report = attack(
                model,
                data,
                balls,
                args.attacks,
                args.targets,
                budget=args.budget,
                cap=args.cap,
                held_out=held_out,
                climb=climb,
                cascade=args.cascade,
                patch_area=args.patch_area,
                patch_steps=args.patch_steps,
                masking=not args.no_masking_check,
                seed=args.seed,
                batch_size=args.batch_size,
                out=Path(args.out) if args.out else None,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        kept = f"interrupted: what is done lies in {args.out}, the same command goes on" if args.out else ""
        raise KeyboardInterrupt(kept) from None
    report = {"model": args.model, **report}
    say(f"{args.model} on {len(data):,} images of {data.name}")
    print_table(_table(report["rows"]))
    signs = report["masking"]
    for sign in signs:
        if not sign["passed"]:
            say(f"Gradient masking? {sign['target']}: {sign['check']}: {sign['value']:.3f}, should be {sign['wanted']}")
    if signs and all(sign["passed"] for sign in signs):
        say(f"No sign of gradient masking, in {len(signs)} checks.")
    write_outputs(args, report, lambda file: plot_robustness(report["rows"], file))
    return 0


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from miaformer.lab.attacks.gradient import shown_radius

    shown = Table(caption="Accuracy with its interval of 95 % over images. MACs: of the backbone's, mean over images.")
    shown.add_column("target", no_wrap=True)
    shown.add_column("attack", no_wrap=True)
    for name in ("eps", "clean, %", "under attack, %", "MACs clean", "attacked", "most expensive"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = (f"{100 * end:.1f}" for end in row["robust_interval"])
        eps = "patch" if row["eps"] is None else shown_radius(row["eps"], row["norm"])
        spent = row["macs_fraction_attacked"]
        is_adaptive = row["target"] != "backbone"
        shown.add_row(
            row["target"],
            row["attack"],
            eps,
            f"{100 * row['clean']:.1f}",
            f"{100 * row['robust']:.1f} ({low}, {high})",
            f"{row['macs_fraction_clean']:.3f}" if is_adaptive else "",
            f"{spent:.3f}" if is_adaptive and spent is not None else "",
            f"{row['macs_fraction_max']:.3f}" if is_adaptive and spent is not None else "",
            style="bold" if row["attack"] == "worst" else None,
            end_section=following is None or (following["target"], following["eps"]) != (row["target"], row["eps"]),
        )
    return shown
