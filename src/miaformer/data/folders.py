"""Class folders: ROOT/cat/1.png, or ROOT/train/cat/1.png, ROOT/val/cat/2.png, and so on."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from miaformer.data.images import ImageError, find_images
from miaformer.data.label_files import label_files
from miaformer.data.source import PictureFiles
from miaformer.data.splits import UNSPLIT, canonical_part


class ClassFolders:
    """A folder of class folders, or of split folders that hold class folders.

    Classes are the names of the class folders that hold pictures, sorted as
    `torchvision.datasets.ImageFolder` does; with split folders, those of train where it exists. Where `root` holds one
    folder alone, and that holds folders again, it is that one: what an archive often unpacks to.

    labelled: False takes all pictures, wherever they lie below `root` or below its split folders.
    """

    def __init__(self, root: Path, labelled: bool = True) -> None:
        root = _unpacked(root)
        self.name, self._labelled = str(root), labelled
        self._folders: dict[str, Path] = {}
        for folder in _subfolders(root):
            part = canonical_part(folder.name)
            if part is None or (labelled and not _subfolders(folder)):  # a class may be called "train"
                continue
            if part in self._folders:
                raise ValueError(
                    f"{root}: both {self._folders[part].name!r} and {folder.name!r} could be its {part} part"
                )
            self._folders[part] = folder
        if not self._folders:
            self._folders[UNSPLIT] = root

    @property
    def parts(self) -> set[str]:
        return set(self._folders)

    def read(self, part: str) -> PictureFiles:
        if not self._labelled:
            return _by_folder(self._folders[part])
        named = self._folders.get("train", self._folders[part])
        classes = [folder.name for folder in _subfolders(named) if _pictures(folder)]
        if not classes:
            lists = label_files(named)
            raise ValueError(
                f"{named}: no class folders with pictures in them; expected {named / 'CLASS' / 'picture.png'}"
                + (f". If {lists[0].name} lists the pictures, give that file: {lists[0]}" if lists else "")
            )
        return _labelled(self._folders[part], classes)


def _labelled(root: Path, classes: list[str]) -> PictureFiles:
    """The pictures below the class folders of `root`, in sorted order; label k is `classes[k]`."""
    found: list[Path] = []
    labels: list[int] = []
    of_class: dict[str, str] = {}  # where pictures lie, links resolved
    for folder in _subfolders(root):
        paths = _pictures(folder)
        if not paths:
            continue
        if folder.name not in classes:
            raise ValueError(f"{folder}: class {folder.name!r} is not among the {len(classes)} classes to train on")
        for place in {path.parent for path in paths}:
            other = of_class.setdefault(os.path.realpath(place), folder.name)
            if other != folder.name:
                raise ValueError(f"{place}: a link to pictures of class {other!r}, in class {folder.name!r}")
        found += paths
        labels += [classes.index(folder.name)] * len(paths)
    return PictureFiles(str(root), found, labels, classes)


def _by_folder(root: Path) -> PictureFiles:
    """All pictures below `root`. Its subfolders are their classes, so that they are divided as class folders are."""
    paths = find_images(root)
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    classes = sorted(set(folders))
    return PictureFiles(str(root), paths, [classes.index(folder) for folder in folders], classes)


def _unpacked(root: Path) -> Path:
    while len(inside := _subfolders(root)) == 1 and canonical_part(inside[0].name) is None:
        if not _subfolders(inside[0]) or _holds_pictures(root, inside[0]):
            break
        (root,) = inside
    return root


def _holds_pictures(*folders: Path) -> bool:
    """Whether any lie in them, not in folders below."""
    known = Image.registered_extensions()
    return any(path.suffix.lower() in known for folder in folders for path in folder.iterdir() if path.is_file())


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    try:
        return find_images(folder)
    except ImageError:
        return []
