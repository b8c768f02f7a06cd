"""What a model says of pictures and what it spent on each: shared by the command line, the server and Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from miaformer.data.images import MAX_PIXELS, open_image
from miaformer.model.model import MIAFormer
from miaformer.model.output import Output
from miaformer.model.policy import Full, Policy
from miaformer.model.requests import Budget, allowed, per_image

if TYPE_CHECKING:
    from miaformer.data.transforms import Transform
    from miaformer.export.engines.auto import OnChoice


@dataclass(frozen=True)
class Guess:
    label: int
    name: str | None  # of the class, where the model or the user gave names
    probability: float  # softmax

    @property
    def title(self) -> str:
        """The class in words."""
        return f"class {self.label}" if self.name is None else self.name

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "class": self.name, "probability": self.probability}


@dataclass(frozen=True)
class Spent:
    """On one picture. Shares of heads and tokens are of executed blocks, 0 where there is none."""

    macs_fraction: float  # of the dense model's
    depth_kept: float
    heads_kept: float
    tokens_kept: float


@dataclass(frozen=True)
class Prediction:
    """Of one picture, and what was spent on it, as `Spent` has it."""

    top_k: tuple[Guess, ...]  # likeliest first
    macs_fraction: float
    depth_kept: float
    heads_kept: float
    tokens_kept: float

    def to_json(self) -> dict[str, Any]:
        return {**self.top_k[0].to_json(), **vars(self), "top_k": [guess.to_json() for guess in self.top_k]}


@dataclass(frozen=True)
class Embedding:
    """Features of one picture, (num_features,), and what was spent on it, as `Spent` has it."""

    features: tuple[float, ...]
    macs_fraction: float
    depth_kept: float
    heads_kept: float
    tokens_kept: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def check_classifies(model: MIAFormer) -> None:
    """Raises ValueError for a model without a classifier."""
    if not model.num_classes:
        raise ValueError("the model has no classifier (num_classes=0); miaformer embed gives its features")


class Predictor:
    """A model with what belongs to it: how pictures are prepared, and what its classes are called, if it has any."""

    def __init__(
        self,
        model: MIAFormer,
        names: Sequence[str] | None = None,
        engine: str = "eager",
        on_choice: OnChoice | None = None,
    ) -> None:
        """names: of the classes, in the order of labels; by default the model's own. engine: what runs the model at
        budgets and caps, and where everything is executed: "eager" (PyTorch), "onnx" (ONNX Runtime, on CPU, in
        float32), or "auto", the faster one of the two on the first pictures. on_choice: is told what "auto" timed.

        Raises ValueError where names are not as many as the model's classes, and where the engine is unknown or cannot
        run it.
        """
        from miaformer.data import build_transform
        from miaformer.export.engines import open_engine

        if names is not None and len(names) != model.num_classes:
            raise ValueError(f"{len(names)} names for {model.num_classes} classes")
        known = names or model.label_names
        self.model = model.eval()
        self.names = list(known) if known and len(known) == model.num_classes else None
        self.transform: Transform = build_transform(model.data_config())
        self.engine = open_engine(engine, self.model, on_choice=on_choice)

    def prepare(
        self, source: str | Path | bytes | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS
    ) -> Tensor:
        """A picture as the model takes it, (3, H, W). Raises ImageError as `open_image` does."""
        return self.prepare_picture(open_image(source, name, max_pixels))

    def prepare_picture(self, picture: Image.Image) -> Tensor:
        """The same of a picture that `open_image` gave."""
        return self.transform(picture)

    def pixels(
        self, source: str | Path | bytes | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS
    ) -> Tensor:
        """What `prepare` gives before normalisation, (3, H, W) uint8. `run` takes it as well, and normalises a whole
        batch in the time of one picture.
        """
        return self.transform.pixels(open_image(source, name, max_pixels))

    def run(
        self,
        images: Sequence[Tensor] | Tensor,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
        policy: Policy | None = None,
    ) -> Output:
        """`MIAFormer.run` on the model's device, of pictures that are all prepared or all still pixels.

        budget, price and cap: one, or one each. Prices, and policies other than `Full`, are PyTorch's whatever the
        engine.
        """
        with torch.inference_mode():
            images = self._on_device(images)
            count = len(images)
            spent = allowed(self.model, cap, count) if budget is None else budget
            if spent is None and price is None and cap is None and (policy is None or isinstance(policy, Full)):
                return self.engine.everything(images)
            if spent is None or policy is not None or price is not None:
                return self.model.run(images, policy=policy, budget=budget, price=price, cap=cap)
            budgets = per_image("budget", spent, count).expand(count).tolist()
            caps = None if cap is None else per_image("cap", cap, count).expand(count).tolist()
            return self.engine.run(images, budgets, caps)

    def embed(
        self,
        images: Sequence[Tensor] | Tensor,
        budget: Budget | None = None,
        price: Budget | None = None,
        cap: Budget | None = None,
        policy: Policy | None = None,
    ) -> Output:
        """`MIAFormer.run` with the pooled features, (B, num_features) of `Output.features`. The arguments are those of
        `run`. By the engine where the model has no classifier, else in PyTorch: engines give what comes last.
        """
        if not self.model.num_classes:
            output = self.run(images, budget, price, cap, policy)
            return replace(output, features=output.logits)
        spend: dict[str, Any] = {"budget": budget, "price": price, "cap": cap, "policy": policy}
        with torch.inference_mode():
            return self.model.run(self._on_device(images), **spend, features=True)

    def _on_device(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """One batch (B, 3, H, W), normalised, in the model's dtype."""
        batch = images if isinstance(images, Tensor) else torch.stack(list(images))
        weights = next(self.model.parameters())
        on_device = batch.to(weights.device)
        if batch.dtype == torch.uint8:
            on_device = self.transform.normalize(on_device)
        return on_device.to(weights.dtype)

    def dense(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the backbone, by the same engine. images: (B, 3, H, W), prepared."""
        with torch.inference_mode():
            return self.engine.dense(images.to(next(self.model.parameters())))

    def read(self, output: Output, top_k: int = 5) -> list[Prediction]:
        """What an output says of each picture. Raises ValueError where the model has no classifier."""
        each = zip(self.guesses(output.logits, top_k), self.spent(output), strict=True)
        return [Prediction(guesses, **vars(spent)) for guesses, spent in each]

    def embeddings(self, output: Output) -> list[Embedding]:
        """What an output of `embed` holds of each picture."""
        assert output.features is not None
        each = zip(output.features.float().tolist(), self.spent(output), strict=True)
        return [Embedding(tuple(features), **vars(spent)) for features, spent in each]

    def spent(self, output: Output) -> list[Spent]:
        """What was spent on each picture."""
        trace = output.trace
        blocks = trace.depth.sum(dim=1).clamp(min=1)
        shares = (
            trace.macs_fraction,
            trace.depth.double().mean(dim=1),
            trace.heads.double().mean(dim=2).sum(dim=1) / blocks,
            trace.tokens.double().mean(dim=2).sum(dim=1) / blocks,
        )
        return [Spent(*one) for one in zip(*(share.tolist() for share in shares), strict=True)]

    def guesses(self, logits: Tensor, top_k: int = 5) -> list[tuple[Guess, ...]]:
        """The likeliest classes of logits (B, classes), best first. Raises ValueError for a model without classes."""
        check_classifies(self.model)
        likeliest = logits.float().softmax(dim=1).topk(min(top_k, self.model.num_classes), dim=1)
        labels, probabilities = likeliest.indices.tolist(), likeliest.values.tolist()
        names: Sequence[str | None] = self.names or [None] * self.model.num_classes
        return [
            tuple(Guess(label, names[label], probability) for label, probability in zip(*best, strict=True))
            for best in zip(labels, probabilities, strict=True)
        ]

    def try_once(self, **spend: Any) -> None:
        """Run an empty picture, so that a budget or a cap that cannot be is told before anything else is done.

        Raises ValueError or TypeError as `MIAFormer.run` does.
        """
        weights = next(self.model.parameters())
        with torch.inference_mode():
            self.model.run(weights.new_zeros(1, self.model.backbone.in_chans, *self.model.image_size()), **spend)
