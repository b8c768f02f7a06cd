"""`miaformer predict`: classify files and folders of pictures, each by its own compute."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from miaformer.cli.arguments import add_command, add_compute, open_device, open_model
from miaformer.cli.budget_ms import MsBudget, add_budget_ms, open_budgets_ms

if TYPE_CHECKING:
    from torch import Tensor

    from miaformer.model import MIAFormer
    from miaformer.predictor import Predictor

DESCRIPTION = """\
Classify pictures: files, and folders with everything below them. One row a picture goes to FILE, as soon as it is
known.

A picture that cannot be read stops nothing: the others are classified, it gets a row with an `error`, and at the end
all such pictures are listed and the exit status is 1.
"""

EPILOG = """\
examples:
  miaformer predict demo/model photos/ --out predictions.csv --budget 0.5
  miaformer predict OWNER/NAME a.jpg b.png --out predictions.jsonl --cap 0.6 --top-k 3

rows (columns of a .csv, keys of a .jsonl line):
  path           the picture
  label          number of the likeliest class; `class` is its name, `probability` its softmax
  top_k          the K likeliest, "LABEL:PROBABILITY ..." or a list of {label, class, probability}
  macs_fraction  what it took, as a fraction of the dense model's MACs
  depth_kept     share of blocks executed; heads_kept, tokens_kept: shares of heads and tokens in executed blocks
  error          why there is none of this
With --budget-ms also predicted_ms, by the table, and ms, measured: a picture's share of the time of its batch, with
other pictures decoded meanwhile.
Class names come from --classes FILE, else from the model; without either, `class` is empty.
"""

COLUMNS = (
    "path",
    "label",
    "class",
    "probability",
    "top_k",
    "macs_fraction",
    "depth_kept",
    "heads_kept",
    "tokens_kept",
    "error",
)
OF_TIME = ("predicted_ms", "ms")  # more columns, with --budget-ms
Row = dict[str, Any]


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "predict", "classify pictures", DESCRIPTION, EPILOG)
    parser.add_argument("model", metavar="MODEL", help="directory or hub id")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, and folders of pictures")
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write: a .csv or .jsonl file")
    parser.add_argument("--budget", type=float, metavar="B", help="mean MACs, a fraction of the dense model's")
    add_budget_ms(parser)
    parser.add_argument("--cap", type=float, metavar="C", help="the most MACs one picture may take, a fraction: hard")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to name (default: 5)")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line, in the order of labels")
    add_compute(parser, batch_size=32)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from miaformer.cli.output import LiveProgress, console
    from miaformer.predictor import Predictor

    out_path = Path(args.out)
    if out_path.suffix not in _WRITERS:
        raise ValueError(f"--out {args.out} must end in {' or '.join(_WRITERS)}")
    for name, value in (("--top-k", args.top_k), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    paths, missing = find_pictures(args.paths)
    device = open_device(args.device, args.threads)
    model = open_model(args.model, device, args.dtype)
    if device.type == "cpu":
        model.prepack()  # 5 % of the time of a small model at the default batch size, more of a large one
    if not model.num_classes:
        raise ValueError(f"{args.model} has no classifier (num_classes=0)")
    predictor = Predictor(model, _class_names(args.classes, model))
    in_ms = _in_ms(args, model)
    spend = {"cap": args.cap, **({"budget": args.budget} if in_ms is None else {"price": in_ms.price})}
    predictor.try_once(**spend)

    failed = dict(missing)
    summary = _Summary(in_ms)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with out_path.open("w", newline="", encoding="utf-8") as file, LiveProgress({"predict": len(paths)}) as progress:
        write = _WRITERS[out_path.suffix](file, COLUMNS if in_ms is None else COLUMNS + OF_TIME)
        for path, reason in missing.items():
            write({"path": path, "error": reason})
        done = 0
        for batch in _decoded(paths, predictor, args.batch_size):
            for row in _classified(predictor, batch, spend, in_ms, args.top_k):
                write(row)
                if "error" in row:
                    failed[row["path"]] = row["error"]
                else:
                    summary.add(row)
            file.flush()
            done += len(batch)
            progress("predict", done)

    out = console()
    if summary.count:
        out.print(f"{summary} ({_asked(args, model)}) -> {out_path}", soft_wrap=True, markup=False)
    if failed:
        _list_failed(failed)
    return 1 if failed else 0


def find_pictures(sources: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Pictures, each once, and what was named but is not there, with the reason.

    Raises ImageError where there is no picture at all.
    """
    from miaformer.images import ImageError, find_images

    found: dict[Path, None] = {}
    missing: dict[str, str] = {}
    for source in sources:
        try:
            found.update(dict.fromkeys(find_images(source)))
        except ImageError as error:
            missing[source] = _reason(error, source)
    if not found:
        raise ImageError("; ".join(f"{source}: {reason}" for source, reason in missing.items()))
    return list(found), missing


def _in_ms(args: argparse.Namespace, model: MIAFormer) -> MsBudget | None:
    if args.budget_ms is None:
        return None
    if args.budget is not None:
        raise ValueError("give one of --budget and --budget-ms")
    return open_budgets_ms([args.budget_ms], args.latency, model, args.batch_size)[0]


def _reason(error: Exception, name: str) -> str:
    """An error without the name that it begins with."""
    return " ".join(str(error).removeprefix(f"{name}: ").split())


def _class_names(file: str | None, model: MIAFormer) -> Sequence[str] | None:
    if file is None:
        return None
    names = Path(file).read_text(encoding="utf-8").splitlines()
    if len(names) != model.num_classes:
        raise ValueError(f"--classes {file} has {len(names)} lines, the model {model.num_classes} classes")
    return names


def _decoded(paths: Sequence[Path], predictor: Predictor, batch_size: int) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Batches of (path, tensor (3, H, W), or why there is none). The next one is decoded meanwhile."""
    from miaformer.images import ImageError

    def decode(path: Path) -> tuple[str, Tensor | str]:
        try:
            return str(path), predictor.prepare(path)
        except ImageError as error:
            return str(path), _reason(error, str(path))

    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(decode, chunks[0])
        for following in [*chunks[1:], []]:
            batch = ahead
            ahead = pool.map(decode, following)
            yield list(batch)


def _classified(
    predictor: Predictor,
    batch: Sequence[tuple[str, Tensor | str]],
    spend: dict[str, Any],
    in_ms: MsBudget | None,
    top_k: int,
) -> Iterator[Row]:
    """A row for each picture, in their order. spend: the budget, price and cap of `MIAFormer.run`."""
    images = [found for _, found in batch if not isinstance(found, str)]
    rows: Iterator[Row] = iter(())
    if images:
        start = time.perf_counter()
        output = predictor.run(images, **spend)
        found = predictor.read(output, top_k)
        ms = (time.perf_counter() - start) * 1000 / len(images)  # results are on the host: nothing is under way
        times = (
            [{}] * len(images)
            if in_ms is None
            else [{"predicted_ms": predicted, "ms": ms} for predicted in in_ms.table.predict(output.trace).tolist()]
        )
        rows = ({**prediction.to_json(), **time} for prediction, time in zip(found, times, strict=True))
    for path, prepared in batch:
        yield {"path": path, **({"error": prepared} if isinstance(prepared, str) else next(rows))}


def _csv_writer(file: TextIO, columns: Sequence[str]) -> Callable[[Row], None]:
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()

    def write(row: Row) -> None:
        top_k = " ".join(f"{entry['label']}:{entry['probability']:.6g}" for entry in row.get("top_k", ()))
        writer.writerow({**row, "top_k": top_k})

    return write


def _jsonl_writer(file: TextIO, columns: Sequence[str]) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        file.write(json.dumps({name: row[name] for name in columns if name in row}, ensure_ascii=False) + "\n")

    return write


_WRITERS: dict[str, Callable[[TextIO, Sequence[str]], Callable[[Row], None]]] = {
    ".csv": _csv_writer,
    ".jsonl": _jsonl_writer,
}


class _Summary:
    """How many pictures, how fast, and what they took."""

    def __init__(self, in_ms: MsBudget | None) -> None:
        self._in_ms, self._ms = in_ms, dict.fromkeys(OF_TIME, 0.0)
        self._clock = time.perf_counter
        self._start = self._clock()
        self.count, self._total, self._most = 0, 0.0, 0.0

    def add(self, row: Row) -> None:
        self.count += 1
        self._total += row["macs_fraction"]
        self._most = max(self._most, row["macs_fraction"])
        for name in self._ms:
            self._ms[name] += row.get(name, 0.0)

    def __str__(self) -> str:
        seconds = self._clock() - self._start
        pictures = "1 picture" if self.count == 1 else f"{self.count:,} pictures"
        return (
            f"{pictures} in {seconds:.1f} s ({self.count / seconds:.1f} a second), {self._total / self.count:.3f} of "
            f"the dense MACs on average, {self._most:.3f} at most{self._time()}"
        )

    def _time(self) -> str:
        if self._in_ms is None:
            return ""
        predicted, measured = (total / self.count for total in self._ms.values())
        return f"; asked {self._in_ms.asked_ms:g} ms a picture, predicted {predicted:.4g}, measured {measured:.4g}"


def _asked(args: argparse.Namespace, model: MIAFormer) -> str:
    """The budget and the cap that were in force."""
    default = model.adapt_config.default_budget
    if args.budget_ms is not None:
        budget = f"budget {args.budget_ms:g} ms"
    elif args.budget is not None:
        budget = f"budget {args.budget:g}"
    elif model.calibration is None:
        budget = "no budget: the model is not calibrated"
    else:
        budget = "no budget" if default is None else f"the model's own budget {default:g}"
    return budget if args.cap is None else f"{budget}, cap {args.cap:g}"


def _list_failed(failed: dict[str, str]) -> None:
    from rich.table import Table

    from miaformer.cli.output import console

    table = Table(title=f"{len(failed)} failed", title_justify="left", title_style="bold red")
    table.add_column("path", overflow="fold")
    table.add_column("why", overflow="fold")
    for path, reason in failed.items():
        table.add_row(*(_plain(text) for text in (path, reason)))
    console(stderr=True).print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
