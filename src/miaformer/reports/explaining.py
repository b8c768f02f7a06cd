"""What a model executes for some pictures, as files: a page and a PNG for each, and an index of all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from miaformer.data.images import ImageError, open_image
from miaformer.evaluation.calibration import OnProgress
from miaformer.evaluation.environment import describe_environment
from miaformer.prediction.entries import reason
from miaformer.prediction.explanation import explain, seen_picture
from miaformer.prediction.predictor import Predictor
from miaformer.prediction.rows import writable
from miaformer.reports.explanation_page import About, Explained, index_page, picture_page, thumbnail
from miaformer.reports.explanation_plot import plot_explanation
from miaformer.reports.page import Markup, write_page

LONGEST_NAME = 60  # characters of a page's name: a file's name holds 255 bytes


@dataclass(frozen=True)
class Explanations:
    """What was written. pictures: least MACs at the first budget first; failed: why, by path."""

    pictures: list[Explained]
    failed: dict[str, str]
    about: About

    def to_json(self) -> dict[str, Any]:
        """As `miaformer explain --json` writes it."""
        pictures = [
            {
                "path": one.name,
                "page": f"{one.page}.html",
                "png": f"{one.page}.png",
                "explanations": [shown.to_json() for shown in one.shown],
            }
            for one in self.pictures
        ]
        failed = [{"path": path, "error": reason} for path, reason in self.failed.items()]
        about = {"model": self.about.model, "dense_macs": self.about.dense_macs}
        return {**about, "pictures": pictures, "failed": failed, "environment": self.about.environment}


def write_explanations(
    predictor: Predictor,
    paths: Sequence[str | Path],
    out: str | Path,
    budgets: Sequence[float | None] = (None,),
    *,
    cap: float | None = None,
    top_k: int = 5,
    batch_size: int = 16,
    name: str = "model",
    missing: Mapping[str, str] | None = None,
    index: bool = True,
    on_progress: OnProgress | None = None,
) -> Explanations:
    """Write a page and a PNG for each picture to the directory `out`, and index.html, where `index` says so.

    budgets: a strip for each; None: the model's own. name: of the model, as pages say it. missing: what else was asked
    for, and why it cannot be had. A picture that cannot be read is listed with it and stops nothing.

    Raises ValueError or TypeError as `MIAFormer.run` does, before anything is written.
    """
    budgets = list(dict.fromkeys(budgets))
    for budget in budgets:
        predictor.try_once(budget=budget, cap=cap)
    out, about = Path(out), _about(name, predictor)
    failed = {writable(path): why for path, why in (missing or {}).items()}
    pages = _Names()
    done: list[tuple[Explained, Markup]] = []  # with a thumbnail
    for start in range(0, len(paths), batch_size):
        opened = list(_opened(predictor, [Path(path) for path in paths[start : start + batch_size]], failed))
        if opened:
            images = [one.image for one in opened]
            by_budget = [explain(predictor, images, budget, cap, top_k) for budget in budgets]
            for one, *shown in zip(opened, *by_budget, strict=True):
                explained = Explained(writable(str(one.path)), pages.of(one.path), one.size, shown)
                png, page = (out / f"{explained.page}.{suffix}" for suffix in ("png", "html"))
                plot_explanation(shown, one.seen, png, writable(one.path.name), about.dense_macs)
                write_page(page, picture_page(explained, one.seen, about, index))
                done.append((explained, thumbnail(one.seen)))
        if on_progress is not None:
            on_progress("explain", min(start + batch_size, len(paths)))
    done.sort(key=lambda pair: pair[0].shown[0].prediction.macs_fraction)
    if index:
        write_page(out / "index.html", index_page(done, failed, about))
    return Explanations([explained for explained, _ in done], failed, about)


@dataclass(frozen=True)
class _Opened:
    """What is kept of a picture, which may be large."""

    path: Path
    size: tuple[int, int]  # width and height
    seen: Image.Image  # of `seen_picture`
    image: Tensor  # (3, H, W)


def _opened(predictor: Predictor, paths: Sequence[Path], failed: dict[str, str]) -> Iterator[_Opened]:
    """Those that can be read; the others become `failed`."""
    for path in paths:
        try:
            picture = open_image(path)
        except ImageError as error:
            failed[writable(str(path))] = reason(error, str(path))
            continue
        yield _Opened(path, picture.size, seen_picture(predictor, picture), predictor.prepare_picture(picture))


class _Names:
    """Gives each picture's files a name of their own, on file systems too that do not tell a from A."""

    def __init__(self) -> None:
        self._taken = {"index"}

    def of(self, path: Path) -> str:
        stem = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.")[:LONGEST_NAME] or "picture"
        name, count = stem, 1
        while name.casefold() in self._taken:
            count += 1
            name = f"{stem}-{count}"
        self._taken.add(name.casefold())
        return name


def _about(name: str, predictor: Predictor) -> About:
    cost = predictor.model.cost()
    device = next(predictor.model.parameters()).device
    return About(name, cost.backbone, cost.trims_last_block, describe_environment(device, 0))
