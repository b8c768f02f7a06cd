"""A model that chooses resolutions under attack: which of its answers is given, and gradients through that choice.

What is given is one of several answers: before a block of the first look, at its end, or of the second look. `fixed`
differentiates the one that is given. `through` differentiates the mean of all, each weighed by how likely it is given
where thresholds are sigmoids of the confidence's log-odds: the loss then falls also for images that may be made to
look confident, or not. Values are the deployed model's own (straight-through, as in `through`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from miaformer.lab.attacks.target import THROUGH_TEMPERATURE, Answer, Classifier, Pixels, Target, drawn_anew
from miaformer.model.early_exit import EarlyExit, left_at, macs_of_leaving
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Look, RandomSizes, TwoLooks
from miaformer.model.resolution import Size, resized

Weighed = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of K answers in turn: logits (B, K, classes), MACs (K,), which is given (B,), and how likely each is (B, K)."""


def looks_target(
    model: MIAFormer,
    policy: Look | TwoLooks,
    name: str = "adaptive",
    cap: float | None = None,
    temperature: float = THROUGH_TEMPERATURE,
) -> Target:
    """policy: one look in one size, or drawn sizes; or two looks. Under a cap, views see the model without it."""
    pixels, whole = Pixels.of(model), model.cost().backbone

    def deployed(images: Tensor) -> Answer:
        output = model.run(pixels.normalised(images), policy=drawn_anew(policy), cap=cap)
        return Answer(output.logits, output.trace.macs_fraction)

    def view(through: bool) -> Classifier:
        def classify(images: Tensor) -> Answer:
            if not torch.is_grad_enabled():
                return deployed(images)
            normalised = pixels.normalised(images)
            if isinstance(policy, RandomSizes):
                return _in_drawn_sizes(model, normalised, drawn_anew(policy))
            logits, macs, given, likely = weighed(model, normalised, policy, temperature)
            own = logits[torch.arange(len(images)), given].log_softmax(dim=1)
            spent = macs[given] / whole
            if not through:
                return Answer(own, spent)
            mixed = (likely.log()[:, :, None] + logits.log_softmax(dim=2)).logsumexp(dim=1)
            mean = likely @ macs.to(likely) / whole
            return Answer(_valued(own, mixed), _valued(spent.to(mean), mean))

        return classify

    views = {"fixed": view(False)}
    if isinstance(policy, TwoLooks) or isinstance(policy.policy, EarlyExit):
        views["through"] = view(True)
    return Target(name, deployed, views, isinstance(policy, RandomSizes))


def weighed(model: MIAFormer, images: Tensor, policy: Look | TwoLooks, temperature: float) -> Weighed:
    """What may be answered to normalised images (B, 3, H, W), with gradients."""
    first = policy.first if isinstance(policy, TwoLooks) else policy
    logits, macs = _answers(model, images, first)
    confidence = logits.detach().softmax(dim=2).amax(dim=2)
    threshold = first.policy.threshold if isinstance(first.policy, EarlyExit) else 1.0
    given, odds = left_at(confidence, threshold), _odds(logits)
    leaves = torch.sigmoid((odds[:, :-1] - _log_odds(threshold, odds)) / temperature)
    stays = (1 - leaves).clamp(min=1e-6).cumprod(dim=1)
    ones = torch.ones_like(odds[:, :1])
    likely = torch.cat([leaves, ones], dim=1) * torch.cat([ones, stays], dim=1)
    if isinstance(policy, TwoLooks):
        second, more = _answers(model, images, policy.second)
        again = torch.sigmoid((_log_odds(policy.confidence, odds) - odds) / temperature)
        # One answer more for each of the first look: it, and then the second look's.
        looked = confidence[torch.arange(len(images)), given] < policy.confidence.to(confidence)
        given = given + looked * macs.numel()
        logits = torch.cat([logits, second[:, -1:].expand_as(logits)], dim=1)
        macs = torch.cat([macs, macs + more[-1]])
        likely = torch.cat([likely * (1 - again), likely * again], dim=1)
    return logits, macs, given, likely.clamp(min=1e-12)


def _answers(model: MIAFormer, images: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Logits (B, K, classes) before each block that a look may end at, and at the end; and the MACs of each, (K,)."""
    size = look.sizes[0] if look.sizes else _size(images)
    blocks = look.policy.blocks if isinstance(look.policy, EarlyExit) and look.may_leave(1).any() else ()
    (x, each), found = model.embed(resized(images, size)), []
    for index, block in enumerate(each):
        if index in blocks:
            found.append(model.answer(model.backbone.norm(x)))
        x = block(x)
    found.append(model.answer(model.backbone.norm(x)))
    macs = torch.tensor(macs_of_leaving(model.cost(size), blocks), dtype=torch.float64, device=x.device)
    return torch.stack(found, dim=1), macs


def _in_drawn_sizes(model: MIAFormer, images: Tensor, look: RandomSizes) -> Answer:
    each = {size: _answers(model, images, Look(look.policy, (size,))) for size in dict.fromkeys(look.sizes)}
    sizes = look.sizes_of(len(images))
    logits = torch.stack([each[size][0][place, -1] for place, size in enumerate(sizes)])
    macs = torch.stack([each[size][1][-1] for size in sizes])
    return Answer(logits, macs / model.cost().backbone)


def _size(images: Tensor) -> Size:
    return int(images.shape[-2]), int(images.shape[-1])


def _odds(logits: Tensor) -> Tensor:
    """Log-odds of the likeliest class, (B, K) of logits (B, K, classes)."""
    first = logits.amax(dim=2)
    others = logits.scatter(2, logits.argmax(dim=2, keepdim=True), float("-inf")).logsumexp(dim=2)
    return first - others


def _log_odds(threshold: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(threshold).to(like).clamp(1e-6, 1 - 1e-6).logit()


def _valued(value: Tensor, gradient: Tensor) -> Tensor:
    """The one, with the other's gradient."""
    return gradient + (value - gradient).detach()
