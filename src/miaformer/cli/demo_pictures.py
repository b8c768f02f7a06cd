"""`miaformer demo --pictures`: what the bundled model says of your pictures, and what it spends on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from miaformer.model.output import Output

BUNDLED_MODEL = "cifar10-small"
BUDGETS = (0.35, 0.5, 0.7)
MOST_PICTURES = 64


def show_pictures(sources: Sequence[str], out: Path, device: torch.device, engine: str) -> int:
    """Print what it says at each budget, and draw in `out` who gets least and most. Returns the exit status.

    sources: pictures, and folders of pictures; the first `MOST_PICTURES` are shown, broken ones are listed.
    Raises ImageError where there is none that can be read.
    """
    import torch

    from miaformer import Predictor, load
    from miaformer.cli.output import console, say
    from miaformer.data import Batch, build_transform
    from miaformer.data.images import ImageError, open_image
    from miaformer.prediction.sources import find_pictures
    from miaformer.reports.plots import plot_adaptivity

    paths, failed = find_pictures(sources)
    model = load(BUNDLED_MODEL).to(device)
    transform = build_transform(model.data_config())
    pictures: dict[Path, Tensor] = {}
    for path in paths[:MOST_PICTURES]:
        try:
            pictures[path] = transform(open_image(path))
        except ImageError as error:
            failed[str(path)] = str(error).removeprefix(f"{path}: ")
    if not pictures:
        raise ImageError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    images = torch.stack(list(pictures.values())).to(device)
    predictor = Predictor(model, engine=engine)
    outputs = {budget: predictor.run(images, budget=budget) for budget in BUDGETS}
    outputs[1.0] = predictor.run(images)
    names = model.label_names or [str(label) for label in range(model.num_classes)]
    console().print(_table([path.name for path in pictures], outputs, names))
    for name, reason in failed.items():
        say(f"{name}: {reason}")
    if len(paths) > MOST_PICTURES:
        more = f"{len(paths) - MOST_PICTURES:,} more pictures"
        say(f"{more}: `miaformer predict {BUNDLED_MODEL} PATH ... --out FILE` takes them all")
    if len(pictures) > 1:
        out.mkdir(parents=True, exist_ok=True)
        unknown = torch.full((len(images),), -1)
        batch = Batch(images, unknown, unknown)
        picture = out / "pictures.png"
        plot_adaptivity(model, [batch], picture, BUDGETS[1], classes=names)
        say(f"{picture}: the images that take the least and the most compute")
    return 1 if failed else 0


def _table(pictures: Sequence[str], outputs: dict[float, Output], names: Sequence[str]) -> Any:
    from rich.table import Table

    caption = f"most likely class out of {', '.join(names)}; in brackets: MACs as a fraction of the dense model's"
    table = Table(caption=caption)
    table.add_column("picture", overflow="ellipsis", no_wrap=True)
    for budget in outputs:
        table.add_column("everything" if budget == 1 else f"budget {budget:g}")
    for place, picture in enumerate(pictures):
        cells = [
            f"{names[int(output.logits[place].argmax())]} ({output.trace.macs_fraction[place]:.2f})"
            for output in outputs.values()
        ]
        table.add_row(picture, *cells)
    return table
