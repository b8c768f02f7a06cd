"""From what a user writes after `--data` to images."""

from __future__ import annotations

from pathlib import Path

from miaformer.data.digits import Digits
from miaformer.data.folders import ClassFolders
from miaformer.data.label_files import SUFFIXES, LabelFile
from miaformer.data.named import NAME_PREFIXES, STREAM_PREFIXES, NamedData
from miaformer.data.parquet import ParquetFolder, parquet_files
from miaformer.data.source import ImageData, Split, check_split
from miaformer.data.splits import Source, choose_split

ACCEPTED = (
    "'digits' (embedded), a folder of class folders (ROOT/cat/1.png, or ROOT/train/cat/1.png and "
    "ROOT/val/cat/2.png), a CSV or TSV file of paths and labels, a folder of parquet files as `datasets` writes "
    "them, or a name that "
    "timm.data.create_dataset takes: 'torch/cifar10:ROOT', 'hfds/OWNER/NAME'"
)


def open_data(spec: str | Path, split: Split) -> ImageData:
    """Open one split of a data set.

    Args:
        spec: "digits"; a folder of class folders; a CSV or TSV file of paths and labels; a folder of parquet files
            (or one such file); or a name that `timm.data.create_dataset` takes, with its root after a colon:
            "torch/cifar10:/data".
        split: "train", "calibration" or "test". How these are made where the data has other splits, or none, is
            said at `splits.choose_split`: they are always disjoint and always the same.

    Raises:
        ValueError: nothing is there, its layout is none of these, or it has no such split.
        ImportError: the data needs an extra that is not installed.
    """
    check_split(split)
    if spec == "digits":
        return Digits(split)
    return choose_split(_source(spec), split)


def _source(spec: str | Path) -> Source:
    if isinstance(spec, str):
        if spec.startswith(STREAM_PREFIXES):
            raise ValueError(
                f"{spec}: a stream, which cannot be shuffled and resumed exactly; use 'hfds/...' or save it "
                f"as class folders"
            )
        if spec.startswith(NAME_PREFIXES):
            return NamedData(spec)
    root = Path(spec)
    if not root.exists():
        raise ValueError(f"unknown data {str(spec)!r}: no such folder or file; data is {ACCEPTED}")
    if parquet_files(root):
        return ParquetFolder(root)
    if root.is_dir():
        return ClassFolders(root)
    if root.suffix.lower() in SUFFIXES:
        return LabelFile(root)
    raise ValueError(f"{root}: a file of this kind is not a data set; data is {ACCEPTED}")
