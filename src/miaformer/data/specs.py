"""From what a user writes after `--data` to images."""

from __future__ import annotations

from pathlib import Path

from miaformer.data.columns import Columns, split_columns
from miaformer.data.digits import Digits
from miaformer.data.folders import ClassFolders
from miaformer.data.label_files import SUFFIXES, LabelFile
from miaformer.data.named import NAME_PREFIXES, STREAM_PREFIXES, NamedData
from miaformer.data.parquet import ParquetFolder, holds_pictures, parquet_files
from miaformer.data.source import ImageData, Split, check_split
from miaformer.data.splits import Source, choose_split

ACCEPTED = (
    "'digits' (built in), a folder of class folders (ROOT/cat/1.png, or ROOT/train/cat/1.png and "
    "ROOT/val/cat/2.png), a CSV or TSV file of paths and labels, a folder of parquet files as `datasets` writes "
    "them, or a name that timm.data.create_dataset takes: 'torch/cifar10:ROOT', 'hfds/OWNER/NAME'"
)


def open_data(spec: str | Path, split: Split, labelled: bool = True) -> ImageData:
    """Open one split of a data set.

    Args:
        spec: "digits"; a folder of class folders; a CSV or TSV file of paths and labels; a folder of parquet files
            (or one such file); or a name that `timm.data.create_dataset` takes, with its root after a colon:
            "torch/cifar10:/data". After a table (CSV, TSV, parquet, hub) `?image=COLUMN&label=COLUMN` names columns.
        split: "train", "calibration" or "test". How these are made where the data has other splits, or none, is
            said at `splits.choose_split`: they are always disjoint and always the same.
        labelled: False takes any folder of pictures, and parquet files without a label column; labels then mean
            nothing. What has labels is divided in the same way.

    Raises:
        ValueError: nothing is there, its layout is none of these, or it has no such split.
        ImportError: the data needs an extra that is not installed.
    """
    check_split(split)
    bare, columns = split_columns(str(spec))
    if bare == "digits":
        if columns:
            raise ValueError("digits: it is no table, and has no columns to name")
        return Digits(split)
    return choose_split(_source(bare, columns, labelled), split)


def _source(spec: str, columns: Columns, labelled: bool) -> Source:
    if spec.startswith(STREAM_PREFIXES):
        raise ValueError(
            f"{spec}: a stream, which cannot be shuffled and resumed exactly; use 'hfds/...', or save it as class "
            "folders"
        )
    if spec.startswith(NAME_PREFIXES):
        return NamedData(spec, columns)
    root = Path(spec)
    if not root.exists():
        raise ValueError(f"unknown data {spec!r}: no such folder or file; data is {ACCEPTED}")
    if parquet_files(root) and not _are_about_pictures(root):
        return ParquetFolder(root, columns, labelled)
    if root.suffix.lower() in SUFFIXES and root.is_file():
        return LabelFile(root, columns)
    if columns:
        raise ValueError(f"{root}: columns are named of a CSV, TSV or parquet file, which this is not")
    if root.is_dir():
        return ClassFolders(root, labelled)
    raise ValueError(f"{root}: a file of this kind is not a data set; data is {ACCEPTED}")


def _are_about_pictures(root: Path) -> bool:
    """Whether the parquet files of a folder at most list pictures, and class folders beside them hold them."""
    if not root.is_dir() or any(holds_pictures(file, root) for file in parquet_files(root)):
        return False
    folders = ClassFolders(root)
    try:
        return all(len(folders.read(part).classes) > 1 for part in folders.parts)
    except ValueError:
        return False
