"""Pictures show what the numbers say, and nothing in them lies on top of something else."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from vits import lively, pictures

from miaformer.model.budget import Calibration
from miaformer.reports import extremes, plots
from miaformer.reports.plots import plot_adaptivity, plot_tradeoff

pytest.importorskip("matplotlib")


@dataclass
class Batch:
    images: Tensor
    labels: Tensor


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, in order."""
    figures: list[Any] = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def report(**accuracies: list[float]) -> dict[str, Any]:
    points = [
        {"policy": name.replace("_", "-"), "macs_fraction": macs, "accuracy": accuracy}
        for name, values in accuracies.items()
        for macs, accuracy in zip((0.35, 0.5, 0.7), values, strict=False)
    ]
    points.append({"policy": "full", "macs_fraction": 0.93, "accuracy": 0.856})
    return {"dense": {"accuracy": 0.855, "macs": 4.6e9}, "points": points, "num_images": 898, "data": "digits"}


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Everything written in a figure, and its place on the canvas."""
    from matplotlib.text import Text

    figure.canvas.draw()
    beyond = {
        id(label)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not low <= tick.get_loc() <= high  # known to the axis, but not drawn
    }
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    return [(t.get_text(), t.get_window_extent()) for t in found]


def assert_readable(figure: Any) -> None:
    for (one, box), (other, other_box) in combinations(texts(figure), 2):
        overlap = (
            min(box.x1, other_box.x1) > max(box.x0, other_box.x0) + 1
            and min(box.y1, other_box.y1) > max(box.y0, other_box.y0) + 1
        )
        assert not overlap, f"{one!r} lies on {other!r}"


CURVES = {
    "usual": {"learned": [0.80, 0.84, 0.853], "static": [0.76, 0.825, 0.851], "random": [0.61, 0.74, 0.80]},
    "alike": {
        "learned": [0.84, 0.85, 0.853],
        "static": [0.84, 0.85, 0.853],
        "random": [0.839, 0.849, 0.85],
        "cls_attention": [0.841, 0.85, 0.852],
    },
    "one point": {"learned": [0.8]},
    "better than dense": {"learned": [0.9, 0.91, 0.92], "random": [0.2, 0.3, 0.4]},
    "everything executed": {},
}


@pytest.mark.parametrize("curves", CURVES.values(), ids=list(CURVES))
def test_the_tradeoff_is_readable_and_shows_every_point(drawn: list[Any], tmp_path: Path, curves: dict) -> None:
    path = tmp_path / "new" / "tradeoff.png"
    plot_tradeoff(report(**curves), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    (figure,) = drawn
    assert_readable(figure)
    axes = figure.axes[0]
    shown = {(round(x, 6), round(y, 4)) for line in axes.lines for x, y in line.get_xydata()}
    for point in report(**curves)["points"]:
        assert (point["macs_fraction"], round(100 * point["accuracy"], 4)) in shown
        assert axes.get_xlim()[0] < point["macs_fraction"] < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < 100 * point["accuracy"] < axes.get_ylim()[1]
    written = [text for text, _ in texts(figure)]
    for name in curves:
        assert name.replace("_", "-") in written
    assert "dense: 85.5 % at 4.6 G MACs" in written


def test_a_report_without_points_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no points"):
        plot_tradeoff({"dense": {"accuracy": 1.0, "macs": 1}, "points": []}, tmp_path / "x.png")


@pytest.fixture
def batches() -> list[Batch]:
    images = pictures(lively().backbone, 40).float()
    labels = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    return [Batch(*pair) for pair in zip(images.split(12), labels.split(12), strict=True)]


def test_the_images_with_least_and_most_compute_are_shown(
    drawn: list[Any], tmp_path: Path, batches: list[Batch]
) -> None:
    model = lively()
    model.calibration = Calibration((1.0, 2.0), (0.5, 0.3), 1)
    names = ["one", "two", "a very long name of a class, and more", "four", "five"]
    plot_adaptivity(model, batches, tmp_path / "images.png", budget=0.5, classes=names, count=4)
    (figure,) = drawn
    assert_readable(figure)
    with torch.inference_mode():
        fractions = torch.cat([model.run(b.images.double(), budget=0.5).trace.macs_fraction for b in batches])
    ordered = sorted(fractions.tolist())
    shown = sorted(text for text, _ in texts(figure) if text.endswith("of the MACs"))
    assert shown == sorted(f"{fraction:.3f} of the MACs" for fraction in ordered[:4] + ordered[-4:])
    assert "least compute" in [text for text, _ in texts(figure)]


def test_skipped_tokens_fade_and_kept_ones_do_not(batches: list[Batch]) -> None:
    model = lively()
    picture = torch.rand(20, 20, 3, generator=torch.Generator().manual_seed(0)).numpy()
    cost = model.cost()
    tokens = torch.zeros(cost.depth, cost.num_patches, dtype=torch.bool)
    decides = [index for index, controller in enumerate(model.controllers) if controller.rank]
    tokens[:, 0] = True  # the first patch always, the second never, the third in half of the deciding blocks
    tokens[decides[: len(decides) // 2], 2] = True
    depth, heads = torch.ones(cost.depth).bool(), torch.ones(cost.depth, cost.num_heads).bool()
    shown = extremes.Extreme(torch.zeros(3, 20, 20), 0.5, depth, heads, tokens, 0, 0)
    faded = plots._faded(picture, shown, model)
    assert faded.shape == picture.shape
    assert (faded[:4, :4] == picture[:4, :4]).all()
    assert (faded[:4, 4:8] >= 0.9).all()
    share = (len(decides) // 2) / len(decides)
    expected = picture[:4, 8:12] * share + (1 - share) * (0.9 + 0.1 * picture[:4, 8:12])
    assert abs(faded[:4, 8:12] - expected).max() < 1e-6


def test_pictures_look_as_they_did_before_they_were_normalised() -> None:
    picture = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalised = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    shown = torch.from_numpy(extremes.as_picture(normalised, {"mean": mean, "std": std}))
    assert (shown.permute(2, 0, 1) - picture).abs().max() < 1e-6


def test_too_few_images_are_an_error(tmp_path: Path, batches: list[Batch]) -> None:
    one = [Batch(batches[0].images[:1], batches[0].labels[:1])]
    with pytest.raises(ValueError, match="at least two images"):
        plot_adaptivity(lively(), one, tmp_path / "x.png")
