"""Who is compared: the learned policy and its controls, each at the budgets asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from miaformer.data import LabelledBatch
from miaformer.engine.decisions import Decisions
from miaformer.evaluation.calibration import OnProgress
from miaformer.evaluation.controls import (
    KeepRates,
    Simulation,
    cls_attention_policy,
    random_policy,
    static_policy,
)
from miaformer.model.budget import check_fraction
from miaformer.model.looks import STEP
from miaformer.model.model import MIAFormer
from miaformer.model.output import Trace
from miaformer.model.policy import AnyPolicy, Full, Look, RandomSizes, Static
from miaformer.model.resolution import Size

POLICIES = ("learned", "static", "random", "cls-attention", "full")


@dataclass(frozen=True)
class Contender:
    """A policy at a budget. `price` is what the learned policy is conditioned on, None for the others."""

    name: str
    budget: float
    policy: AnyPolicy
    price: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """A policy that cannot meet a budget, and why."""

    name: str
    budget: float
    reason: str


def contenders(
    model: MIAFormer,
    budgets: Sequence[float],
    policies: Sequence[str] = ("learned", "static", "random"),
    cap: float | None = None,
    calibration: Iterable[LabelledBatch] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[list[Contender], list[LeftOut]]:
    """The policies at the budgets, budget by budget, and those that cannot meet theirs.

    The controls cost what the learned policy costs: the budget, or, where a cap or the end of the calibration table
    keeps the learned policy below it, what that spends on the calibration set. See `evaluate` for the arguments.
    """
    policies = list(dict.fromkeys(policies))
    budgets = sorted({check_fraction("budget", budget) for budget in budgets})
    _check(model, policies, budgets, calibration is not None)
    traces: dict[float, Trace] = {}
    imitates = bool({"static", "random"} & set(policies)) and not model.adapt_config.chooses_resolution
    if calibration is not None and model.calibration is not None and imitates:
        traces = _learned_traces(model, calibration, [b for b in budgets if _reaches(model, b)], cap, on_progress)
    found = [Contender("full", 1.0, Full())] if "full" in policies else []
    left_out = []
    for budget in budgets:
        for name in policies:
            if name == "full":
                continue
            try:
                found.append(_contender(model, name, budget, traces, cap, seed))
            except ValueError as error:
                left_out.append(LeftOut(name, budget, str(error)))
    if not found:
        raise ValueError(left_out[0].reason)
    return found, left_out


def static_decisions(model: MIAFormer, budget: float, calibration: Iterable[LabelledBatch]) -> Decisions | Size:
    """What the static policy does with every image, for `export_static`: the learned policy's mean decisions on the
    calibration set; of a model that chooses resolutions the largest size within the budget.

    Raises ValueError as `contenders` does.
    """
    (found,), _ = contenders(model, [budget], ["static"], calibration=calibration)
    return found.policy.sizes[0] if isinstance(found.policy, Look) else cast(Static, found.policy).decisions


def _check(model: MIAFormer, policies: Sequence[str], budgets: Sequence[float], has_calibration_images: bool) -> None:
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise ValueError(f"unknown policy {', '.join(unknown)}: use some of {', '.join(POLICIES)}")
    if not policies or (not budgets and set(policies) != {"full"}):
        raise ValueError("give at least one policy and one budget to evaluate")
    if model.calibration is None and {"learned", "static"} & set(policies):
        raise ValueError(
            "the model is not calibrated, so its learned policy (and static, which is made from it) knows no "
            "budget: calibrate it (miaformer.calibrate), or evaluate other policies"
        )
    if model.calibration is not None and {"static", "random"} & set(policies) and not has_calibration_images:
        raise ValueError("policies static and random need calibration batches: they imitate the learned policy's means")


def _contender(
    model: MIAFormer, name: str, budget: float, traces: Mapping[float, Trace], cap: float | None, seed: int
) -> Contender:
    if name == "learned":
        return Contender(name, budget, model.at_budget(budget), _price_of(model, budget))
    if model.adapt_config.chooses_resolution and name in ("static", "random"):
        return Contender(name, budget, _without_confidence(model, name, budget, seed))
    trace = traces.get(budget)
    target = budget
    if trace is not None:
        spent = trace.macs_fraction.double().mean().item()
        target = budget if spent > budget - 0.01 else spent
    if name == "cls-attention":
        return Contender(name, budget, cls_attention_policy(model, target))
    if model.calibration is not None and trace is None:
        model.check_budget(budget)  # raises, saying why there is no trace
    if name == "static":
        assert trace is not None
        return Contender(name, budget, static_policy(Simulation.of(model), target, trace))
    rates = None if trace is None else KeepRates.of(trace)
    return Contender(name, budget, random_policy(Simulation.of(model), target, rates, cap, seed))


def _price_of(model: MIAFormer, budget: float) -> float | None:
    """None of a model that has no prices."""
    table = model.check_budget(budget)
    return table.price(budget) if table.prices else None


def _without_confidence(model: MIAFormer, name: str, budget: float, seed: int) -> AnyPolicy:
    """The controls of a model that chooses resolutions: the largest size within the budget for every image, or that one
    and the next larger one, drawn by chance so that the budget is met.
    """
    table, sizes = model.check_budget(budget), model.image_sizes()
    place = table.nearest(table.within(budget))
    least, spent = table.fractions[-1], table.fractions[place]
    if budget < least - STEP / 2:
        raise ValueError(f"budget={budget:.3f} is below {least:.3f}, what the smallest size takes")
    if name == "static" or not place:
        return Look(Full(), (sizes[place],))
    share = (budget - spent) / (table.fractions[place - 1] - spent)
    return RandomSizes(Full(), (sizes[place], sizes[place - 1]), share, seed)


def _reaches(model: MIAFormer, budget: float) -> bool:
    try:
        model.check_budget(budget)
    except ValueError:
        return False
    return True


@torch.inference_mode()
def _learned_traces(
    model: MIAFormer,
    batches: Iterable[LabelledBatch],
    budgets: Sequence[float],
    cap: float | None,
    on_progress: OnProgress | None,
) -> dict[float, Trace]:
    """What the learned policy executes on these batches at each budget, on the CPU."""
    if not budgets:
        return {}
    parts: dict[float, list[Trace]] = {budget: [] for budget in budgets}
    done = 0
    for images, _ in inference_batches(model, batches):
        for budget in budgets:
            parts[budget].append(model.run(images, budget=budget, cap=cap).trace)
        done += len(images)
        if on_progress is not None:
            on_progress("controls", done)
    if not done:
        raise ValueError("there are no calibration images")
    names = [field.name for field in fields(Trace)]
    return {
        budget: Trace(*(torch.cat([getattr(trace, name) for trace in traces]).cpu() for name in names))
        for budget, traces in parts.items()
    }


def inference_batches(model: MIAFormer, batches: Iterable[LabelledBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels where the model is, for inference; the model's mode is put back at the end."""
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        for batch in batches:
            yield batch.images.to(parameter), batch.labels.to(parameter.device)
    finally:
        model.train(training)
