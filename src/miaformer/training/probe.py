"""The first stage of fine-tuning: a linear probe. The classifier is fitted to the features of the backbone as it is.

A new classifier that learns together with pretrained weights distorts them before it knows anything (Kumar et al. 2022,
"Fine-tuning can distort pretrained features"). One pass over the pictures and a convex fit give it a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from miaformer.data import Batch

MAX_FEATURES = 200_000_000  # numbers kept: 100,000 pictures of a ViT-L
PENALTY = 1e-2  # weight decay of standardised features (docs/log.md)
ITERATIONS = 200


def classifiers(backbone: Any) -> list[nn.Linear]:
    """The linear layers that give logits: one, or two of a distilled ViT.

    Raises ValueError for a backbone whose classifier is something else.
    """
    found = backbone.get_classifier()
    layers = list(found) if isinstance(found, tuple) else [found]
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"the classifier is a {type(layer).__name__}: a probe needs a linear one with classes")
    return layers


def most_batches(backbone: Any, batch_size: int) -> int:
    """As many as `MAX_FEATURES` has room for, at least one."""
    return max(MAX_FEATURES // (batch_size * sum(layer.in_features for layer in classifiers(backbone))), 1)


@torch.no_grad()
def fit_on(
    backbone: Any, batches: Iterable[Batch], accelerator: Accelerator, after_batch: Callable[[int], None]
) -> tuple[float, float]:
    """Fit the backbone's classifiers to its features of this process's batches and all others', in place.

    after_batch: told how many are done. Returns loss and accuracy, of two classifiers the second's.
    """
    layers = classifiers(backbone)
    features: list[list[Tensor]] = [[] for _ in layers]
    labels: list[Tensor] = []
    with recorded_inputs(layers) as inputs:
        for done, batch in enumerate(batches, start=1):
            with accelerator.autocast():
                backbone(batch.images.to(accelerator.device))
            labels.append(accelerator.gather(batch.labels.to(accelerator.device)))
            for own, given in zip(features, inputs, strict=True):
                own.append(accelerator.gather(given))
            after_batch(done)
    for layer, own in zip(layers, features, strict=True):
        found = fit(layer, torch.cat(own), torch.cat(labels))
    return found


@contextmanager
def recorded_inputs(layers: list[nn.Linear]) -> Iterator[list[Tensor]]:
    """What enters each of the layers in its last call, (B, features) float32."""
    inputs = [torch.empty(0)] * len(layers)

    def remember(place: int, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[place] = args[0].detach().float()

    handles = [layer.register_forward_pre_hook(partial(remember, place)) for place, layer in enumerate(layers)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def fit(layer: nn.Linear, features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Fit a linear classifier in place by L-BFGS: multinomial logistic regression with an L2 penalty.

    features: (n, features) float32; labels: (n,) int64. Returns the final loss and the accuracy on these pictures.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    standard = (features - mean) / std
    weight = torch.zeros_like(layer.weight, dtype=torch.float32, device=features.device, requires_grad=True)
    bias = torch.zeros(layer.out_features, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        return F.cross_entropy(F.linear(standard, weight, bias), labels) + PENALTY * weight.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        predicted = F.linear(standard, weight, bias).argmax(dim=1)
        layer.weight.copy_(weight / std)
        if layer.bias is not None:
            layer.bias.copy_(bias - (weight * (mean / std)).sum(dim=1))
        return float(loss()), float((predicted == labels).float().mean())
