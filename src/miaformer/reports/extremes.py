"""The images of a data set that take least and most, as a section of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from miaformer.evaluation.calibration import LabelledBatch
from miaformer.evaluation.extremes import Extreme, as_picture, extremes, kept_share
from miaformer.model.model import MIAFormer
from miaformer.reports.page import Markup, data_uri, is_small, tag

COUNT = 6  # of the cheapest and of the most expensive


def extremes_section(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    about: str,
    budget: float | None,
    classes: Sequence[str],
) -> Iterable[Markup]:
    """about: what the images are; classes: names of labels. Raises ValueError where there are fewer than two images."""
    least, most = extremes(model, batches, budget, COUNT)
    at = "everything executed" if budget is None else f"budget {budget:g}"
    config = model.data_config()
    yield tag("h2", "The cheapest and the most expensive images")
    yield tag(
        "p",
        f"Of {about}, at {at}. Patches fade by how often they are skipped.",
        class_="quiet",
    )
    for title, found in (("Least compute", least), ("Most compute", most)):
        yield tag("h3", title, class_="group")
        yield tag("ul", *(_card(one, model, config, classes) for one in found), class_="cards small")


def middle_budget(model: MIAFormer) -> float | None:
    """Of those it can meet, the nearest to a half; None for a model that knows none."""
    if model.calibration is None:
        return None
    least, most = model.calibration.range
    return round(min(max(0.5, least), most), 2) if most - least > 0.02 else most


def _card(one: Extreme, model: MIAFormer, config: Mapping[str, Any], classes: Sequence[str]) -> Markup:
    said, label = classes[one.predicted], classes[one.label] if one.label >= 0 else None
    verdict = None if label is None else "right" if one.predicted == one.label else f"wrong: {label.partition(',')[0]}"
    blocks = f"{int(one.depth.sum())} of {len(one.depth)} blocks"
    return tag(
        "li",
        _fading(one, model, config),
        tag("strong", said.partition(",")[0]),
        tag("small", verdict, class_="warning" if verdict and verdict != "right" else None) if verdict else None,
        tag("small", f"{one.macs_fraction:.3f} of the MACs"),
        tag("small", blocks),
    )


def _fading(one: Extreme, model: MIAFormer, config: Mapping[str, Any]) -> Markup:
    """The image, and beside it the same faded."""
    image = Image.fromarray(np.rint(255 * as_picture(one.image, config)).astype(np.uint8))
    width, height = image.size
    rows, columns = model.backbone.patch_embed.dynamic_feat_size((height, width))
    kept = kept_share(one, model)
    covers = [
        tag("rect", x=place % columns, y=place // columns, width=1, height=1, fill_opacity=f"{0.9 * (1 - share):.2f}")
        for place, share in enumerate(kept.tolist())
        if share < 1
    ]
    pixels = "image-rendering:pixelated" if is_small(image) else None
    shown = tag("image", href=data_uri(image), width=width, height=height, style=pixels)
    scale = f"scale({width / columns:g} {height / rows:g})"
    return tag(
        "div",
        tag("svg", shown, viewBox=f"0 0 {width} {height}", role="img", aria_label="the image"),
        tag(
            "svg",
            shown,
            tag("g", *covers, class_="covers", transform=scale, shape_rendering="crispEdges"),
            viewBox=f"0 0 {width} {height}",
            role="img",
            aria_label=f"the same, faded: {kept.mean():.0%} of its patches kept",
        ),
        class_="pair",
    )
