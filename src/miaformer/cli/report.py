"""`miaformer report`: a training run or a comparison as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_batches, open_device, open_model

if TYPE_CHECKING:
    import torch

    from miaformer.reports.page import Markup

DESCRIPTION = """\
Show a run as one self-contained HTML page, which opens from disk and needs no network. The page has curves, tables,
settings, durations, environment and command. For an unfinished run, it shows what exists so far.

RUN is a directory to which `miaformer train` or `miaformer compare` writes, or a file that `miaformer compare --json`
or `miaformer eval --json` wrote.
"""

EPILOG = """\
examples:
  miaformer report runs/digits --out report.html
  miaformer report runs/photos --eval photos.json --data photos/ --out report.html
      include its evaluation, and the images that take the least and the most compute
  miaformer report compare.json --out compare.html
"""

MOST_IMAGES = 1000  # that are searched for the cheapest and the most expensive
MOST_SHOWN = 6  # of each


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "report", "show a run or a comparison as one HTML page", DESCRIPTION, EPILOG)
    parser.add_argument("source", metavar="RUN", help="run directory or .json file")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="output file")
    parser.add_argument(
        "--eval", nargs="+", default=[], metavar="FILE", help="files that `miaformer eval --json` wrote"
    )
    parser.add_data(f"data set: show the cheapest and the most expensive of {MOST_IMAGES:,} test images")
    parser.add_device()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from miaformer.cli.output import say
    from miaformer.reports.page import write_page
    from miaformer.reports.report import read_evaluation, read_subject, report_page

    out = Path(args.out)
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: give a file, such as {out / 'report.html'}")
    subject = read_subject(Path(args.source))
    evaluations = {name: read_evaluation(Path(name)) for name in args.eval}
    more: list[Markup] = []
    if args.data:
        if subject.model is None:
            raise ValueError(f"--data shows what a trained model does, and {args.source} holds none")
        more += _extremes(subject.model, args.data, open_device(args.device, args.threads))
    write_page(out, report_page(subject, evaluations, more))
    say(f"{out}: open it in a browser")
    return 0


def _extremes(directory: Path, data: str, device: torch.device) -> Iterator[Markup]:
    from miaformer.data import open_data, spread
    from miaformer.reports.extremes import middle_budget
    from miaformer.reports.page import tag
    from miaformer.reports.plots import adaptivity_figure
    from miaformer.reports.style import in_page

    model = open_model(str(directory), device)
    images = spread(open_data(data, "test"), MOST_IMAGES)
    batches = open_batches(model, images, 64)
    about = f"{len(images):,} test images of {Path(data).name}"
    classes = model.label_names or images.classes
    yield tag("h2", "The cheapest and the most expensive images")
    yield tag("p", f"Of {about}. Patches fade by how often they are skipped.", class_="quiet")
    yield in_page(adaptivity_figure(model, batches.epoch(0), middle_budget(model), classes, MOST_SHOWN))
