"""`miaformer export`: a model as one ONNX file, for ONNX Runtime and other runtimes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_batches, open_device, open_model, own_model

if TYPE_CHECKING:
    from miaformer.data import Batch
    from miaformer.model.model import MIAFormer

BUDGETS = (0.35, 0.5, 0.7)  # at which a file in 8-bit integers is compared
MOST_FLIPPED = 0.1  # of the decisions, without a warning

DESCRIPTION = """\
Write MODEL to OUT.onnx, weights included. In ONNX Runtime, the file skips at run time: blocks by If, tokens by
gathering those that are kept, heads by branches with their own weights. The file takes one image at a time.
--standard-ops keeps to operators of the ONNX standard, for other runtimes, such as OpenVINO.

inputs   images (1, 3, H, W) float32, normalised; budget and cap, float32 scalars (a cap above 1 means no cap)
outputs  logits (1, classes), macs_fraction (1,); with --trace also depth (1, L), heads (1, L, H), tokens (1, L, N)

With --static, the file holds the learned policy's mean decisions at one budget instead, without control flow and for
batches of any size. --data names the images on which these decisions are found.

With --int8, the blocks' products are in 8-bit integers. With --data, the file's budgets are calibrated again, as
rounding moves decisions, and the file is compared with the model in float32.
"""

EPILOG = """\
examples:
  miaformer export runs/photos/model photos.onnx
  miaformer export runs/photos/model photos.onnx --trace
  miaformer export runs/photos/model photos-half.onnx --static 0.5 --data photos/
  miaformer export runs/photos/model photos.onnx --standard-ops
  miaformer export runs/photos/model photos-int8.onnx --int8 --data photos/

examples/onnx_inference.py runs a file with onnxruntime, numpy and pillow alone.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "export", "write a model for ONNX Runtime", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_argument("out", metavar="OUT.onnx", help="output file")
    parser.add_argument("--trace", action="store_true", help="also output which blocks, heads and tokens were executed")
    parser.add_argument(
        "--price", type=float, metavar="P", help="decide at this price, and ignore the requested budget"
    )
    parser.add_argument("--static", type=float, metavar="B", help="write one policy for all images, at this budget")
    parser.add_argument("--standard-ops", action="store_true", help="only operators of the ONNX standard")
    parser.add_argument("--int8", action="store_true", help="8-bit integers in the blocks' products")
    parser.add_data("for --static: images on which to find the policy; for --int8: on which to calibrate and compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import os

    from miaformer.cli.output import say

    _check_options(args)
    model = open_model(args.model, open_device("cpu"), **own_model(args))
    from miaformer.data import open_data
    from miaformer.evaluation import static_decisions
    from miaformer.export import export_onnx, export_static

    adaptive = model
    if args.static is not None:
        images: Iterable[Batch] = ()
        if not model.adapt_config.chooses_resolution:  # else no image is needed to find a size
            images = open_batches(model, open_data(args.data, "calibration"), 64).epoch(0)
        decisions = static_decisions(model, args.static, images)
        export_static(model, args.out, decisions, standard_ops=args.standard_ops)
    else:
        if args.int8 and args.data is not None:
            adaptive = _calibrated(model, args.data)
        options = {"standard_ops": args.standard_ops, "int8": args.int8}
        export_onnx(adaptive, args.out, price=args.price, trace=args.trace, **options)
    size = os.path.getsize(args.out) / 2**20
    say(f"wrote {args.out}: {size:.1f} MiB")
    if args.static is None and adaptive.calibration is not None:
        least, most = adaptive.calibration.range
        say(f"budgets from {least:.2f} to {most:.2f} of {model.cost().backbone / 1e6:,.0f} M MACs")
    if adaptive is not model:
        _compare(model, adaptive, args.data)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if args.static is None and args.data is not None and not args.int8:
        raise ValueError("--data is for --static and --int8; the adaptive file needs no images")
    if args.static is not None and (args.trace or args.price is not None or args.int8):
        raise ValueError("--static has one set of decisions, in float32: it takes no --trace, no --price and no --int8")
    if args.static is not None and args.data is None:
        raise ValueError("--static finds its decisions on images: name them with --data")
    if args.int8 and args.price is not None and args.data is not None:
        raise ValueError("--price leaves no budgets to calibrate: leave out --data")


def _calibrated(model: MIAFormer, data: str) -> MIAFormer:
    from miaformer.cli.output import say
    from miaformer.data import open_data
    from miaformer.evaluation.int8 import calibrated_int8

    if model.calibration is None:
        raise ValueError("the model is not calibrated, so there are no budgets to calibrate again: leave out --data")
    images = open_data(data, "calibration")
    say(f"calibrating in 8-bit integers on {len(images)} images")
    return calibrated_int8(model, open_batches(model, images, 64).epoch(0), data)


def _compare(model: MIAFormer, calibrated: MIAFormer, data: str) -> None:
    """Print the file beside the model in float32, on test images."""
    from rich.table import Table

    from miaformer.cli.output import print_table, say
    from miaformer.data import open_data
    from miaformer.evaluation.int8 import compare_int8

    assert model.calibration is not None
    assert calibrated.calibration is not None
    least = max(table.range[0] for table in (model.calibration, calibrated.calibration))
    batches = open_batches(model, open_data(data, "test"), 64).epoch(0)
    points = compare_int8(model, calibrated, batches, [budget for budget in BUDGETS if budget >= least] or [1.0])
    table = Table("budget", "accuracy, int8", "float32", "MACs, int8", "float32", "decisions that differ")
    for point in points:
        accuracies, macs = (point.accuracy, point.float32_accuracy), (point.macs_fraction, point.float32_macs_fraction)
        table.add_row(
            f"{point.budget:g}",
            *(f"{one:.1f} %" for one in accuracies),
            *(f"{one:.3f}" for one in macs),
            f"{100 * point.flipped:.1f} %",
        )
    print_table(table)
    worst = max(point.flipped for point in points)
    if worst > MOST_FLIPPED:
        say(f"warning: {100 * worst:.0f} % of the decisions differ from float32; compare accuracy before you use it")
