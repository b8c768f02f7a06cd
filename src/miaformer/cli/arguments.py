"""Arguments that commands share, and what becomes of them: a model, batches of data, a device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from miaformer.data import Batches, ImageData
    from miaformer.export.engines.auto import Choice
    from miaformer.model.model import MIAFormer

DTYPES = ("float32", "bfloat16", "float16")


DATA_SET = "data set: digits, a folder, a CSV file, or a name that timm knows"


class CommandParser(argparse.ArgumentParser):
    """A parser with the options that commands share. Its help reads as it is written, its errors are one line."""

    def __init__(self, **about: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **about)

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"miaformer: error: {message} (see {self.prog} --help)\n")
        self.exit(2)

    def add_model(self) -> None:
        """MODEL, and what goes with timm:NAME: --weights, --pretrained and --image-size; --classes goes with any."""
        self.add_argument(
            "model", metavar="MODEL", help="model directory, hub id, name of a bundled model, or timm:NAME"
        )
        group = self.add_argument_group("your own model")
        group.add_argument(
            "--weights", metavar="FILE", help="checkpoint for timm:NAME: .safetensors, .pth, .pt, .bin or .ckpt"
        )
        group.add_argument("--pretrained", action="store_true", help="download the weights of timm:NAME")
        group.add_argument(
            "--image-size",
            type=int,
            metavar="N",
            help="image size for timm:NAME, N x N pixels (default: FILE's, else timm's)",
        )
        group.add_argument("--classes", metavar="FILE", help="class names, one per line, in label order")

    def add_data(self, about: str = DATA_SET, required: bool = False) -> None:
        """--data, and what names the columns of tables in it: `named_columns` makes one of the three."""
        group = self.add_argument_group("data")
        group.add_argument("--data", required=required, metavar="DATA", help=about)
        _add_image_column(group)
        group.add_argument(
            "--label-column", metavar="C", help="label column of a CSV, TSV, parquet or hub table (default: detected)"
        )

    def add_image_column(self) -> None:
        _add_image_column(self)

    def add_several(self, option: str, metavar: str, kind: Any, default: Sequence[Any], about: str) -> None:
        """An option of one value or more, whose help tells the default."""
        shown = f"{about} (default: {' '.join(map(str, default))})"
        self.add_argument(option, nargs="+", type=kind, default=list(default), metavar=metavar, help=shown)

    def add_budgets(self, default: Sequence[float] = (0.35, 0.5, 0.7)) -> None:
        self.add_several("--budgets", "B", float, default, "mean MACs, as fractions of the dense model's")

    def add_cap(self) -> None:
        about = "hard limit on the MACs of one image, as a fraction of the dense model's"
        self.add_argument("--cap", type=float, metavar="C", help=about)

    def add_number(self, option: str, default: float, about: str, metavar: str = "N") -> None:
        """A number like its default: whole, or not."""
        shown = f"{about} (default: {default:g})"
        self.add_argument(option, type=type(default), default=default, metavar=metavar, help=shown)

    def add_top_k(self) -> None:
        self.add_number("--top-k", 5, "number of classes to name", "K")

    def add_seed(self, of: str) -> None:
        self.add_argument("--seed", type=seed_number, default=0, help=f"seed of {of} (default: 0)")

    def add_outputs(self, report: str, drawn: str) -> None:
        """--json and --plot, for `output.write_outputs`."""
        self.add_argument("--json", metavar="FILE", help=f"write {report} to this file")
        self.add_argument("--plot", metavar="FILE.png", help=f"plot {drawn} to this file")

    def add_device(self) -> None:
        """--device and --threads, for `open_device`."""
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
        self.add_threads()

    def add_threads(self) -> None:
        self.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: PyTorch's)")

    def add_dtype(self) -> None:
        about = f"data type: {', '.join(DTYPES)} (default: float32)"
        self.add_argument("--dtype", choices=DTYPES, default="float32", metavar="T", help=about)

    def add_engine(self, default: str = "eager") -> None:
        about = (
            "what runs the model. eager: PyTorch; onnx: ONNX Runtime (CPU, float32); auto: the faster one here, timed "
            f"on the first images (default: {default})"
        )
        self.add_argument("--engine", choices=("auto", "eager", "onnx"), default=default, metavar="E", help=about)


def _add_image_column(parser: Any) -> None:
    parser.add_argument("--image-column", metavar="C", help="image column of a table (default: detected)")


def add_command(subparsers: Any, name: str, help: str, description: str, epilog: str) -> CommandParser:
    parser: CommandParser = subparsers.add_parser(name, help=help, description=description, epilog=epilog)
    return parser


def own_model(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_model` added beside MODEL, for `open_model`."""
    return {name: getattr(args, name) for name in ("weights", "pretrained", "image_size", "classes")}


def named_columns(args: argparse.Namespace) -> None:
    """Let `args.data` name the columns that were named beside it. Raises ValueError where there is no data."""
    from miaformer.data.columns import with_columns

    image, label = args.image_column, args.label_column
    if image is None and label is None:
        return
    if args.data is None:
        raise ValueError(f"--{'label' if image is None else 'image'}-column needs --data")
    args.data = with_columns(args.data, image, label)


def seed_number(text: str) -> int:
    """What --seed may be, as an argparse type."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 or more and less than 2**63")
    return int(text)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for an option that must be at least 1 and is not; one that was not given is none."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


def open_device(name: str, threads: int | None = None) -> torch.device:
    """The device of this name; `auto` is CUDA where there is one. Sets the number of threads."""
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error
    return device


def say_choice(choice: Choice) -> None:
    """Tell of what the engine `auto` timed, on stderr: results may go elsewhere."""
    for line in choice.lines():
        sys.stderr.write(f"miaformer: {line}\n")
    sys.stderr.flush()


def open_model(
    spec: str,
    device: torch.device,
    dtype: str = "float32",
    *,
    num_classes: int | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    classes: str | None = None,
) -> MIAFormer:
    """The model that MODEL names, in evaluation mode.

    `timm:NAME` is an unadapted backbone, with the weights in a file, or timm's, or else random ones for as many classes
    as the file `classes` names, or `num_classes`. Raises ValueError where there is no such model, and where `classes`
    names fewer or more than the model has.
    """
    import torch

    from miaformer import AdaptConfig, adapt, load, load_backbone
    from miaformer.model.classes import read_class_names
    from miaformer.vit.backbone import transformer_blocks
    from miaformer.vit.layers import shares_keys

    names = None if classes is None else read_class_names(classes)
    if spec.startswith("timm:"):
        is_random = weights is None and not pretrained
        number = (num_classes if names is None else len(names)) if is_random else None  # what weights answer, stays
        backbone = load_backbone(spec.removeprefix("timm:"), weights, image_size, number, pretrained)
        shared = any(shares_keys(block.attn) for block in transformer_blocks(backbone))
        model = adapt(backbone, grains=("depth", "tokens") if shared else AdaptConfig.grains)
        if is_random:
            sys.stderr.write(f"miaformer: {spec} has random weights: give --weights FILE, or --pretrained\n")
    else:
        given = {"--weights": weights is not None, "--pretrained": pretrained, "--image-size": image_size is not None}
        refused = [option for option, is_given in given.items() if is_given]
        if refused:
            raise ValueError(f"{' and '.join(refused)}: only with timm:NAME; the model {spec} has weights and a size")
        model = load(spec)
    if names is not None:
        if len(names) != model.num_classes:
            raise ValueError(f"--classes {classes} has {len(names)} lines, the model {model.num_classes} classes")
        model.label_names = names
    return model.to(device, getattr(torch, dtype)).eval()


def open_batches(model: MIAFormer, data: ImageData, batch_size: int) -> Batches:
    """`ordered_batches`; a line says where the model's classes are taken in the data's order."""
    from miaformer.evaluation.on_data import ordered_batches

    has_names = model.label_names is not None
    batches = ordered_batches(model, data, batch_size)
    if not has_names:
        shown = ", ".join(data.classes[:3]) + (", ..." if len(data.classes) > 3 else "")
        sys.stderr.write(
            f"miaformer: the model does not name its classes: taken in the order of {data.name}: {shown}\n"
        )
    return batches


def radius(option: str, text: str) -> float:
    """Of "4/255", or "0.0157", in pixels from 0 to 1."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{option} {text}: give a radius such as 4/255 or 0.016") from error
    if not 0 < value <= 1000:
        raise ValueError(f"{option} {text} must be positive, in pixels from 0 to 1: 4/255, say")
    return value
