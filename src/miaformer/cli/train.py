"""`miaformer train`: a recipe's stages, from a static ViT to an adaptive model that knows its budgets."""

from __future__ import annotations

import argparse
from typing import Any

from miaformer.cli.arguments import add_command, radius
from miaformer.cli.processes import STOPPED, check_processes, is_one_of_several, run_in_processes, say_stopped
from miaformer.data.files import check_holds_no_run

DESCRIPTION = """\
Train an adaptive ViT in the stages of a recipe (such as backbone -> elastic -> supervised -> reinforce, or
probe -> backbone -> resolution), then calibrate its budgets.

DIR gets recipe.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end, model/: a directory
that eval, predict and MIAFormer.from_pretrained() take. Ctrl-C saves a checkpoint, and --resume continues from it,
exactly. If a run fails before its first checkpoint, you can start again in the same directory.
"""

EPILOG = """\
examples:
  miaformer train --recipe digits --out runs/digits
      train on the built-in data; takes a few minutes on two cores
  miaformer train --recipe digits --out runs/digits --processes 2
      the same, a third faster
  miaformer train --recipe finetune --data photos/ --out runs/photos
      adapt a pretrained DeiT-S to class folders (photos/CLASS/*.jpg, or photos/train/CLASS/*.jpg)
  miaformer train --recipe finetune --data labels.csv --out runs/photos --set batch_size=64
      the same for images and labels listed in a CSV or TSV file, with a batch size of 64
  miaformer train --recipe finetune --model vit_base_patch14_dinov2 --weights dinov2_vitb14_pretrain.pth \\
      --image-size 224 --data photos/ --out runs/photos
      start from your own model: a timm name, its checkpoint file and an image size
  miaformer train --recipe features --data photos/ --out runs/photos
      learn to give the features of a pretrained DINOv2 ViT-S for less compute, from any pictures, without labels
  miaformer train --recipe finetune --data photos/ --out runs/photos --resume
      continue after Ctrl-C, a crash or the loss of a machine
  accelerate launch --num_processes 4 -m miaformer train --recipe finetune --data photos/ --out runs/photos
      train on four GPUs
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "train", "train and calibrate an adaptive ViT", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="R",
        help="recipe: digits, cifar10-small, cifar10, finetune, features or imagenet",
    )
    parser.add_data("data set: digits, a folder, a CSV file, or a name that timm knows (default: the recipe's)")
    start = parser.add_argument_group("starting point, instead of the recipe's backbone")
    start.add_argument("--model", metavar="NAME", help="name of a timm ViT")
    start.add_argument(
        "--weights", metavar="FILE", help="checkpoint of this ViT: .safetensors, .pth, .pt, .bin or .ckpt"
    )
    start.add_argument("--image-size", type=int, metavar="N", help="image size, N x N pixels (default: as in FILE)")
    start.add_argument("--classes", metavar="FILE", help="class names, one per line, in label order")
    start.add_argument(
        "--backbone", metavar="MODEL", help="directory of an adaptive model whose backbone to start from"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("probe", "backbone", "elastic", "supervised", "reinforce", "resolution"),
        metavar="STAGE",
        help="run only these stages of the recipe: probe, backbone, elastic, supervised, reinforce, resolution",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of this run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in DIR")
    parser.add_seed("weights, data order, augmentation and decisions")
    parser.add_number("--epochs-scale", 1.0, "make every stage X times as long", "X")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the recipe, e.g. --set batch_size=64; can be repeated",
    )
    parser.add_argument(
        "--adversarial",
        metavar="EPS",
        help="adversarial training: every stage trains on images perturbed by up to EPS to increase its loss, e.g. "
        "4/255; takes twice the time (four times with --set adversarial_steps=3)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="cpu: train on the CPU even if there is an accelerator (default: auto)",
    )
    parser.add_threads()
    parser.add_number(
        "--processes", 1, "split every batch among N processes on this CPU: faster than threads for small models"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_processes(args.processes)
    if not args.resume and not is_one_of_several():
        check_holds_no_run(args.out)  # before anything that takes time
    if args.processes > 1 and not is_one_of_several():
        return run_in_processes([*args.argv, "--device", "cpu"], args.processes)
    _check_start(args)
    import torch

    from miaformer.model.classes import read_class_names
    from miaformer.training import Interrupted, get_recipe, train_recipe

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = get_recipe(args.recipe).scaled(args.epochs_scale)
    if args.stages:
        recipe = recipe.only(*args.stages)
    recipe = recipe.with_backbone(args.model, args.weights, args.image_size)
    recipe = recipe.with_changes(**dict(_setting(text) for text in args.set))
    if args.adversarial is not None:
        recipe = recipe.with_changes(adversarial_eps=radius("--adversarial", args.adversarial))
    classes = None if args.classes is None else read_class_names(args.classes)
    try:
        train_recipe(
            recipe,
            args.out,
            data=args.data,
            backbone=args.backbone,
            classes=classes,
            seed=args.seed,
            resume=args.resume,
            device=None if args.device == "auto" else args.device,
        )
    except Interrupted as stop:
        say_stopped(stop, "Go on with the same command and --resume.")
        return STOPPED
    return 0


def _check_start(args: argparse.Namespace) -> None:
    given = [f"--{name.replace('_', '-')}" for name in ("model", "weights", "image_size", "classes")
             if getattr(args, name) is not None]  # fmt: skip
    if args.backbone is not None and given:
        raise ValueError(f"--backbone {args.backbone} is a whole model, it takes no {' and no '.join(given)}")
    if args.classes is not None and args.weights is None:
        raise ValueError("--classes names the classes of a classifier in --weights FILE; DATA names its own")


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a Python literal or else a string."""
    import ast

    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r} should be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
