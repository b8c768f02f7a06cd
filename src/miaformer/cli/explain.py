"""`miaformer explain`: what a model executes for pictures, block by block, as PNG and as HTML."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, add_compute, add_model, open_device, open_model, own_model
from miaformer.cli.predict import list_failed

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from miaformer.prediction.predictor import Predictor
    from miaformer.reports.explained import About, Explained
    from miaformer.reports.page import Markup

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
LONGEST_NAME = 60  # characters of a page's name: a file's name holds 255 bytes


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "explain", "show what a model executes for images", DESCRIPTION, EPILOG)
    add_model(parser, "model directory, hub id, name of a bundled model, or timm:NAME")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images and folders of images")
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory for pages and PNGs")
    parser.add_argument(
        "--budget",
        type=float,
        nargs="+",
        metavar="B",
        help="mean MACs, as fractions of the dense model's; one strip per budget",
    )
    parser.add_argument(
        "--cap", type=float, metavar="C", help="hard limit on the MACs of one image, as a fraction of the dense model's"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="number of classes to name (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write all explanations to this file")
    add_compute(parser, batch_size=16)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  # or say what is missing, before anything is done

    from miaformer.cli.output import LiveProgress, console, write_json
    from miaformer.prediction.predictor import Predictor
    from miaformer.prediction.rows import writable
    from miaformer.prediction.sources import find_pictures
    from miaformer.reports.explained import index_page
    from miaformer.reports.page import write_page

    for name, value in (("--top-k", args.top_k), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    paths, missing = find_pictures(args.paths)
    device = open_device(args.device, args.threads)
    model = open_model(args.model, device, args.dtype, **own_model(args))
    predictor = Predictor(model)
    budgets = list(dict.fromkeys(args.budget or [None]))
    for budget in budgets:
        predictor.try_once(budget=budget, cap=args.cap)

    out = Path(args.out)
    several = len(paths) + len(missing) > 1 or any(Path(given).is_dir() for given in args.paths)
    call = _Call(predictor, budgets, args.cap, args.top_k, out, _about(args.model, predictor), several)
    call.failed.update({writable(name): reason for name, reason in missing.items()})
    with LiveProgress({"explain": len(paths)}) as progress:
        for start in range(0, len(paths), args.batch_size):
            chunk = paths[start : start + args.batch_size]
            call.explain(chunk)
            progress("explain", start + len(chunk))

    pictures = sorted(call.done, key=lambda one: one[0].shown[0].prediction.macs_fraction)
    if several:
        write_page(out / "index.html", index_page(pictures, call.failed, call.about))
    if args.json:
        write_json(args.json, _report(call, [one for one, _ in pictures]))
    terminal = console()
    if pictures:
        terminal.print(_table([one for one, _ in pictures]))
        opened = out / ("index.html" if several else f"{pictures[0][0].page}.html")
        terminal.print(f"{opened}: open it in a browser", soft_wrap=True, markup=False)
    if call.failed:
        list_failed(call.failed)
    return 1 if call.failed else 0


@dataclass(frozen=True)
class _Opened:
    """What is kept of a picture, which may be large."""

    path: Path
    size: tuple[int, int]  # width and height
    seen: Image.Image  # of `seen_picture`
    image: Tensor  # (3, H, W)


@dataclass
class _Call:
    """What one call of the command does, and what it has found."""

    predictor: Predictor
    budgets: Sequence[float | None]
    cap: float | None
    top_k: int
    out: Path
    about: About
    indexed: bool
    done: list[tuple[Explained, Markup]] = field(default_factory=list)  # with a thumbnail
    failed: dict[str, str] = field(default_factory=dict)  # why, by path
    _taken: set[str] = field(default_factory=lambda: {"index"})

    def explain(self, paths: Sequence[Path]) -> None:
        """Explain these pictures, and write the page and the PNG of each."""
        from miaformer.prediction.explanation import explain
        from miaformer.prediction.rows import writable
        from miaformer.reports.explained import Explained, picture_page, thumbnail
        from miaformer.reports.explanation_plot import plot_explanation
        from miaformer.reports.page import write_page

        opened = list(self._opened(paths))
        if not opened:
            return
        images = [one.image for one in opened]
        by_budget = [explain(self.predictor, images, budget, self.cap, self.top_k) for budget in self.budgets]
        for picture, *shown in zip(opened, *by_budget, strict=True):
            path, seen = picture.path, picture.seen
            one = Explained(writable(str(path)), self._page(path), picture.size, shown)
            plot_explanation(shown, seen, self.out / f"{one.page}.png", writable(path.name), self.about.dense_macs)
            write_page(self.out / f"{one.page}.html", picture_page(one, seen, self.about, self.indexed))
            self.done.append((one, thumbnail(seen)))

    def _opened(self, paths: Sequence[Path]) -> Iterator[_Opened]:
        from miaformer.data.images import ImageError, open_image
        from miaformer.prediction.entries import reason
        from miaformer.prediction.explanation import seen_picture
        from miaformer.prediction.rows import writable

        for path in paths:
            try:
                picture = open_image(path)
            except ImageError as error:
                self.failed[writable(str(path))] = reason(error, str(path))
                continue
            image, seen = self.predictor.prepare_picture(picture), seen_picture(self.predictor, picture)
            yield _Opened(path, picture.size, seen, image)

    def _page(self, path: Path) -> str:
        """A name of its own for this picture's files, on file systems too that do not tell a from A."""
        stem = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.")[:LONGEST_NAME] or "picture"
        name, count = stem, 1
        while name.casefold() in self._taken:
            count += 1
            name = f"{stem}-{count}"
        self._taken.add(name.casefold())
        return name


def _about(name: str, predictor: Predictor) -> About:
    from miaformer.evaluation import describe_environment
    from miaformer.reports.explained import About

    cost = predictor.model.cost()
    device = next(predictor.model.parameters()).device
    return About(name, cost.backbone, cost.trims_last_block, describe_environment(device, 0))


def _report(call: _Call, pictures: Sequence[Explained]) -> dict[str, Any]:
    rows = [
        {
            "path": one.name,
            "page": f"{one.page}.html",
            "png": f"{one.page}.png",
            "explanations": [shown.to_json() for shown in one.shown],
        }
        for one in pictures
    ]
    failed = [{"path": path, "error": reason} for path, reason in call.failed.items()]
    about = {"model": call.about.model, "dense_macs": call.about.dense_macs}
    return {**about, "pictures": rows, "failed": failed, "environment": call.about.environment}


def _table(pictures: Sequence[Explained]) -> Any:
    """A row a picture and budget, in the order of the index."""
    from rich.table import Table
    from rich.text import Text

    from miaformer.reports.explained import named

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
