"""`miaformer explain`: what a model executes for pictures, block by block, as PNG and as HTML."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, check_positive, open_device, open_model, own_model, say_choice

if TYPE_CHECKING:
    from miaformer.reports.explanation_page import Explained

DESCRIPTION = """\
Show what MODEL executes for each image, block by block: which patches each block still attends to, which heads it
computes, which blocks are skipped, what fraction of the dense model's MACs that takes, and what the model predicts.

DIR gets a PNG and an HTML page for each image. For several images or a folder, it also gets index.html: thumbnails,
the cheapest images first. The pages are self-contained: they need no network and no other file. An unreadable
image does not stop the run: the command lists it, and the exit status is 1.
"""

EPILOG = """\
examples:
  miaformer explain cifar10-small cat.jpg --out explained
  miaformer explain cifar10-small photos/ --out explained --budget 0.25 0.5 0.9
      one strip per budget: see where patches fade as the budget shrinks
  miaformer explain demo/model a.jpg b.png --out explained --cap 0.6 --json explained.json

JSON:
  {"model", "dense_macs", "pictures": [{"path", "page", "png", "explanations": [{"prediction": {...}, "budget", "cap",
   "grid": [rows, columns], "depth": [...], "heads": [[...]], "tokens": [[...]]}]}], "failed": [{"path", "error"}],
   "environment": {...}}
  depth has a boolean per block, heads one per block and head, tokens one per block and patch (row by row over the
  grid).
"""

MOST_ROWS = 40  # of the table on the terminal


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "explain", "show what a model executes for images", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images and folders of images")
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory for pages and PNGs")
    parser.add_argument(
        "--budget",
        type=float,
        nargs="+",
        metavar="B",
        help="mean MACs, as fractions of the dense model's; one strip per budget",
    )
    parser.add_cap()
    parser.add_top_k()
    parser.add_argument("--json", metavar="FILE", help="write all explanations to this file")
    parser.add_number("--batch-size", 16, "images per batch")
    parser.add_engine()
    parser.add_dtype()
    parser.add_device()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  # or say what is missing, before anything is done

    from miaformer.cli.output import LiveProgress, console, list_failed, say, write_json
    from miaformer.prediction.predictor import Predictor
    from miaformer.prediction.sources import find_pictures
    from miaformer.reports.explaining import write_explanations

    check_positive(args, "top_k", "batch_size")
    paths, missing = find_pictures(args.paths)
    device = open_device(args.device, args.threads)
    model = open_model(args.model, device, args.dtype, **own_model(args))
    budgets = args.budget or [None]
    several = len(paths) + len(missing) > 1 or any(Path(given).is_dir() for given in args.paths)
    with LiveProgress({"explain": len(paths)}) as on_progress:
        found = write_explanations(
            Predictor(model, engine=args.engine, on_choice=say_choice),
            paths,
            args.out,
            budgets,
            cap=args.cap,
            top_k=args.top_k,
            batch_size=args.batch_size,
            name=args.model,
            missing=missing,
            index=several,
            on_progress=on_progress,
        )
    if args.json:
        write_json(args.json, found.to_json())
    if found.pictures:
        console().print(_table(found.pictures))
        opened = Path(args.out, "index.html" if several else f"{found.pictures[0].page}.html")
        say(f"{opened}: open it in a browser")
    if found.failed:
        list_failed(found.failed)
    return 1 if found.failed else 0


def _table(pictures: Sequence[Explained]) -> Any:
    """A row a picture and budget, in the order of the index."""
    from rich.table import Table
    from rich.text import Text

    from miaformer.reports.explanation_page import named

    left = len(pictures) - MOST_ROWS
    more = f"{left:,} more are in index.html. " if left > 0 else ""
    table = Table(caption=f"{more}MACs: of the dense model's. Heads and patches: of executed blocks.")
    table.add_column("picture", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("asked", no_wrap=True)
    table.add_column("says", overflow="ellipsis", no_wrap=True)
    for name in ("MACs", "blocks", "heads", "patches"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in pictures[:MOST_ROWS]:
        for place, shown in enumerate(one.shown):
            spent, guess = shown.prediction, shown.prediction.top_k[0]
            table.add_row(
                Text(one.name if place == 0 else ""),
                shown.asked,
                Text(f"{named(guess)} ({guess.probability:.0%})"),
                f"{spent.macs_fraction:.3f}",
                f"{sum(shown.depth)}/{len(shown.depth)}",
                f"{spent.heads_kept:.2f}",
                f"{spent.tokens_kept:.2f}",
                end_section=place == len(one.shown) - 1 and len(one.shown) > 1,
            )
    return table
