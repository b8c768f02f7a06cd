"""What a picture was given, block by block, and the picture as the model saw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from miaformer.model.requests import Budget, per_image
from miaformer.prediction.predictor import Prediction, Predictor

LONGEST = 512  # pixels of a picture that is shown


@dataclass(frozen=True)
class Explanation:
    """What one picture was given, block by block: L blocks of H heads, N patch tokens."""

    prediction: Prediction
    budget: float | None  # as asked: None is the model's own default, or everything where it has none
    cap: float | None
    grid: tuple[int, int]  # rows and columns of patch tokens, N of them: fewer where the picture was looked at smaller
    depth: list[bool]  # (L,)
    heads: list[list[bool]]  # (L, H); all False in a skipped block
    tokens: list[list[bool]]  # (L, N) row-major over grid; all False in a skipped block
    looks: int = 1  # 2: the first answer was not confident; decisions are those of the second look

    @property
    def asked(self) -> str:
        """What it was asked to spend, in words."""
        budget = "no budget" if self.budget is None else f"budget {self.budget:g}"
        return budget if self.cap is None else f"{budget}, cap {self.cap:g}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "prediction": self.prediction.to_json()}


def explain(
    predictor: Predictor,
    images: Sequence[Tensor] | Tensor,
    budget: Budget | None = None,
    cap: Budget | None = None,
    top_k: int = 5,
) -> list[Explanation]:
    """What the model executes for prepared pictures (B, 3, H, W), and what it says of them.

    budget, cap: one for all pictures, or one each. Raises ValueError or TypeError as `MIAFormer.run` does.
    """
    batch = images if isinstance(images, Tensor) else torch.stack(list(images))
    output = predictor.run(batch, budget=budget, cap=cap)
    trace = output.trace
    each = zip(
        predictor.read(output, top_k),
        _each("budget", budget, len(batch)),
        _each("cap", cap, len(batch)),
        trace.depth.tolist(),
        trace.heads.tolist(),
        trace.tokens.tolist(),
        trace.looks.tolist(),
        trace.grid.tolist(),
        strict=True,
    )
    return [
        Explanation(
            prediction, asked, most, (rows, columns), depth, heads, [kept[: rows * columns] for kept in tokens], looks
        )
        for prediction, asked, most, depth, heads, tokens, looks, (rows, columns) in each
    ]


def seen_picture(predictor: Predictor, picture: Image.Image) -> Image.Image:
    """The part of a picture that the model's patch tokens cover, each patch whole pixels.

    As fine as the picture itself, its longest side up to about `LONGEST` pixels, but never coarser than the model's own
    input. What the model pads is grey here.
    """
    left, top, right, bottom = _seen_box(predictor, picture)
    height, width = predictor.model.image_size()
    x, y = (right - left) / width, (bottom - top) / height  # pixels of the picture in one of the model's
    embed = predictor.model.backbone.patch_embed
    rows, columns = embed.dynamic_feat_size((height, width))
    covered = columns * embed.patch_size[1], rows * embed.patch_size[0]
    steps = math.gcd(*embed.patch_size)  # a scale of k / steps leaves a patch whole pixels
    scale = max(1.0, math.floor(min(x, y, LONGEST / max(covered)) * steps) / steps)
    seen = Image.new("RGB", (round(covered[0] * scale), round(covered[1] * scale)), "grey")
    inside = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + covered[0] * x, right, picture.width),
        min(top + covered[1] * y, bottom, picture.height),
    )
    corner = round((inside[0] - left) / x * scale), round((inside[1] - top) / y * scale)
    size = (inside[2] - inside[0]) / x * scale, (inside[3] - inside[1]) / y * scale
    part = picture.resize((max(round(size[0]), 1), max(round(size[1]), 1)), Image.Resampling.BICUBIC, box=inside)
    seen.paste(part, corner)
    return seen


def _seen_box(predictor: Predictor, picture: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the model's input, in pixels of the picture: beyond it where it is padded.

    Followed through the very steps that prepare it: they round, which at 32 pixels is up to a quarter of a patch.
    """
    from timm.data.transforms import MaybeToTensor, ResizeKeepRatio
    from torchvision.transforms import Resize  # type: ignore[import-untyped]

    steps = predictor.transform.steps
    left, top, x, y = 0.0, 0.0, 1.0, 1.0
    before = picture
    for step in takewhile(lambda step: not isinstance(step, MaybeToTensor), steps):
        after = step(before)
        if isinstance(step, Resize | ResizeKeepRatio):
            x, y = x * before.width / after.width, y * before.height / after.height
        else:
            left, top = left + x * _cut(before.width, after.width), top + y * _cut(before.height, after.height)
        before = after
    return left, top, left + x * before.width, top + y * before.height


def _cut(before: int, after: int) -> int:
    """Pixels cut off at the near side, negative where added, of what is cropped or padded at its centre."""
    return round((before - after) / 2) if before >= after else -((after - before) // 2)


def _each(name: str, value: Budget | None, batch: int) -> list[float | None]:
    """One for each image of what is one for all, or one each."""
    if value is None:
        return [None] * batch
    return cast(list[float | None], per_image(name, value, batch).expand(batch).tolist())
