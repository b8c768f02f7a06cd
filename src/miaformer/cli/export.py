"""`miaformer export`: a model as one ONNX file for ONNX Runtime."""

from __future__ import annotations

import argparse
from typing import Any

from miaformer.cli.arguments import add_command, open_batches, open_device, open_model, own_model

DESCRIPTION = """\
Write MODEL to OUT.onnx, weights included. In ONNX Runtime, the file skips at run time: blocks by If, tokens by
gathering those that are kept, heads by branches with their own weights. The file takes one image at a time.

inputs   images (1, 3, H, W) float32, normalised; budget and cap, float32 scalars (a cap above 1 means no cap)
outputs  logits (1, classes), macs_fraction (1,); with --trace also depth (1, L), heads (1, L, H), tokens (1, L, N)

With --static, the file holds the learned policy's mean decisions at one budget instead, without control flow, for
runtimes that do not support it. --data names the images on which these decisions are found.
"""

EPILOG = """\
examples:
  miaformer export runs/photos/model photos.onnx
  miaformer export runs/photos/model photos.onnx --trace
  miaformer export runs/photos/model photos-half.onnx --static 0.5 --data photos/

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
    parser.add_data("for --static: images on which to find the policy")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import os

    from miaformer.cli.output import say

    if args.static is None and args.data is not None:
        raise ValueError("--data is for --static; the adaptive file needs no images")
    if args.static is not None and (args.trace or args.price is not None):
        raise ValueError("--static has one set of decisions: it takes no --trace and no --price")
    if args.static is not None and args.data is None:
        raise ValueError("--static finds its decisions on images: name them with --data")
    model = open_model(args.model, open_device("cpu"), **own_model(args))
    from miaformer.data import open_data
    from miaformer.evaluation import static_decisions
    from miaformer.export import export_onnx, export_static

    if args.static is None:
        export_onnx(model, args.out, price=args.price, trace=args.trace)
    else:
        images = open_batches(model, open_data(args.data, "calibration"), 64)
        export_static(model, args.out, static_decisions(model, args.static, images.epoch(0)))
    size = os.path.getsize(args.out) / 2**20
    say(f"wrote {args.out}: {size:.1f} MiB")
    if args.static is None and model.calibration is not None:
        least, most = model.calibration.range
        say(f"budgets from {least:.2f} to {most:.2f} of {model.cost().backbone / 1e6:,.0f} M MACs")
    return 0
