"""`miaformer attack`: accuracy and compute of a model under attack, against its static backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
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
    radius,
    seed_number,
)

if TYPE_CHECKING:
    from torch import Tensor

    from miaformer.data import Batches
    from miaformer.lab.attacks import Pixels, RobustnessEvaluation, Target
    from miaformer.model.model import MIAFormer

TARGETS = ("backbone", "adaptive", "sampled", "static", "random", "cls-attention")
DEFAULT_ATTACKS = ("fgsm", "pgd", "adaptive", "transfer")
MASKING_IMAGES = 100
PATCH_IMAGES = 2000  # of the calibration split, that patches are learned on

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
    add_model(parser, "model directory, hub id, name of a bundled model, or timm:NAME")
    add_data(parser, "data set: digits, a folder, a CSV file, or a name that timm knows", required=True)
    parser.add_argument("--attacks", nargs="+", default=list(DEFAULT_ATTACKS), metavar="A",
                        help=f"attacks listed above (default: {' '.join(DEFAULT_ATTACKS)})")  # fmt: skip
    parser.add_argument(
        "--eps",
        nargs="+",
        default=["4/255"],
        metavar="E",
        help="attack radii, in pixel values from 0 to 1 (default: 4/255)",
    )
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="norm of the radii (default: linf)")
    parser.add_argument("--targets", nargs="+", metavar="T",
                        help="targets listed above (default: backbone adaptive)")  # fmt: skip
    parser.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="budget of all targets except backbone (default: 0.5)",
    )
    parser.add_argument(
        "--cap", type=float, metavar="C", help="hard limit on the MACs of one image, as a fraction of the dense model's"
    )
    parser.add_argument(
        "--images", type=int, default=1000, metavar="N", help="number of images, evenly spaced (default: 1000)"
    )
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of gradient attacks (default: 50)")
    parser.add_argument(
        "--restarts", type=int, default=1, metavar="N", help="random starts of gradient attacks (default: 1)"
    )
    parser.add_argument("--cascade", action="store_true",
                        help="attack only images that withstood the attacks before: same `worst` in less time, other "
                        "rows are cumulative")  # fmt: skip
    parser.add_argument(
        "--patch-area",
        type=float,
        default=0.02,
        metavar="A",
        help="area of the patch, as a fraction of the image (default: 0.02)",
    )
    parser.add_argument(
        "--patch-steps", type=int, default=200, metavar="N", help="steps to learn the patch (default: 200)"
    )
    parser.add_argument("--no-masking-check", action="store_true", help="skip the check for gradient masking")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="keep finished results in this directory, and continue from them")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    parser.add_argument("--plot", metavar="FILE.png", help="plot accuracy over the radius to this file")
    add_compute(parser, batch_size=250)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import LiveProgress, console, print_table, write_json
    from miaformer.data import open_data, spread
    from miaformer.evaluation.environment import describe_environment
    from miaformer.lab.attacks import Ball, Climb, Pixels, RobustnessEvaluation, frozen, weights_hash

    attacks = _known_attacks(args.attacks)
    balls = [Ball(radius("--eps", text), args.norm) for text in dict.fromkeys(args.eps)]
    if args.norm == "linf" and max(ball.eps for ball in balls) > 1:
        raise ValueError(f"--eps {' '.join(args.eps)}: pixels go from 0 to 1, and so do radii: 4/255, say")
    how = Climb(steps=args.steps, restarts=args.restarts)
    if not args.no_masking_check or {"autoattack", "apgd-ce", "square"} & set(attacks):
        import pyautoattack  # noqa: F401 - or say that it is missing, before anything is attacked
    if args.images < 1:
        raise ValueError(f"--images {args.images} must be at least 1")
    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    data = spread(open_data(args.data, "test"), args.images)
    model = open_model(args.model, device, args.dtype, num_classes=len(data.classes), **own_model(args))
    out = console()
    with frozen(model), LiveProgress({}) as on_progress:
        targets = _targets(model, args, on_progress)
        static = next((t for t in targets if t.name == "backbone"), None) or _backbone(model)
        images, labels = _pixels(open_batches(model, data, args.batch_size), Pixels.of(model))
        evaluation = RobustnessEvaluation(
            images, labels, static, model.num_classes, how, args.seed,
            _learned(model, args, "adaptive") if model.calibration else None, args.cascade, args.batch_size,
            Path(args.out) if args.out else None,
            {
                "weights": weights_hash(model), "dtype": args.dtype, "data": data.name, "budget": args.budget,
                "cap": args.cap,
            },
        )  # fmt: skip
        of_patches = [name for name in attacks if name.startswith("patch")]
        try:
            rows = evaluation.run(targets, [name for name in attacks if name not in of_patches], balls, on_progress)
        except KeyboardInterrupt:
            kept = f"interrupted: what is done lies in {args.out}, the same command goes on" if args.out else ""
            raise KeyboardInterrupt(kept) from None
        rows += _patch_rows(evaluation, model, targets, of_patches, args, on_progress)
        if not rows:
            aims = ", ".join(target.name for target in targets)
            raise ValueError(
                f"nothing to attack: {', '.join(attacks)} on {aims}; "
                "a static backbone has no cost to raise, and is what transfer comes from"
            )
        signs = [] if args.no_masking_check else _masking(evaluation, targets, balls, on_progress)
    report = {
        "model": args.model,
        "data": data.name,
        "budget": args.budget,
        "cap": args.cap,
        "steps": args.steps,
        "restarts": args.restarts,
        "cascade": args.cascade,
        "rows": rows,
        "masking": signs,
        "environment": describe_environment(device, args.seed),
    }
    out.print(f"{args.model} on {len(labels):,} images of {data.name}", markup=False, soft_wrap=True)
    print_table(out, _table(rows))
    for sign in signs:
        if not sign["passed"]:
            out.print(
                f"Gradient masking? {sign['target']}: {sign['check']}: {sign['value']:.3f}, should be {sign['wanted']}",
                soft_wrap=True,
            )
    if signs and all(sign["passed"] for sign in signs):
        out.print(f"No sign of gradient masking, in {len(signs)} checks.")
    if args.json:
        write_json(args.json, report)
        out.print(f"wrote {args.json}", soft_wrap=True, markup=False)
    if args.plot:
        from miaformer.reports.robustness_plot import plot_robustness

        plot_robustness(rows, args.plot)
        out.print(f"wrote {args.plot}", soft_wrap=True, markup=False)
    return 0


def _known_attacks(names: Sequence[str]) -> list[str]:
    from miaformer.lab.attacks import ATTACKS

    known = [*ATTACKS, "patch", "patch-kept"]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown attack {', '.join(unknown)}: use some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _backbone(model: MIAFormer) -> Target:
    from miaformer.lab.attacks import static_target

    return static_target(model)


def _targets(model: MIAFormer, args: argparse.Namespace, on_progress: Any) -> list[Target]:
    """What is attacked. Sets the budget where none was asked for."""
    from miaformer.data import open_data
    from miaformer.evaluation import contenders
    from miaformer.lab.attacks import adaptive_target
    from miaformer.model.policy import Look, TwoLooks

    sized = model.adapt_config.chooses_resolution
    names = list(dict.fromkeys(args.targets or (TARGETS[:2] if model.calibration and not sized else TARGETS[:1])))
    if sized and set(names) - {"backbone", "cls-attention"}:
        raise ValueError(
            f"{args.model} chooses resolutions: attacks differentiate through controllers, and it has none; attack its "
            "backbone (--targets backbone)"
        )
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        raise ValueError(f"unknown target {', '.join(unknown)}: use some of {', '.join(TARGETS)}")
    if args.budget is None and model.calibration is not None:
        least, most = model.calibration.range
        args.budget = min(max(0.5, least), most)
    if args.budget is None and set(names) != {"backbone"}:
        raise ValueError(f"{args.model} is not calibrated, so it knows no budget: attack its backbone alone")
    controls = [name for name in names if name in ("static", "random", "cls-attention")]
    policies = {}
    if controls:
        held_out = open_batches(model, open_data(args.data, "calibration"), args.batch_size)
        found, left_out = contenders(
            model, [args.budget], controls, args.cap, held_out.epoch(0), args.seed, on_progress
        )  # fmt: skip
        if left_out:
            raise ValueError(f"{left_out[0].name} at {args.budget:g}: {left_out[0].reason}")
        policies = {
            one.name: one.policy for one in found if not isinstance(one.policy, Look | TwoLooks)
        }  # controls look once
    targets = []
    for name in names:
        if name == "backbone":
            targets.append(_backbone(model))
        elif name in policies:
            targets.append(adaptive_target(model, policies[name], name, args.cap))
        else:
            targets.append(_learned(model, args, name))
    return targets


def _learned(model: MIAFormer, args: argparse.Namespace, name: str) -> Target:
    """The learned policy at the budget, drawing where it is `sampled`."""
    from miaformer.lab.attacks import adaptive_target
    from miaformer.model.policy import Sampling

    price = model.price_of(args.budget)
    assert isinstance(price, float)
    policy = replace(model.learned(price), sampling=Sampling() if name == "sampled" else None)
    return adaptive_target(model, policy, name, args.cap)


def _pixels(batches: Batches, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """All images, from 0 to 1, and their labels, where the model is."""
    import torch

    parts = [(pixels.restored(batch.images.to(pixels.mean)), batch.labels) for batch in batches.epoch(0)]
    images, labels = (torch.cat(list(side)) for side in zip(*parts, strict=True))
    return images, labels.to(images.device)


def _patch_rows(
    evaluation: RobustnessEvaluation,
    model: MIAFormer,
    targets: list[Target],
    attacks: list[str],
    args: argparse.Namespace,
    on_progress: Any,
) -> list[dict[str, Any]]:
    from miaformer.data import open_data, spread
    from miaformer.lab.attacks import Pixels

    if not attacks:
        return []
    held_out = spread(open_data(args.data, "calibration"), PATCH_IMAGES)
    learned_on, _ = _pixels(open_batches(model, held_out, args.batch_size), Pixels.of(model))
    return evaluation.run_patches(targets, attacks, learned_on, args.patch_area, args.patch_steps, on_progress)


def _masking(
    evaluation: RobustnessEvaluation, targets: list[Target], balls: Any, on_progress: Any
) -> list[dict[str, Any]]:
    """Signs at the largest radius, on some images: do they keep the class that they have?"""
    import torch

    from miaformer.lab.attacks import seeded, signs_of_masking, steadied
    from miaformer.lab.attacks.methods import DRAWS

    found = []
    largest = max(balls, key=lambda ball: ball.eps)
    every = max(len(evaluation.labels) // MASKING_IMAGES, 1)
    images = evaluation.images[::every][:MASKING_IMAGES]
    for place, target in enumerate(targets):
        aim = steadied(target, DRAWS) if target.is_random else target
        with seeded(evaluation.seed, f"masking, {target.name}"):
            with torch.no_grad():
                labels = aim.deployed(images).logits.argmax(dim=1)
            signs = signs_of_masking(
                aim, images, labels, largest, evaluation.climb, evaluation.num_classes, evaluation.seed
            )
        found += [{"target": target.name, **vars(sign)} for sign in signs]
        on_progress("gradient masking", place + 1, len(targets))
    return found


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
