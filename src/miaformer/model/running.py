"""What a call executes: one look at the images, or a second one at those whose first answer is not confident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miaformer.engine.cost import Cost, Counts
from miaformer.engine.decisions import Gates, HostGates
from miaformer.engine.walk import walk
from miaformer.model.early_exit import EarlyExit, asking_macs
from miaformer.model.output import Output, Trace, in_turn, merged
from miaformer.model.policy import Look, Policy, TwoLooks
from miaformer.model.requests import Budget, cap_in_macs, in_one_look
from miaformer.model.resolution import Size, resized, within_cap
from miaformer.vit.backbone import check_images

if TYPE_CHECKING:
    from miaformer.model.model import MIAFormer


@dataclass(frozen=True)
class Way:
    """How decisions are executed, "sparse" or "masked", and whether features are wanted beside logits."""

    execution: str
    features: bool = False


def run_looks(model: MIAFormer, images: Tensor, looks: Look | TwoLooks, cap_macs: Counts | None, way: Way) -> Output:
    """images: (B, 3, H, W). cap_macs: (B,), the most MACs of each image."""
    if isinstance(looks, Look):
        return _look(model, images, looks, cap_macs, way)
    output = _look(model, images, looks.first, cap_macs, way)
    again, left = _open_images(model, images, output, looks, cap_macs)
    if not len(again):
        return output
    return merged(output, again, _look(model, images[again], looks.second.of(again), left, way))


def all_rows(
    model: MIAFormer,
    images: Tensor,
    budget: Budget | None,
    price: Budget | None,
    cap: Budget | None,
    after: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Cost]:
    """Rows (B, P+N, C) after the last block, those too that no classifier reads, and what they cost. after: gets the
    rows after each block, by its number.

    Raises ValueError for a budget, price or cap of a model that chooses resolutions.
    """
    images = check_images(images, model.backbone)
    if model.adapt_config.chooses_resolution and not (budget is price is cap is None):
        raise ValueError(
            "the features of a model that chooses resolutions are of one size: give smaller images, and no budget"
        )
    cost = replace(_cost_of(model, images), trims_last_block=False)
    cap_macs = None if cap is None else cap_in_macs(cap, len(images), cost)
    policy = in_one_look(model, budget, price, cap, len(images))
    sparse = model.sparse(cost)

    def executed(index: int, block: Any, x: Tensor, gates: Gates | HostGates) -> Tensor:
        x = sparse(index, block, x, gates)
        if after is not None:
            after[index] = x.clone()  # the next block may write into it
        return x

    x, blocks = model.embed(images)
    x, _ = walk(blocks, x, policy, executed, cost, model.adapt_config.rules, cap_macs)
    return x, cost


def cap_too_low(model: MIAFormer) -> ValueError:
    least = model.least_macs() / model.cost().backbone
    return ValueError(f"the cap is below {least:.4f}, what an image takes in the smallest size: give a larger one")


def _look(model: MIAFormer, images: Tensor, look: Look, cap_macs: Counts | None, way: Way) -> Output:
    """One look. cap_macs: (B,), the most MACs of each image."""
    whole = _cost_of(model, images)
    if not look.sizes:
        return _executed(model, images, look.policy, cap_macs, way, whole)
    leaving = look.may_leave(len(images))
    if cap_macs is not None and isinstance(look.policy, EarlyExit):  # asked where that can be paid for
        asking = asking_macs(whole, look.policy.blocks)
        leaving = leaving & (cap_macs >= model.least_macs() + asking)
        cap_macs = cap_macs - leaving * asking
    groups = list(zip(_sizes_of(model, look, images, cap_macs), leaving.tolist(), strict=True))
    parts = []
    for size, leaves in dict.fromkeys(groups):
        if size is None:
            raise cap_too_low(model)
        own = torch.tensor([place for place, one in enumerate(groups) if one == (size, leaves)])
        small = resized(images if len(own) == len(images) else images[own], size)
        parts.append((own, _executed(model, small, look.policy_of(own, leaves), None, way, whole)))
    return in_turn(parts)


def _sizes_of(model: MIAFormer, look: Look, images: Tensor, cap_macs: Counts | None) -> Sequence[Size | None]:
    """In which size each image is looked at: a cap makes it smaller, None where it allows none. Raises ValueError
    for images that are smaller, or larger, already.
    """
    if tuple(images.shape[-2:]) != model.image_size():
        height, width = model.image_size()
        raise ValueError(
            f"images are {images.shape[-2]} x {images.shape[-1]}: a model that chooses resolutions takes "
            f"{height} x {width} and makes them smaller itself"
        )
    asked = look.sizes_of(len(images))
    return asked if cap_macs is None else within_cap(asked, cap_macs, model.macs_of_sizes())


def _executed(
    model: MIAFormer, images: Tensor, policy: Policy, cap_macs: Counts | None, way: Way, whole: Cost
) -> Output:
    """whole: of the images before they were made smaller."""
    cost = _cost_of(model, images)
    x, steps = model.walk_images(images, cost, policy, cap_macs, way.execution)
    if cost.trims_last_block:  # nothing else is read
        x = x[:, : cost.num_prefix_tokens]
    x = model.backbone.norm(x)
    logits = model.answer(x)
    features = model.answer(x, pre_logits=True) if way.features else None
    taken = steps.decisions()
    tokens = F.pad(taken.tokens, (0, whole.num_patches - cost.num_patches))
    fraction = (steps.macs.double() / whole.backbone).float()
    grid = torch.tensor(cost.grid).expand(len(images), 2)
    trace = Trace(taken.depth, taken.heads, tokens, steps.macs, fraction, torch.ones_like(steps.macs), grid)
    return Output(logits, trace, features)


def _open_images(
    model: MIAFormer, images: Tensor, output: Output, looks: TwoLooks, cap_macs: Counts | None
) -> tuple[Tensor, Counts | None]:
    """The images (n,) to look at again, on the host: those whose cap pays for more than the first look took. And
    what it leaves.
    """
    again = looks.open_images(output.logits).cpu()
    if cap_macs is None:
        return again, None
    spent = output.trace.macs.cpu().numpy()
    left = cap_macs - spent
    more = left > spent
    if looks.second.sizes:  # a larger size wants all of its MACs
        macs = model.macs_of_sizes()
        sizes = _sizes_of(model, looks.second, images, left)
        more = np.array([0 if size is None else macs[size] for size in sizes]) > spent
    again = again[torch.from_numpy(more[again.numpy()])]
    return again, left[again.numpy()]


def _cost_of(model: MIAFormer, images: Tensor) -> Cost:
    return model.cost((images.shape[-2], images.shape[-1]))
