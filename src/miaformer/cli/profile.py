"""`miaformer profile`: this machine's milliseconds for a model, and budgets in them."""

from __future__ import annotations

import argparse
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
)

if TYPE_CHECKING:
    from miaformer.data import Batches
    from miaformer.evaluation.latency import LatencyCalibration, LatencyTable
    from miaformer.model.model import MIAFormer

DESCRIPTION = """\
Measure how many milliseconds MODEL takes on this machine: for a block, by the number of rows (tokens) and heads that
it keeps; for a skipped block; for deciding; and for the rest. FILE then predicts the time of any image's decisions.

With --data, FILE also gets budgets in milliseconds: the calibration split shows which price leads to which mean time,
and `eval` and `predict` accept --latency FILE --budget-ms MS. Predicted and measured time are compared on images of
the test split. A table is valid for one model shape, device, dtype, number of threads and batch size. Other work on
the machine during the measurement makes it unreliable. The controllers of timm:NAME are drawn at random, so that
images differ. Models that choose resolutions are not supported.
"""

EPILOG = """\
examples:
  miaformer profile demo/model --data digits --out demo/latency.json
  miaformer predict demo/model photos/ --out rows.csv --latency demo/latency.json --budget-ms 2.5 --batch-size 1
  miaformer profile timm:deit_small_patch16_224 --threads 2 --dtype bfloat16

JSON:
  {"format", "table": {"shape": {...}, "device", "dtype", "threads", "engine", "batch_size", "rows", "heads",
                       "block_ms", "last_block_ms", "skipped_ms", "decide_ms", "score_ms", "fixed_ms", "versions"},
   "calibration": {"prices", "ms", "macs_fractions", "num_images", "data"}, "environment": {...},
   "check": [{"budget_ms", "price", "mean_predicted_ms", "mean_measured_ms", "error", "bias", "correlation", ...}]}
  block_ms has a row for each entry of `rows` and a column for each entry of `heads`. error: mean absolute relative
  error of the predicted time of a batch; bias: relative error of the mean; correlation: over batches.
"""

CHECKED_SHARES = (0.25, 0.5, 0.75)  # of the way from the least to the most ms: what is checked unless --budgets-ms


def add_parser(subparsers: Any) -> None:
    parser = add_command(
        subparsers, "profile", "measure latency on this machine, for budgets in ms", DESCRIPTION, EPILOG
    )
    add_model(parser)
    parser.add_argument("--out", default="latency.json", metavar="FILE", help="output file (default: latency.json)")
    add_data(parser, "data set to calibrate and check on: digits, a folder, a CSV file, or a name that timm knows")
    parser.add_argument(
        "--images", type=int, default=256, metavar="N", help="maximum number of images for calibration (default: 256)"
    )
    parser.add_argument(
        "--check-images",
        type=int,
        default=48,
        metavar="N",
        help="number of images for the check against measured time (default: 48)",
    )
    parser.add_argument(
        "--budgets-ms",
        nargs="+",
        type=float,
        metavar="MS",
        help="budgets to check, in ms per image (default: three within reach)",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurement rounds (default: 5)")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="with --data: plot predicted over measured time to this file"
    )
    add_compute(parser, batch_size=1)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from miaformer.cli.output import LiveProgress, console, write_json
    from miaformer.data import open_data
    from miaformer.evaluation import describe_environment
    from miaformer.evaluation.latency_files import Latency
    from miaformer.evaluation.profiling import measure_latency

    for name in ("images", "check_images", "repeats", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.data is None and (args.plot or args.budgets_ms):
        raise ValueError("--plot and --budgets-ms compare predicted with measured time on pictures: add --data")
    device = open_device(args.device, args.threads)
    torch.manual_seed(0)
    test = None if args.data is None else open_data(args.data, "test")
    classes = None if test is None else len(test.classes)
    model = open_model(args.model, device, args.dtype, num_classes=classes, **own_model(args))
    held_out = None
    if test is not None:
        held_out = open_batches(model, open_data(args.data, "calibration"), 32)
    out = console()
    with LiveProgress({"profile": args.repeats + 1}, "rounds") as on_progress:
        table = measure_latency(model, args.batch_size, args.repeats, on_progress)
    _print_table(out, table, args.model)
    calibration, check = None, []
    if test is not None and held_out is not None:
        calibration = _calibrate(model, held_out, table, args.images, args.model.startswith("timm:"))
        least, most = calibration.range
        out.print(f"On {calibration.data} ({calibration.num_images:,} images) its budgets reach from {least:.4g} to "
                  f"{most:.4g} ms an image on average.", soft_wrap=True, markup=False)  # fmt: skip
        check = _check(args, model, open_batches(model, test, args.batch_size), table, calibration)
        _print_check(out, check)
    content = {
        **Latency(table, calibration).to_json(),
        "model": args.model,
        "check": check,
        "environment": describe_environment(device, 0),
    }
    write_json(args.out, content)
    out.print(f"wrote {args.out}", soft_wrap=True, markup=False)
    if args.plot:
        from miaformer.reports.latency_plot import plot_latency

        plot_latency(check, args.plot, f"Predicted and measured time of {Path(args.model).name}")
        out.print(f"wrote {args.plot}", soft_wrap=True, markup=False)
    return 0


def _calibrate(model: MIAFormer, held_out: Batches, table: LatencyTable, most: int, draws: bool) -> LatencyCalibration:
    """draws: whether the model's controllers are untrained: they would say the same of every image."""
    import torch

    from miaformer.cli.output import LiveProgress
    from miaformer.evaluation.drawn import draw_controllers
    from miaformer.evaluation.profiling import calibrate_latency

    chosen, count = [], 0
    for batch in held_out.epoch(0):
        chosen.append(batch)
        count += len(batch)
        if count >= most:
            break
    if draws and count > 1:
        draw_controllers(model, torch.cat([batch.images for batch in chosen])[:32].to(next(model.parameters())))
    with LiveProgress({}, "passes") as on_progress:
        return calibrate_latency(model, chosen, table, held_out.data.name, on_progress=on_progress)


def _check(
    args: argparse.Namespace, model: MIAFormer, test: Batches, table: LatencyTable, calibration: LatencyCalibration
) -> list[dict[str, Any]]:
    """The rows of `check_latency` at the budgets asked for, or at some within reach."""
    from miaformer.cli.output import LiveProgress
    from miaformer.evaluation.profiling import check_latency

    least, most = calibration.range
    budgets = args.budgets_ms or sorted({least + share * (most - least) for share in CHECKED_SHARES})
    prices = [calibration.price(budget) for budget in budgets]
    parameter = next(model.parameters())
    images = []
    for batch in test.epoch(0):
        if len(batch) == table.batch_size:
            images.append(batch.images.to(parameter))
        if len(images) * table.batch_size >= args.check_images:
            break
    rounds = 3
    with LiveProgress({"check": len(images) * (rounds + 1)}, "batches") as on_progress:
        rows = check_latency(model, images, prices, table, rounds, on_progress)
    return [{"budget_ms": budget, **row} for budget, row in zip(budgets, rows, strict=True)]


def _print_table(out: Any, table: LatencyTable, name: str) -> None:
    from rich.table import Table

    where = f"{table.device}, {table.threads} threads, {table.dtype}, batches of {table.batch_size}"
    out.print(f"{name} on {where}", soft_wrap=True, markup=False)
    shown = Table(title="ms per image of a block that keeps", title_justify="left")
    shown.add_column("rows", justify="right")
    for heads in table.heads:
        shown.add_column(f"{heads} {'head' if heads == 1 else 'heads'}", justify="right")
    shown.add_column("to decide", justify="right")
    shown.add_column("+ tokens", justify="right")
    for index, rows in enumerate(table.rows):
        deciding = table.decide_ms[index], table.score_ms[index]
        shown.add_row(str(rows), *(f"{ms:.3f}" for ms in (*table.block_ms[index], *deciding)))
    out.print(shown)
    everything = table.block_ms[-1][-1], table.last_block_ms[-1][-1]
    out.print(
        f"The last block with everything: {everything[1]:.3f}; a skipped block: {table.skipped_ms:.3f}; embedding, "
        f"classifier and the rest: {table.fixed_ms:.3f}.",
        soft_wrap=True,
    )


def _print_check(out: Any, check: list[dict[str, Any]]) -> None:
    from rich.table import Table

    shown = Table(title="ms per image on pictures of the test split", title_justify="left")
    for column in ("budget", "predicted", "measured", "error", "correlation"):
        shown.add_column(column, justify="right")
    for row in check:
        correlation = "" if row["correlation"] is None else f"{row['correlation']:.3f}"
        means = (f"{row[name]:.3f}" for name in ("budget_ms", "mean_predicted_ms", "mean_measured_ms"))
        shown.add_row(*means, f"{100 * row['error']:.1f} %", correlation)
    out.print(shown)
