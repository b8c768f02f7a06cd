"""`miaformer predict`: classify files, folders and shards of pictures, each picture by its own compute."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, check_positive, say_choice
from miaformer.cli.pictures import PATHS, REFUSED, RESUME, add_pictures, run_over_pictures
from miaformer.prediction.rows import PREDICTIONS

if TYPE_CHECKING:
    from miaformer.model.model import MIAFormer
    from miaformer.prediction.classify import BatchClassifier

DESCRIPTION = f"""\
Classify images, from a few to millions. FILE gets one row per image.

{PATHS}
An unreadable image does not stop the run: its row gets an `error`, the command lists such images at the end, and the
exit status is 1. The same applies to a damaged archive: images before the damage are classified.

{RESUME}"""

EPILOG = """\
examples:
  miaformer predict demo/model photos/ --out predictions.csv --budget 0.5
  miaformer predict OWNER/NAME a.jpg b.png --out predictions.jsonl --cap 0.6 --top-k 3
  miaformer predict timm:deit_small_patch16_224 photos/ --weights mine.pth --classes names.txt --out predictions.csv
      your own ViT, not adapted yet: everything is executed
  miaformer predict demo/model 'shards/*.tar' more.parquet --out predictions.parquet --batch-size 128
  miaformer predict demo/model 'shards/*.tar' more.parquet --out predictions.parquet --batch-size 128 --resume
      continue the run above after a crash
  miaformer predict OWNER/NAME /shared/photos --out predictions.parquet --ray-workers 16 --ray-address auto
      run on a Ray cluster; if a worker dies, nothing is lost

rows (columns of a .csv or .parquet file, keys of a .jsonl line):
  path           the image
  label          number of the most likely class; `class` is its name, `probability` its softmax probability
  top_k          the K most likely classes: a list of {label, class, probability}; in a .csv file
                 "LABEL:PROBABILITY ..."
  macs_fraction  the MACs that the image took, as a fraction of the dense model's
  depth_kept     share of blocks executed; heads_kept, tokens_kept: shares of heads and tokens in executed blocks
  error          why the image could not be classified
Class names come from --classes FILE, or else from the model; without either, `class` is empty.

"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "predict", "classify images", DESCRIPTION, f"{EPILOG}\n{REFUSED}")
    parser.add_model()
    add_pictures(parser, ".csv, .jsonl or .parquet")
    parser.add_top_k()
    parser.add_engine()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_positive(args, "top_k")
    if args.engine == "auto" and args.ray_workers is not None:
        raise ValueError("--engine auto may choose differently on each of --ray-workers: name one, eager or onnx")
    return run_over_pictures(args, _classifier, PREDICTIONS)


def _classifier(args: argparse.Namespace, model: MIAFormer) -> BatchClassifier:
    from miaformer.prediction.classify import BatchClassifier
    from miaformer.prediction.predictor import Predictor

    if next(model.parameters()).device.type == "cpu":
        model.prepack()  # 5 % of the time of a small model at the default batch size, more of a large one
    predictor = Predictor(model, engine=args.engine, on_choice=say_choice)
    return BatchClassifier(predictor, top_k=args.top_k, budget=args.budget, cap=args.cap)
