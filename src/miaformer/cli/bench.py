"""`miaformer bench`: what skipped compute saves in time, engine by engine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

from miaformer.cli.arguments import DTYPES, add_command, check_positive, open_device, open_model, own_model

ENGINES = ("eager", "packed", "compile", "graphs", "onnx")  # bench.TIMED_ENGINES, which would import torch
GRAINS = ("resolution", "all", "depth", "heads", "tokens")
MOST_VARIATION = 0.2  # of a dense reference, above which its times are not to be trusted
COLUMNS = ("MACs", "± images", "ms", "time", "± rounds", "efficiency", "time vs best dense")

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


def bench_tables(report: Mapping[str, Any]) -> Iterator[Any]:
    """A table for each dtype and batch size, in the order they were measured."""
    several = len({row["grains"] for row in report["rows"]}) > 1
    for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in report["dense"]):
        yield _table(report, dtype, batch, several)


def _table(report: Mapping[str, Any], dtype: str, batch: int, several_grains: bool) -> Any:
    from rich.table import Table

    dense, rows = (
        [row for row in report[kind] if (row["dtype"], row["batch"]) == (dtype, batch)] for kind in ("dense", "rows")
    )
    images, repeats = dense[0]["images"], dense[0]["repeats"]
    title = f"{dtype}, batch {batch}: {counted(images, 'picture')}, {counted(repeats, 'round')}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("engine", no_wrap=True)
    if several_grains:
        table.add_column("grains", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    best = min((row["best_dense_ms"] for row in rows), default=min(row["ms"] for row in dense))
    for reference in dense:
        engine = reference["engine"]
        against_best = "1.00 (best)" if reference["ms"] == best else f"{reference['ms'] / best:.2f}"
        spacer = [""] if several_grains else []
        own = [row for row in rows if row["engine"] == engine]
        varies = f"{reference['variation']:.2f}"
        cells = (engine, *spacer, "dense", "1.000", "", f"{reference['ms']:.1f}", "1.00", varies, "", against_best)
        table.add_row(*cells, end_section=not own)
        for row in own:
            table.add_row(
                "",
                *([row["grains"]] if several_grains else []),
                f"{row['budget']:g}",
                f"{row['macs_fraction']:.3f}",
                f"{row['macs_fraction_std']:.3f}",
                f"{row['ms']:.1f}",
                f"{row['time_fraction']:.2f}",
                f"{row['spread']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['best_time_fraction']:.2f}",
                end_section=row is own[-1],
            )
    return table


def bench_notes(report: Mapping[str, Any]) -> Iterator[str]:
    """What the tables leave unsaid, a line each."""
    environment = report["environment"]
    threads, version = counted(environment["threads"], "thread"), environment["versions"]["torch"]
    yield f"{report['model']} on {report['data']}; {environment['device']}, {threads}, torch {version}."
    yield (
        "ms: a batch. time: of the same engine's dense execution. Budget 1 decides too, and keeps everything. "
        "efficiency: MACs / time, 1.00 where all saved MACs became saved time. ± rounds: interquartile ranges."
    )
    if report["drawn"]:
        yield (
            "Decisions were drawn at random, so that images differ in what they get: times are as a trained model's, "
            "answers mean nothing."
        )
    for row in report["dense"]:
        if row["variation"] > MOST_VARIATION:
            yield (
                f"Warning: the dense time of {row['engine']}, {row['dtype']}, batch {row['batch']}, varies by "
                f"{row['variation']:.0%} of its median (interquartile range). This machine has other work: do not "
                "trust times of this table."
            )
    for dtype, engine, precise in dict.fromkeys(
        (row["dtype"], row["best_dense_engine"], row["best_dense_dtype"]) for row in report["rows"]
    ):
        if dtype != precise:
            yield f"Best dense execution for {dtype}, at some batch size: {engine} in {precise}."
    for left_out in report["left_out"]:
        batches = ", ".join(map(str, left_out["batches"]))
        yield (
            f"Left out: {left_out['engine']}, {left_out['execution']}, {left_out['dtype']}, batch {batches}: "
            f"{left_out['reason'].rstrip('.')}."
        )
    if report["interrupted"]:
        yield "Interrupted: what was not measured until then is missing."


def counted(number: int, what: str) -> str:
    """`1 round`, `2 rounds`"""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
