"""Decisions drawn at random, so that an untrained model decides differently from image to image.

For measuring speed: what a decision costs and saves does not depend on how good it is, but it does depend on how much
images, heads and tokens differ. Controllers' weights are scaled and centred block by block on real pictures: before
they are bounded, depth and head logits get a standard deviation of `SPREAD` over images, token logits over tokens, and
keep rates move with the price. A model that chooses resolutions looks at every image in its smallest size, and in its
own at as many as the budget allows, the least confident first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.controller import KEEP_LOGIT, LOGIT_BOUND, Controller, Controllers, Formula, means, seen
from miaformer.engine.cost import Cost
from miaformer.engine.decisions import HostGates
from miaformer.engine.sparse import Sparse
from miaformer.engine.walk import State
from miaformer.model.adapt import adapt
from miaformer.model.budget import Calibration
from miaformer.model.looks import STEP, Looks
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Full, Learned, Look

Grains = Literal["resolution", "all", "depth", "heads", "tokens"]

SPREAD = 2.0  # standard deviation of logits
SHARED_SPREAD = 1.0  # of the part of token logits that all tokens of an image share: images differ in length
# Means of logits at a log-price of 0. What is lost stays lost in nested heads and progressive tokens, so they start
# higher: at one price the three grains then keep about equal shares.
DEPTH_CENTRE, HEADS_CENTRE, TOKENS_CENTRE = KEEP_LOGIT, KEEP_LOGIT + 1.0, KEEP_LOGIT + 2.5
DRAWN_AT_LOG_PRICE = 1.5  # blocks see inputs as at about half of the compute
_SLOPE = 0.5413  # softplus of it is 1: a logit falls by 1 where the log-price rises by 1
_NO_SLOPE = -40.0  # softplus of it is 4e-18
_SURE = 4 * LOGIT_BOUND  # the bound of this is the bound itself


def drawn_models(
    model: MIAFormer, images: Tensor, timed: Tensor, seed: int = 0, grains: Sequence[Grains] = ("all",)
) -> dict[str, MIAFormer]:
    """One model for each of `grains`, with decisions of its own drawn, all sharing the backbone of `model` but that for
    `resolution`.

    images: that controllers are drawn on. timed: that will be run; on them looks meet their budgets, few as they are.
    """
    models: dict[str, MIAFormer] = {}
    for grain in dict.fromkeys(grains):
        if grain == "resolution":
            models[grain] = adapt(model.to_timm(), grains=("resolution",)).eval()
            draw_looks(models[grain], timed)
            continue
        twin = copy.deepcopy(model, {id(model.backbone): model.backbone})
        draw_controllers(twin, images, seed, grain)
        models[grain] = twin
    return models


@torch.no_grad()
def draw_controllers(model: MIAFormer, images: Tensor, seed: int = 0, grains: Grains = "all") -> None:
    """Draw the model's controllers anew, in place, by what they see of `images` (B, 3, H, W), normalised.

    grains: what is decided; everything else is always kept. The calibration, of other controllers, is dropped.

    Raises ValueError for grains that controllers do not decide, for fewer than two images, and for images that a block
    cannot tell apart.
    """
    controlled = get_args(Grains)[1:]
    if grains not in controlled:
        raise ValueError(f"grains={grains!r} must be one of {', '.join(controlled)}")
    _check_several("draw_controllers", images)
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    policy = _Drawing(model.controllers, torch.Generator().manual_seed(seed), grains)
    cost = model.cost((images.shape[-2], images.shape[-1]))
    model.walk(model.embed(images.to(parameter)), policy, Sparse(cost), cost)
    model.calibration = None
    model.train(training)


@torch.inference_mode()
def draw_looks(model: MIAFormer, images: Tensor) -> None:
    """Give a model that chooses resolutions a table of looks: its smallest size, and its largest for the least
    confident of `images` (B, 3, H, W), normalised.

    Raises ValueError for fewer than two images.
    """
    _check_several("draw_looks", images)
    whole, confidence = model.cost().backbone, _first_confidence(model, images)
    fractions = tuple(macs / whole for macs in model.macs_of_sizes().values())
    budgets = np.arange(fractions[-1] + STEP, fractions[0], STEP)
    shares = torch.from_numpy((budgets - fractions[-1]) / fractions[0]).to(confidence)
    rows = zip(budgets.tolist(), torch.quantile(confidence, shares).tolist(), strict=True)
    looks = tuple(Looks(budget, fractions[-1], fractions[0], edge) for budget, edge in rows)
    model.calibration = Calibration((), fractions, len(images), "", looks)


@torch.no_grad()
def mixed_by_confidence(model: MIAFormer, images: Tensor) -> Tensor:
    """An order (B,) of images in which the first few, however many, are about as confident as all.

    Each next one lies a golden section further among all, from the least confident to the most and round again.
    """
    golden = (5**0.5 - 1) / 2
    places = (torch.arange(1, len(images) + 1, dtype=torch.float64) * golden).remainder(1).argsort().argsort()
    return _first_confidence(model, images).argsort(stable=True).cpu()[places]


def _first_confidence(model: MIAFormer, images: Tensor) -> Tensor:
    """Of the answers (B,) in the smallest size."""
    smallest = Look(Full(), (model.image_sizes()[-1],))
    logits = model.run(images.to(next(model.parameters())), policy=smallest).logits
    return logits.float().softmax(dim=1).amax(dim=1)


def _check_several(name: str, images: Tensor) -> None:
    if len(images) < 2:
        raise ValueError(f"{name}() needs at least two images that differ, got {len(images)}")


@dataclass(frozen=True)
class _Drawing:
    """Draws each controller when its block is reached, then decides as it does."""

    controllers: Controllers
    generator: torch.Generator
    grains: Grains

    def decide(self, state: State) -> HostGates:
        controller = cast(Controller, self.controllers[state.index])
        _draw(controller, state, self.generator, self.grains)
        log_price = state.x.new_full((1,), DRAWN_AT_LOG_PRICE)
        return Learned(self.controllers, log_price).decide(state)

    def context_macs(self, cost: Cost, index: int) -> int:
        return 0

    def token_score_macs(self, cost: Cost, index: int) -> int:
        return 0


def _draw(controller: Controller, state: State, generator: torch.Generator, grains: Grains) -> None:
    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    decides = [grains in ("all", grain) for grain in ("depth", "heads", "tokens")]
    # The price acts on its own path only, and nothing is known of difficulty.
    for layer in (controller.price, controller.difficulty):
        layer.weight.zero_()
    controller.difficulty.bias.zero_()
    controller.slope.copy_(torch.where(torch.tensor(decides), _SLOPE, _NO_SLOPE).to(controller.slope))

    pooled, prefix = means(state.x, _active(state), state.num_prefix_tokens)
    read = seen(pooled, prefix)
    weight = _apart_from_mean(normal(controller.pooled.weight), read)
    shown = read @ weight.T  # (B, hidden)
    scale, offset = 1 / _spread(shown, state.index), -shown.mean(dim=0) / _spread(shown, state.index)
    controller.pooled.weight.copy_(weight * scale[:, None])
    controller.pooled.bias.copy_(offset)

    log_price = state.x.new_full((len(state.x),), DRAWN_AT_LOG_PRICE)
    context = 0.5 * Formula.of([controller], log_price)[0].twice_context(pooled, prefix)
    weight = normal(controller.gates.weight)
    weight[1:] += normal(weight[:1])  # heads agree half of the way: images differ in how many they want
    centres = torch.full_like(controller.gates.bias, HEADS_CENTRE - KEEP_LOGIT)
    centres[0] = DEPTH_CENTRE - KEEP_LOGIT
    weight, bias = _fitted(weight, context, centres, SPREAD)
    for rows, decided in ((slice(0, 1), decides[0]), (slice(1, None), decides[1])):
        controller.gates.weight[rows] = weight[rows] if decided else 0.0
        controller.gates.bias[rows] = bias[rows] if decided else _SURE
    if controller.rank:
        _draw_tokens(controller, state, context, generator, decides[2])


def _draw_tokens(
    controller: Controller, state: State, context: Tensor, generator: torch.Generator, decided: bool
) -> None:
    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    query, key = controller.query, controller.key
    image, token = _active(state).nonzero(as_tuple=True)
    rows = F.layer_norm(state.x[image, state.num_prefix_tokens + token], state.x.shape[-1:])
    key.weight.copy_(_apart_from_mean(normal(key.weight), rows) * key.in_features**-0.5)
    if not decided:
        query.weight.zero_()
        query.bias.zero_()
        query.bias[-1] = _SURE
        return
    weight, bias = normal(query.weight[:-1]) * query.in_features**-0.5, normal(query.bias[:-1])
    product = (key(rows) * (context @ weight.T + bias)[image]).sum(dim=1, keepdim=True)  # (tokens, 1)
    scale = (SPREAD**2 - SHARED_SPREAD**2) ** 0.5 / _spread(product, state.index)
    query.weight[:-1], query.bias[:-1] = weight * scale, bias * scale
    rest = (product * scale).mean(dim=0)
    shared, offset = _fitted(normal(query.weight[-1:]), context, TOKENS_CENTRE - KEEP_LOGIT - rest, SHARED_SPREAD)
    query.weight[-1:], query.bias[-1:] = shared, offset


def _active(state: State) -> Tensor:
    """(B, N) bool where the tokens are: a walk keeps it on the host."""
    return (state.active > 0).to(state.x.device)


def _apart_from_mean(weight: Tensor, rows: Tensor) -> Tensor:
    """Weight (out, C) without the direction of the mean of rows (M, C).

    What all rows have in common would only be taken off again by a bias: in half precision, with the differences.
    """
    mean = F.normalize(rows.mean(dim=0), dim=0)
    return weight - (weight @ mean)[:, None] * mean


def _fitted(weight: Tensor, context: Tensor, centres: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Weight (out, hidden) scaled, and the bias (out,), so that logits of context (B, hidden) are as asked."""
    shown = context @ weight.T
    scale = spread / shown.std(dim=0, correction=0).clamp(min=1e-12)
    return weight * scale[:, None], centres - scale * shown.mean(dim=0)


def _spread(values: Tensor, index: int) -> Tensor:
    """Standard deviations (out,) of values (M, out). Raises ValueError where there are none to speak of."""
    found = values.std(dim=0, correction=0)
    if not bool((found > 1e-6 * values.abs().max()).all()) or not bool(found.isfinite().all()):
        raise ValueError(f"to block {index} all images look alike: draw_controllers() needs pictures that differ")
    return found
