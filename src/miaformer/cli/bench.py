"""`miaformer bench`: what skipped compute saves in time and memory, engine by engine."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import (
    DTYPES,
    add_command,
    add_data,
    add_model,
    open_device,
    open_model,
    own_model,
    seed_number,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from miaformer.model.model import MIAFormer

ENGINES = ("eager", "packed", "compile", "graphs", "onnx")
GRAINS = ("all", "depth", "heads", "tokens")

DESCRIPTION = """\
Compare the speed of sparse and dense execution of MODEL on images of DATA. Every engine runs the same learned policy
at a budget, and its own dense execution of the same backbone. All of them are timed in turn within the same rounds,
over several batches of images. Every sparse time includes the time to decide.

engines:
  eager    PyTorch, operation by operation
  packed   the same, with sparse weights kept in the CPU's layout (MIAFormer.prepack)
  compile  torch.compile, dense only
  graphs   CUDA graphs (torch.compile, mode reduce-overhead), dense only, on CUDA
  onnx     ONNX Runtime on the CPU

MODEL may be timm:NAME, an unadapted timm ViT, with random weights unless --weights FILE or --pretrained is
given. Its controllers are then drawn at random, so that decisions differ between images, and calibrated on images of
DATA. --grains says what they decide, e.g. only tokens.
"""

EPILOG = """\
examples:
  miaformer bench runs/digits/model --data digits
  miaformer bench timm:deit_small_patch16_224 --data photos/ --batch-sizes 1 8 --json bench.json --plot bench.png
  miaformer bench timm:vit_base_patch16_224 --data photos/ --engines eager --dtypes float32 bfloat16 --grains tokens

JSON:
  {"rows": [{"engine", "dtype", "batch", "grains", "budget", "macs_fraction", "macs_fraction_std", "ms", "dense_ms",
             "time_fraction", "efficiency", "spread", "best_dense_engine", "best_dense_dtype", "best_dense_ms",
             "best_time_fraction", "images", "repeats"}],
   "dense": [{"engine", "dtype", "batch", "images", "repeats", "ms"}],
   "memory": [{"engine", "dtype", "batch", "grains", "budget", "dense_mb", "sparse_mb"}],
   "left_out": [{"engine", "execution", "dtype", "batches", "reason"}], "environment": {...}, ...}
  Budget 1 runs the controllers and keeps everything. Times are medians over `repeats` rounds of each batch of images,
  then means over batches; fractions are taken within each round. efficiency = macs_fraction / time_fraction; spread
  is the interquartile range of the time fractions of all rounds, on all batches. best_dense_*: the fastest dense
  execution of any engine here, in this dtype or float32. Memory is the most that running took on top of the loaded
  model.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "bench", "time sparse against dense execution", DESCRIPTION, EPILOG)
    several: dict[str, Any] = {"nargs": "+"}
    add_model(parser)
    add_data(parser, "images: digits, any folder of images, or a name that timm knows")
    parser.add_argument(
        "--batch-sizes", **several, type=int, default=[1, 8, 32], metavar="N", help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument(
        "--budgets",
        **several,
        type=float,
        default=[0.35, 0.5, 0.7],
        metavar="B",
        help="mean MACs, as fractions of the dense model's (default: 0.35 0.5 0.7)",
    )
    parser.add_argument(
        "--engines",
        **several,
        choices=ENGINES,
        default=list(ENGINES),
        metavar="E",
        help="engines listed above (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        **several,
        choices=DTYPES,
        default=["float32"],
        metavar="T",
        help=f"data types: {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument(
        "--grains",
        **several,
        choices=GRAINS,
        metavar="G",
        help="what the controllers of timm:NAME decide: all, depth, heads or tokens (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="maximum rounds per batch (default: 15)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds of timing per dtype and batch size (default: 20)",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=32,
        metavar="N",
        help="images for calibration, if MODEL is not calibrated (default: 32)",
    )
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in separate processes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="seed of images, weights and controllers (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to this file")
    parser.add_argument("--plot", metavar="FILE.png", help="plot time over MACs to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import LiveProgress
    from miaformer.evaluation.bench import bench, stage_of
    from miaformer.evaluation.engines import open_engines
    from miaformer.evaluation.environment import describe_environment

    _check(args)
    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    model = open_model(args.model, device, **own_model(args))
    timed, held_out = _pictures(args, model)
    stages = {stage_of(dtype, batch): args.repeats for dtype in args.dtypes for batch in args.batch_sizes}
    with LiveProgress(stages, "rounds") as on_progress:
        models = _deciding(args, model, held_out, on_progress)
        engines, shapes = open_engines(args.engines), (args.dtypes, args.batch_sizes, args.budgets)
        found = bench(models, timed, engines, *shapes, args.repeats, args.seconds, on_progress)
        report: dict[str, Any] = {"model": args.model, "data": args.data, **found.to_json()}
        if args.memory and not found.interrupted:
            report |= _memory(args, models, timed, device, on_progress)
    report["calibration"] = {
        grains: {"data": found.data, "num_images": found.num_images, "least": found.range[0], "most": found.range[1]}
        for grains, found in ((grains, one.calibration) for grains, one in models.items())
        if found is not None
    }
    report["environment"] = describe_environment(device, args.seed)
    _show(args, report)
    if report["interrupted"]:
        raise KeyboardInterrupt("interrupted; what was measured until then is reported")
    return 0


def _show(args: argparse.Namespace, report: dict[str, Any]) -> None:
    from miaformer.cli.bench_output import bench_notes, bench_tables
    from miaformer.cli.output import console, print_table, write_json

    out = console()
    for table in bench_tables(report):
        print_table(out, table)
    for note in bench_notes(report):
        out.print(note, soft_wrap=True, markup=False)
    if args.json:
        write_json(args.json, report)
        out.print(f"wrote {args.json}", soft_wrap=True, markup=False)
    if args.plot and report["rows"]:
        from miaformer.reports.speed_plot import plot_speed

        plot_speed(report, args.plot)
        out.print(f"wrote {args.plot}", soft_wrap=True, markup=False)


def _check(args: argparse.Namespace) -> None:
    """What can be told before anything is loaded."""
    if args.data is None:
        raise ValueError(
            "--data is missing: name pictures to run on, e.g. --data digits, a folder of pictures (with or without "
            "class folders), or a name that timm knows"
        )
    if args.grains and not args.model.startswith("timm:"):
        raise ValueError(f"--grains draws controllers for timm:NAME; {args.model} has controllers of its own")
    for name, values in (("--batch-sizes", args.batch_sizes), ("--repeats", [args.repeats])):
        if min(values) < 1:
            raise ValueError(f"{name} {min(values)} must be at least 1")
    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds:g} must be positive")
    if args.calibration_images < 2:
        raise ValueError(f"--calibration-images {args.calibration_images} must be at least 2")


def _pictures(args: argparse.Namespace, model: MIAFormer) -> tuple[Tensor, Tensor]:
    """Pictures to time, and others to draw and calibrate on; the same ones where there are too few for both."""
    from miaformer.data import build_transform
    from miaformer.data.pictures import read_pictures
    from miaformer.evaluation.bench import batches_of_size

    wanted = max(batch * batches_of_size(batch) for batch in args.batch_sizes)
    held_out = args.calibration_images
    pictures = read_pictures(args.data, build_transform(model.data_config()), wanted + held_out, args.seed)
    if len(pictures) < 2 * held_out:
        return pictures[:wanted], pictures[-held_out:]
    return pictures[:-held_out][:wanted], pictures[-held_out:]


def _deciding(args: argparse.Namespace, model: MIAFormer, held_out: Tensor, on_progress: Any) -> dict[str, MIAFormer]:
    """The model, calibrated, by the grains that it decides; for timm:NAME one for each of --grains."""
    import torch

    from miaformer.data import Batch
    from miaformer.evaluation import calibrate
    from miaformer.evaluation.drawn import drawn_models

    models = {"all": model}
    if args.model.startswith("timm:"):
        models = drawn_models(model, held_out, args.seed, args.grains or ("all",))
    numbers = torch.arange(len(held_out)).split(16)
    batches = [Batch(images, part, part) for images, part in zip(held_out.split(16), numbers, strict=True)]
    for grains, one in models.items():
        if one.calibration is None:
            stage = "calibrate" if len(models) == 1 else f"calibrate {grains}"
            calibrate(one, batches, args.data, 0.08, partial(_pass, on_progress, stage))
    return models


def _pass(on_progress: Any, stage: str, _: str, done: int) -> None:
    on_progress(stage, done)


def _memory(
    args: argparse.Namespace, models: dict[str, MIAFormer], pictures: Tensor, device: torch.device, on_progress: Any
) -> dict[str, Any]:
    from miaformer.evaluation.memory import measure_memory

    grains, model = next(iter(models.items()))
    measured: list[dict[str, Any]] = []
    try:
        for row in measure_memory(model, pictures, args.dtypes, args.batch_sizes, args.budgets, device):
            measured.append({"engine": "eager", "grains": grains, **row})
            on_progress("memory", len(measured))
    except KeyboardInterrupt:
        return {"memory": measured, "interrupted": True}
    return {"memory": measured}
