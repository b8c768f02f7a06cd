"""`miaformer embed`: the features of files, folders and shards of pictures, each by its own compute."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command
from miaformer.cli.pictures import PATHS, REFUSED, RESUME, add_pictures, run_over_pictures
from miaformer.prediction.rows import EMBEDDINGS

if TYPE_CHECKING:
    from miaformer.model.model import MIAFormer
    from miaformer.prediction.classify import BatchEmbedder

DESCRIPTION = f"""\
Embed images, from a few to millions: what the model's classifier reads, or would read if it had one (timm's
`pre_logits`), as float32 numbers.

{PATHS}
An unreadable image does not stop the run: it is listed at the end and in FILE, and the exit status is 1.

{RESUME}"""

EPILOG = """\
examples:
  miaformer embed demo/model photos/ --out embeddings.npz --budget 0.5
  miaformer embed timm:vit_small_patch14_dinov2 photos/ --weights dinov2_vits14_pretrain.pth --out embeddings.parquet
      a ViT without a classifier, not adapted yet: everything is executed

FILE.npz has arrays; load them with numpy.load:
  path           (n,) the images that could be read
  embedding      (n, C) float32
  macs_fraction  (n,) the MACs that each took, as a fraction of the dense model's; depth_kept, heads_kept, tokens_kept:
                 the shares of blocks executed, and of heads and tokens in executed blocks
  failed, error  (m,) the images that could not be read, and why
FILE.parquet has one row per image, with the columns path, embedding (a list), macs_fraction, depth_kept, heads_kept,
tokens_kept and error.
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "embed", "embed images", DESCRIPTION, f"{EPILOG}\n{REFUSED}")
    parser.add_model()
    add_pictures(parser, ".npz or .parquet")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return run_over_pictures(args, _embedder, EMBEDDINGS)


def _embedder(args: argparse.Namespace, model: MIAFormer) -> BatchEmbedder:
    from miaformer.prediction.classify import BatchEmbedder
    from miaformer.prediction.predictor import Predictor

    if next(model.parameters()).device.type == "cpu":
        model.prepack()
    return BatchEmbedder(Predictor(model), budget=args.budget, cap=args.cap)
