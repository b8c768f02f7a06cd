"""The `miaformer` command: one module a subcommand, each with `add_parser(subparsers)` and `run(args)`.

Nothing heavy is imported before arguments are parsed, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import miaformer
from miaformer.cli.arguments import CommandParser, named_columns

# Modules of this package, in the order that help lists them.
COMMANDS = (
    "train",
    "eval",
    "compare",
    "attack",
    "predict",
    "embed",
    "explain",
    "report",
    "serve",
    "bench",
    "export",
    "demo",
)

DESCRIPTION = """\
Vision Transformers that skip blocks, heads and tokens image by image: what you skip, you do not pay for.

MODEL is a directory that `miaformer train` or save_pretrained() wrote, or the id of a model on the Hugging Face hub
(OWNER/NAME). DATA is `digits` (built in), a folder of class folders, a CSV or TSV file of paths and labels, a folder
of parquet files in the format of `datasets`, or a name that timm knows (torch/cifar10:ROOT). A budget is the mean
compute over a data set. A cap is the most compute that one image may take. Both are fractions of the dense model's
multiply-accumulates (MACs).
"""

EPILOG = """\
examples:
  miaformer demo --out demo
      train, calibrate, evaluate and plot a small model; takes a few minutes on a laptop
  miaformer eval demo/model --data digits --budgets 0.35 0.5 0.7 --json report.json
      measure accuracy per compute, against controls of equal cost
  miaformer bench timm:deit_small_patch16_224 --data photos/ --engines eager --batch-sizes 1 8
      time sparse against dense execution
  miaformer predict demo/model photos/ --out predictions.csv --budget 0.5
      classify a folder of images
  miaformer embed demo/model photos/ --out embeddings.npz --budget 0.5
      what the classifier reads of each image, for retrieval and clustering
  miaformer explain demo/model photos/ --out explained --budget 0.3 0.5 0.9
      write a page per image that shows which patches, heads and blocks the model executes
  miaformer report runs/photos --out report.html
      show a training run or a comparison as one page
  miaformer serve demo/model --p95-ms 200
      classify over HTTP; under load, spend less on each image and still answer in time
  miaformer export demo/model model.onnx
      write one file for ONNX Runtime that skips at run time

exit status: 0 on success; 1 if the command finished but some inputs failed; 2 on wrong usage or an error, reported
in one line (MIAFORMER_DEBUG=1 shows where it came from); 130 if stopped by Ctrl-C
"""

# What a command needs beyond the core, and the extra that installs it.
_EXTRAS = {
    "rich": "cli",
    "accelerate": "train",
    "sklearn": "digits",
    "pyarrow": "data",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "pyautoattack": "attack",
    "imagecorruptions": "corruptions",
}


def build_parser() -> CommandParser:
    parser = CommandParser(prog="miaformer", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"miaformer {miaformer.__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        import_module(f"miaformer.cli.{command}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process's own) and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal or a pipe cannot show stops nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args, unknown = build_parser().parse_known_args(argv)
    except SystemExit as end:  # of --help, --version and wrong usage
        return int(end.code or 0)
    if unknown:
        _say(f"error: unrecognized arguments: {' '.join(unknown)} (see miaformer {args.command} --help)")
        return 2
    args.argv = list(sys.argv[1:] if argv is None else argv)
    for name, value in vars(args).items():
        if isinstance(value, str) and name != "command":
            setattr(args, name, _at_home(value))
    try:
        if hasattr(args, "label_column"):
            named_columns(args)
        return int(args.run(args))
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted")
        return 130
    except (FloatingPointError, ImportError, OSError, TypeError, ValueError) as error:
        if os.environ.get("MIAFORMER_DEBUG") == "1":
            raise
        _say(f"error: {_describe(error)}")
        return 2


def _at_home(value: str) -> str:
    """Shells leave the ~ of `--out=~/runs` as it is."""
    return str(Path(value).expanduser()) if value.startswith("~/") else value


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = _EXTRAS.get(error.name.partition(".")[0])
        if extra is not None:
            return f"this needs {error.name}, which is not installed: pip install 'miaformer[{extra}]'"
    return " ".join(str(error).split()) or repr(error)


def _say(line: str) -> None:
    sys.stderr.write(f"miaformer: {line}\n")
