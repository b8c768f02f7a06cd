"""`miaformer bench`: what skipped compute saves in time, engine by engine."""

from __future__ import annotations

import argparse
import time
from typing import Any

from miaformer.cli.arguments import DTYPES, add_command, check_positive, open_device, open_model, own_model

ENGINES = ("eager", "packed", "compile", "graphs", "onnx")  # bench.TIMED_ENGINES, which would import torch
GRAINS = ("resolution", "all", "depth", "heads", "tokens")

DESCRIPTION = """\
Compare the speed of sparse and dense execution of MODEL on images of DATA. Every engine runs the same learned policy
at a budget, and its own dense execution of the same backbone. All of them are timed in turn within the same rounds,
over several batches of images. Every sparse time includes the time to decide.

engines:
  eager    PyTorch, operation by operation
  packed   the same, with sparse weights kept in the CPU's layout (MIAFormer.prepack)
  compile  torch.compile, dense only
  graphs   CUDA graphs (torch.compile, mode reduce-overhead), dense only, on CUDA
  onnx     ONNX Runtime on the CPU; sparse batches run one image per thread

MODEL may be timm:NAME, an unadapted timm ViT, with random weights unless --weights FILE or --pretrained is
given. Its decisions are then drawn at random, so that they differ between images. --grains says what is decided:
resolution, as after training with the recipe finetune, or what controllers decide, all of it or e.g. only tokens.
"""

EPILOG = """\
examples:
  miaformer bench runs/digits/model --data digits
  miaformer bench timm:deit_small_patch16_224 --data photos/ --batch-sizes 1 8 --json bench.json --plot bench.png
  miaformer bench timm:vit_base_patch16_224 --data photos/ --engines eager --dtypes float32 bfloat16 --grains tokens

JSON:
  {"rows": [{"engine", "dtype", "batch", "grains", "budget", "macs_fraction", "macs_fraction_std", "ms", "dense_ms",
             "time_fraction", "efficiency", "spread", "best_dense_engine", "best_dense_dtype", "best_dense_ms",
             "best_time_fraction", "best_spread", "images", "repeats"}],
   "dense": [{"engine", "dtype", "batch", "images", "repeats", "ms", "variation"}],
   "left_out": [{"engine", "execution", "dtype", "batches", "reason"}], "drawn", "interrupted",
   "environment": {...}, ...}
  Budget 1 decides too, and keeps everything. Times are medians over `repeats` rounds of each batch of images,
  then means over batches; fractions are taken within each round. efficiency = macs_fraction / time_fraction; spread
  is the interquartile range of the time fractions of all rounds, on all batches; variation that of the times over their
  median. best_dense_*: the fastest dense
  execution of any engine here, in this dtype or float32. Memory is the most that running took on top of the loaded
  model. FILE is written after each dtype and batch size, so that a command that is stopped keeps what it measured;
  `interrupted` is then true.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "bench", "time sparse against dense execution", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_data("images: digits, any folder of images, or a name that timm knows")
    parser.add_several("--batch-sizes", "N", int, (1, 8, 32), "batch sizes")
    parser.add_budgets()
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=list(ENGINES),
        metavar="E",
        help="engines listed above (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        metavar="T",
        help=f"data types: {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument(
        "--grains",
        nargs="+",
        choices=GRAINS,
        metavar="G",
        help=f"what is decided for timm:NAME: {', '.join(GRAINS)} (default: resolution)",
    )
    parser.add_number("--repeats", 15, "maximum rounds per batch")
    parser.add_number("--seconds", 20.0, "seconds of timing per dtype and batch size", "S")
    parser.add_number("--calibration-images", 32, "images for calibration, if MODEL is not calibrated")
    parser.add_device()
    parser.add_seed("images, weights and controllers")
    parser.add_outputs("the report", "time over MACs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.bench_output import bench_notes, bench_tables, counted
    from miaformer.cli.output import LiveProgress, console, print_table, say, write_json, write_outputs
    from miaformer.evaluation.bench import stage_of
    from miaformer.evaluation.on_data import bench_data
    from miaformer.reports.speed_plot import plot_speed
    from miaformer.training.progress import duration

    _check(args)
    device = open_device(args.device, args.threads)
    torch.manual_seed(args.seed)
    model = open_model(args.model, device, **own_model(args))
    stages = {stage_of(dtype, batch): args.repeats for dtype in args.dtypes for batch in args.batch_sizes}
    tables = counted(len(stages), "table")
    say(
        f"{tables} to time, about {duration(args.seconds)} each: {duration(args.seconds * len(stages))}, "
        "and before each what exporting and compiling takes."
    )
    begun, done = time.perf_counter(), 0

    def keep(partial: dict[str, Any]) -> None:
        """Whatever stops the command from here on, this is measured."""
        nonlocal done
        done += 1
        if args.json:
            write_json(args.json, {"model": args.model, **partial})
        if left := len(stages) - done:
            seconds = (time.perf_counter() - begun) / done * left
            console(stderr=True).print(f"{done} of {tables} timed, about {duration(seconds)} left")

    with LiveProgress(stages, "rounds") as on_progress:
        found = bench_data(
            model,
            args.data,
            args.engines,
            args.dtypes,
            args.batch_sizes,
            args.budgets,
            grains=args.grains or (("resolution",) if args.model.startswith("timm:") else None),
            repeats=args.repeats,
            seconds=args.seconds,
            calibration_images=args.calibration_images,
            seed=args.seed,
            on_progress=on_progress,
            on_cell=keep,
        )
    report = {"model": args.model, **found}
    for table in bench_tables(report):
        print_table(table)
    for note in bench_notes(report):
        say(note)
    if not report["rows"]:
        args.plot = None
    write_outputs(args, report, lambda file: plot_speed(report, file))
    if report["interrupted"]:
        raise KeyboardInterrupt("interrupted; what was measured until then is reported")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be told before anything is loaded."""
    if args.data is None:
        raise ValueError(
            "--data is missing: name pictures to run on, e.g. --data digits, a folder of pictures (with or without "
            "class folders), or a name that timm knows"
        )
    if args.grains and not args.model.startswith("timm:"):
        raise ValueError(f"--grains draws decisions for timm:NAME; {args.model} has decisions of its own")
    if min(args.batch_sizes) < 1:
        raise ValueError(f"--batch-sizes {min(args.batch_sizes)} must be at least 1")
    check_positive(args, "repeats")
    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds:g} must be positive")
    if args.calibration_images < 2:
        raise ValueError(f"--calibration-images {args.calibration_images} must be at least 2")
