"""From what a call asks for to what is executed: budgets become prices, sizes, looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from miaformer.engine.cost import Cost, Counts
from miaformer.model.budget import Calibration, check_fraction
from miaformer.model.early_exit import NEVER, EarlyExit
from miaformer.model.looks import row_of
from miaformer.model.policy import AnyPolicy, Full, Learned, Look, Policy, Sampling, TwoLooks

if TYPE_CHECKING:
    from miaformer.model.model import MIAFormer

Budget = float | Sequence[float] | Tensor  # one for all images, or one for each


def requested(
    model: MIAFormer,
    policy: AnyPolicy | None,
    budget: Budget | None,
    price: Budget | None,
    cap: Budget | None,
    batch: int,
) -> Look | TwoLooks:
    """What a call executes: a budget may be spent in two looks, and in early exits.

    Raises TypeError or ValueError for what is no policy, for more than one of policy, budget and price, and for a
    budget that the model does not know.
    """
    _check_one(policy=policy, budget=budget, price=price)
    if isinstance(policy, Look | TwoLooks):
        return policy
    if policy is not None:
        if not hasattr(policy, "decide"):
            raise TypeError(
                f"policy={policy!r} is not a policy: pass one from miaformer.policy, for example Random(tokens=0.5)"
            )
        return Look(policy)
    spent = allowed(model, cap, batch) if budget is None and price is None else budget
    if spent is not None:
        return at_budget(model, spent, batch)
    return Look(in_one_look(model, None, price, cap, batch))


def in_one_look(
    model: MIAFormer, budget: Budget | None, price: Budget | None, cap: Budget | None, batch: int
) -> Policy:
    """The policy of a call that looks once. Raises ValueError as `requested` does."""
    _check_one(budget=budget, price=price)
    if price is None:
        spent = allowed(model, cap, batch) if budget is None else budget
        if spent is None:
            return Full()
        price = model.price_of(per_image("budget", spent, batch))
    return model.learned(price, batch)


def at_budget(model: MIAFormer, budget: Budget, batch: int = 1) -> Look | TwoLooks:
    """What a call with this budget executes, as a policy."""
    budgets = per_image("budget", budget, batch)
    return _in_two(model, budgets, batch) or Look(model.learned(model.price_of(budgets), batch))


def _check_one(**given: object) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Give one of policy, budget and price, not {' and '.join(names)}")


def allowed(model: MIAFormer, cap: Budget | None, batch: int) -> Tensor | None:
    """The budget of a call that gives none: what its cap allows, of a calibrated model. None: everything."""
    if model.calibration is None or cap is None:
        return None
    caps = per_image("cap", cap, batch)
    for one in torch.atleast_1d(caps).tolist():
        check_fraction("cap", one)
    return caps.clamp(*model.calibration.range)


def _in_two(model: MIAFormer, budgets: Tensor, batch: int) -> TwoLooks | None:
    """None where one look to its end is best for all. budgets: (), or (B,) where images have their own."""
    asked = torch.atleast_1d(budgets).tolist()
    table = model.check_budget(asked)
    least = table.fractions[-1] if model.adapt_config.chooses_resolution else 0.0
    rows = [row_of(table.looks, one, least) for one in asked]
    if model.adapt_config.chooses_resolution:
        asked = [table.within(one) for one in asked]
    elif not any(rows):
        return None
    first, second = (
        _in_one(model, [getattr(row, name) if row else one for row, one in zip(rows, asked, strict=True)], table, batch)
        for name in ("first", "second")
    )
    leave = [row.leave if row else NEVER for row in rows]
    if min(leave) < NEVER:
        first = replace(first, policy=EarlyExit(model.backbone, torch.tensor(leave)))
    return TwoLooks(first, second, torch.tensor([row.confidence if row else 0.0 for row in rows]))


def _in_one(model: MIAFormer, fractions: Sequence[float], table: Calibration, batch: int) -> Look:
    """One look that spends such fractions of the MACs in the mean: one for all images, or one each."""
    if model.adapt_config.chooses_resolution:
        sizes = model.image_sizes()
        return Look(Full(), tuple(sizes[table.nearest(fraction)] for fraction in fractions))
    return Look(model.learned(model.price_of(fractions), batch))


def per_image(name: str, value: Budget, batch: int | None = None) -> Tensor:
    """A number for all images (), or one for each (B,), float64."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}={value!r} must be a number, or one for each image") from error
    if numbers.ndim > 1 or (batch is not None and numbers.numel() not in (1, batch)):
        images = "image" if batch is None else f"of {batch} images"
        raise ValueError(f"{name}={value!r} must be a number, or one for each {images}")
    return numbers


def drawing(policy: Look | TwoLooks, sampling: Sampling) -> Look | TwoLooks:
    """The learned policy, drawing its decisions."""
    if isinstance(policy, TwoLooks):
        first, second = (_drawing(look, sampling) for look in (policy.first, policy.second))
        return replace(policy, first=first, second=second)
    return _drawing(policy, sampling)


def _drawing(look: Look, sampling: Sampling) -> Look:
    if not isinstance(look.policy, Learned):
        raise ValueError(
            "sample= draws the decisions of controllers, and here none decide: calibrate the model and give a budget, "
            "or give a price"
        )
    return replace(look, policy=replace(look.policy, sampling=sampling))


def cap_in_macs(cap: Budget, batch: int, cost: Cost) -> Counts:
    """(B,), the most that each image may take."""
    caps = [cap] if isinstance(cap, str | int | float) else per_image("cap", cap, batch).reshape(-1).tolist()
    limits = [int(check_fraction("cap", one) * cost.backbone) for one in caps]
    return np.broadcast_to(np.array(limits, dtype=np.int64), batch)
