"""What `predict` and `embed` share: pictures from many places in, a row for each out, in a run that can be resumed."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from miaformer.cli.arguments import CommandParser, check_positive, open_device, open_model, own_model
from miaformer.prediction.rows import Table
from miaformer.prediction.sources import Inputs, find_inputs
from miaformer.prediction.unfinished import UnfinishedRun, check_out, is_finished

if TYPE_CHECKING:
    import torch

    from miaformer.model.model import MIAFormer
    from miaformer.prediction.classify import RowMaker

PATHS = """\
PATH is any of these; give as many as you like, in any mix:
  an image, or a folder with everything below it (except hidden files)
  a pattern in quotes, 'photos/**/*.jpg', if it matches too many names for the shell
  a tar or zip archive (.tar, .tar.gz, .tar.bz2, .tar.xz, .zip): its members with the suffix of an image, as
      ARCHIVE/MEMBER
  a parquet file with a column of encoded images, {bytes, path} or paths: its rows, as FILE/ROW
Archives and parquet files are read as streams, so memory use does not grow with their size. The rows of the output
keep the order of the inputs.
"""

RESUME = """\
After Ctrl-C, kill -9 or a crash, the same command with --resume continues where it stopped. The finished FILE is the
same as without the interruption, byte by byte (.parquet: row by row; on the same kind of machine). Until FILE is
complete, its rows are in FILE.partial/, and an existing FILE stays as it is. Without --resume, a command starts
afresh: it drops what an unfinished run left in FILE.partial/, and replaces FILE at the end.
"""

REFUSED = """\
--resume refuses to continue with other arguments, another model, or other input files than the run began with. A kill
loses the current batch, which the resumed run repeats.
"""

Make = Callable[[argparse.Namespace, "MIAFormer"], "RowMaker"]


def add_pictures(parser: CommandParser, out: str) -> None:
    """PATH, and what says where rows go and what each picture may take. out: the formats of FILE."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="images, folders, patterns, archives and parquet files"
    )
    parser.add_image_column()
    parser.add_argument("--out", required=True, metavar="FILE", help=f"output file: {out}")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run, if there is one")
    parser.add_argument("--budget", type=float, metavar="B", help="mean MACs, as a fraction of the dense model's")
    parser.add_cap()
    parser.add_number("--batch-size", 32, "images per batch")
    parser.add_dtype()
    parser.add_device()
    group = parser.add_argument_group("Ray (needs the extra `ray`)")
    group.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="number of processes that share the work; --threads applies to each",
    )
    group.add_argument(
        "--ray-address", metavar="A", help="address of a running cluster (default: start one on this machine)"
    )


def run_over_pictures(args: argparse.Namespace, make: Make, table: Table) -> int:
    """Rows of all pictures into `args.out`. make: the rows, by the opened model. Returns the exit status."""
    from miaformer.cli.output import LiveProgress, list_failed, say
    from miaformer.prediction.run import predict

    check_out(args.out, table)
    check_positive(args, "batch_size", "ray_workers")
    if args.resume and is_finished(args.out):
        say(f"{args.out} is whole: nothing to resume. Without --resume it is made anew.")
        return 0
    inputs = find_inputs(args.paths, args.image_column)
    _check_apart(inputs, args.out)
    device = open_device(args.device, args.threads)
    model = open_model(args.model, device, args.dtype, **own_model(args))
    settings = _settings(args, model, inputs, device)
    maker = make(args, model)

    total = inputs.total
    with UnfinishedRun(args.out, settings, args.resume, table) as unfinished:
        if unfinished.tally.rows:
            say(f"Resuming after {_pictures(unfinished.tally.rows)}.")
        try:
            with LiveProgress({} if total is None else {args.command: total}, unit="pictures") as progress:
                on_rows = partial(progress, args.command)
                if args.ray_workers is None:
                    predict(inputs, maker, unfinished, args.batch_size, on_rows)
                else:
                    _predict_on_ray(args, make, inputs, unfinished, on_rows)
        except KeyboardInterrupt:
            kept = _pictures(unfinished.tally.rows)
            raise KeyboardInterrupt(f"interrupted: {kept} kept; the same command with --resume goes on") from None
        tally = unfinished.tally
        if tally.pictures:
            say(f"{_summary(unfinished)} ({_asked(args, model)}) -> {args.out}")
    if tally.failed:
        list_failed(dict(tally.failures), tally.failed)
    return 1 if tally.failed else 0


def _predict_on_ray(
    args: argparse.Namespace, make: Make, inputs: Inputs, unfinished: UnfinishedRun, on_rows: Callable[[int], None]
) -> None:
    import torch

    from miaformer.prediction.on_ray import predict_on_ray

    gpus = 1.0 if open_device(args.device).type == "cuda" else 0.0
    predict_on_ray(
        inputs,
        partial(_workers_rows, args, make),
        unfinished,
        args.batch_size,
        args.ray_workers,
        cpus=args.threads or max(1, torch.get_num_threads() // args.ray_workers),
        gpus=gpus,
        address=args.ray_address,
        on_rows=on_rows,
    )


def _workers_rows(args: argparse.Namespace, make: Make) -> RowMaker:
    """For a worker, which opens the model by itself: a directory must be where all workers find it."""
    device = open_device(args.device, args.threads or 1)
    return make(args, open_model(args.model, device, args.dtype, **own_model(args)))


def _check_apart(inputs: Inputs, out: str) -> None:
    named = [source.name for source in inputs.sources if source.name.endswith(Path(out).name)]
    if any(Path(name).resolve() == Path(out).resolve() for name in named):
        raise ValueError(f"--out {out} is one of the files to read: give the name of another")


def _settings(
    args: argparse.Namespace, model: MIAFormer, inputs: Inputs, device: torch.device
) -> dict[str, str | int | float | None]:
    """What decides about rows, to the last bit: a run is resumed only where all of it is the same."""
    import torch

    import miaformer
    from miaformer.model.fingerprint import fingerprint

    classes = args.classes and hashlib.blake2b(Path(args.classes).read_bytes(), digest_size=4).hexdigest()
    return {
        "--budget": args.budget,
        "--cap": args.cap,
        "--top-k": getattr(args, "top_k", None),
        "--classes": classes and f"of content {classes}",
        "--batch-size": args.batch_size,
        "--dtype": args.dtype,
        "--engine": getattr(args, "engine", None),
        "--device": str(device),
        "on Ray": args.ray_workers is not None,
        "--threads": torch.get_num_threads() if device.type == "cpu" else None,
        "MODEL": f"of weights and calibration {fingerprint(model)}",  # after --dtype, which changes its weights
        "PATH": inputs.fingerprint(),
        "miaformer": miaformer.__version__,
        "torch": torch.__version__,
    }


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _summary(run: UnfinishedRun) -> str:
    """How many pictures, how fast, and what they took."""
    tally, seconds = run.tally, run.seconds
    return (
        f"{_pictures(tally.pictures)} in {seconds:.1f} s ({tally.pictures / seconds:.1f} a second), "
        f"{tally.macs / tally.pictures:.3f} of the dense MACs on average, {tally.most:.3f} at most"
    )


def _asked(args: argparse.Namespace, model: MIAFormer) -> str:
    """The budget and the cap that were in force."""
    if args.budget is not None:
        budget = f"budget {args.budget:g}"
    elif model.calibration is None:
        budget = "no budget: the model is not calibrated"
    elif args.cap is not None:
        return f"cap {args.cap:g}, which is the budget too"
    else:
        budget = "no budget"
    return budget if args.cap is None else f"{budget}, cap {args.cap:g}"
