"""What is attacked: images in pixels from 0 to 1 in, logits and MACs out, as deployed and as differentiated.

Attacks live in pixels, so that a radius of 4/255 means the same for every model; normalising is part of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from miaformer.engine.masked import Masked
from miaformer.engine.walk import Policy
from miaformer.lab.attacks.through import Through
from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy, Fixed, Learned, Random, RandomSizes

THROUGH_TEMPERATURE = 0.5  # of the sigmoids that gradients pass: 2 and 6 raise MACs less (docs/log.md)


class Answer(NamedTuple):
    """What a target says of B images."""

    logits: Tensor  # (B, classes)
    macs_fraction: Tensor  # (B,)


Classifier = Callable[[Tensor], Answer]  # pixels (B, 3, H, W), from 0 to 1


@dataclass(frozen=True)
class Target:
    """A classifier under attack.

    deployed: what is used, and judged; needs no gradient. views: the same output with gradients, by what they see:
    `fixed` takes the decisions as given, `through` differentiates through them; asked without gradients they are
    `deployed`, which skips. is_random: whether two calls differ.
    """

    name: str
    deployed: Classifier
    views: Mapping[str, Classifier]
    is_random: bool = False

    @property
    def sharpest(self) -> str:
        """The view that sees most."""
        return "through" if "through" in self.views else "fixed"


def steadied(target: Target, draws: int) -> Target:
    """One that answers by the mean over so many draws: what attacks climb where a target draws its decisions
    (expectation over transformation, Athalye et al. 2018).
    """

    def mean(classify: Classifier, images: Tensor) -> Answer:
        logits, macs = zip(*(classify(images) for _ in range(draws)), strict=True)
        return Answer(torch.stack(logits).mean(dim=0), torch.stack(macs).mean(dim=0))

    return _answering(target, mean)


def watched(target: Target, on_answers: Callable[[int], None]) -> Target:
    """The same, which tells of how many images it was asked whenever it is: attacks take long, and say nothing."""

    def telling(classify: Classifier, images: Tensor) -> Answer:
        found = classify(images)
        on_answers(len(images))
        return found

    return _answering(target, telling)


def _answering(target: Target, answer: Callable[[Classifier, Tensor], Answer]) -> Target:
    views = {name: partial(answer, view) for name, view in target.views.items()}
    return replace(target, deployed=partial(answer, target.deployed), views=views)


@dataclass(frozen=True)
class Pixels:
    """Between pixels, from 0 to 1, and what a model reads."""

    mean: Tensor  # (3, 1, 1), float32 or finer: in half precision steps of an attack would round away
    std: Tensor
    dtype: torch.dtype  # of what the model reads

    @staticmethod
    def of(model: MIAFormer) -> Pixels:
        config, parameter = model.data_config(), next(model.parameters())
        fine = torch.promote_types(parameter.dtype, torch.float32)
        mean, std = (
            torch.tensor(config[name], dtype=fine, device=parameter.device).view(-1, 1, 1) for name in ("mean", "std")
        )
        return Pixels(mean, std, parameter.dtype)

    def normalised(self, pixels: Tensor) -> Tensor:
        return ((pixels - self.mean) / self.std).to(self.dtype)

    def restored(self, images: Tensor) -> Tensor:
        """Pixels of normalised images, exactly within 0 and 1."""
        return (images * self.std + self.mean).clamp(0, 1)


def static_target(model: MIAFormer) -> Target:
    """The static backbone of a model."""
    pixels = Pixels.of(model)

    def classify(images: Tensor) -> Answer:
        logits = model.backbone(pixels.normalised(images))
        return Answer(logits, torch.ones(len(images), device=images.device))

    return Target("backbone", classify, {"fixed": classify})


AnyDrawn = TypeVar("AnyDrawn", bound=AnyPolicy)


def drawn_anew(policy: AnyDrawn) -> AnyDrawn:
    """The policy; one at random draws by PyTorch's global generator, so that calls differ and can be repeated."""
    if isinstance(policy, Random | RandomSizes):
        return replace(policy, seed=int(torch.randint(2**31, ())))
    return policy


def adaptive_target(
    model: MIAFormer,
    policy: Policy,
    name: str = "adaptive",
    cap: float | None = None,
    temperature: float = THROUGH_TEMPERATURE,
) -> Target:
    """A model under a policy. The learned one has the view `through` too, also where it draws, or has a cap."""
    pixels = Pixels.of(model)
    cost = model.cost()

    def deployed(images: Tensor) -> Answer:
        output = model.run(pixels.normalised(images), policy=drawn_anew(policy), cap=cap)
        return Answer(output.logits, output.trace.macs_fraction)

    def view(make: Callable[[Fixed], Policy]) -> Classifier:
        def classify(images: Tensor) -> Answer:
            if not torch.is_grad_enabled():  # thousands of times an image where an attack only queries
                return deployed(images)
            normalised = pixels.normalised(images)
            with torch.no_grad():
                trace = model.run(normalised.detach(), policy=drawn_anew(policy), cap=cap).trace
            x, steps = model.walk(model.embed(normalised), make(Fixed(trace)), Masked(cost), cost)
            logits = model.backbone.forward_head(model.backbone.norm(x))
            return Answer(logits, steps.macs / cost.backbone)

        return classify

    views = {"fixed": view(lambda given: given)}
    if isinstance(policy, Learned):
        leaves = model.adapt_config.rules.leaves

        def through(given: Fixed) -> Policy:
            return Through(given.decisions, policy.controllers, policy.log_price, temperature, leaves)

        views["through"] = view(through)
    is_random = isinstance(policy, Random) or getattr(policy, "sampling", None) is not None
    return Target(name, deployed, views, is_random)
