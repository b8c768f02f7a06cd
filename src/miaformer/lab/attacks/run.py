"""A model under attack, from a data set to the report of `miaformer attack`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaformer.data import Batches, ImageData, spread
from miaformer.evaluation.contenders import contenders
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.on_data import ordered_batches
from miaformer.lab.attacks.evaluate import OnProgress, RobustnessEvaluation, frozen, seeded
from miaformer.lab.attacks.gradient import Ball, Climb
from miaformer.lab.attacks.looks import looks_target
from miaformer.lab.attacks.masking import signs_of_masking
from miaformer.lab.attacks.methods import ATTACKS, DRAWS
from miaformer.lab.attacks.target import Pixels, Target, adaptive_target, static_target, steadied
from miaformer.model.fingerprint import fingerprint
from miaformer.model.model import MIAFormer
from miaformer.model.policy import AnyPolicy, Look, Sampling, TwoLooks

CONTROLS = ("static", "random", "cls-attention")
TARGETS = ("backbone", "adaptive", "sampled", *CONTROLS)
PATCHES = ("patch", "patch-kept")
DEFAULT_ATTACKS = ("fgsm", "pgd", "adaptive", "transfer")
BY_LIBRARY = ("autoattack", "apgd-ce", "square")  # and so is the check for gradient masking
MASKING_IMAGES = 100
PATCH_IMAGES = 2000  # of the calibration split, that patches are learned on


def attack(
    model: MIAFormer,
    data: ImageData,
    balls: Sequence[Ball] = (Ball(4 / 255),),
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    targets: Sequence[str] | None = None,
    *,
    budget: float | None = None,
    cap: float | None = None,
    held_out: ImageData | None = None,
    climb: Climb = Climb(),  # noqa: B008 - frozen
    cascade: bool = False,
    patch_area: float = 0.02,
    patch_steps: int = 200,
    masking: bool = True,
    seed: int = 0,
    batch_size: int = 250,
    out: Path | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Attack a model on a data set, and report how much of its accuracy and of its savings is left.

    balls: the radii. attacks: of `ATTACKS` and `PATCHES`. targets: of `TARGETS`; None: the backbone, and the learned
    policy where the model knows budgets. budget: of all targets but the backbone; None: 0.5, or the nearest that the
    model can meet. cap: the most MACs one image takes, a fraction. held_out: the calibration split, see
    `needs_held_out`. climb: how gradient attacks climb. cascade, batch_size, out: as `RobustnessEvaluation` has them.
    patch_area: a share of the image; patch_steps: to learn a patch. masking: check whether gradients can be trusted.

    The report is that of `miaformer attack --json`: a row for each target, radius and attack, under `rows`; the checks
    under `masking`.

    Raises ValueError for unknown attacks and targets, where the model has no such target, and where no attack has
    anything to aim at; ModuleNotFoundError as `check_attacks` does.
    """
    attacks, names = check_attacks(attacks, masking), _target_names(model, targets)
    budget = _budget_of(model, names) if budget is None else budget
    if held_out is None and needs_held_out(attacks, names):
        raise ValueError("patches and control policies are made on the calibration split: give held_out")
    with frozen(model):
        policies: dict[str, AnyPolicy] = {}
        if held_out is not None and budget is not None:
            calibration = ordered_batches(model, held_out, batch_size)
            policies = _control_policies(model, names, budget, cap, calibration, seed)
        aims = [_aim(model, name, policies, budget, cap) for name in names]
        static = next((aim for aim in aims if aim.name == "backbone"), static_target(model))
        spender = _aim(model, "adaptive", {}, budget, cap) if model.calibration is not None else None
        parameter = next(model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        about = {"weights": fingerprint(model), "dtype": dtype, "data": data.name, "budget": budget, "cap": cap}
        images, labels = _pixels(model, data, batch_size)
        evaluation = RobustnessEvaluation(
            images, labels, static, model.num_classes, climb, seed, spender, cascade, batch_size, out, about
        )
        rows = evaluation.run(aims, [name for name in attacks if name in ATTACKS], balls, on_progress)
        patches = [name for name in attacks if name in PATCHES]
        if patches and held_out is not None:
            learned_on, _ = _pixels(model, spread(held_out, PATCH_IMAGES), batch_size)
            rows += evaluation.run_patches(aims, patches, learned_on, patch_area, patch_steps, on_progress)
        if not rows:
            raise ValueError(
                f"nothing to attack: {', '.join(attacks)} on {', '.join(names)}; "
                "a static backbone has no cost to raise, and is what transfer comes from"
            )
        largest = max(balls, key=lambda ball: ball.eps)
        signs = _signs(evaluation, aims, largest, on_progress) if masking else []
    return {
        "data": data.name,
        "budget": budget,
        "cap": cap,
        "steps": climb.steps,
        "restarts": climb.restarts,
        "cascade": cascade,
        "rows": rows,
        "masking": signs,
        "environment": describe_environment(parameter.device, seed),
    }


def check_attacks(names: Sequence[str], masking: bool = True) -> list[str]:
    """Each of the attacks once. Raises ValueError for unknown ones, ModuleNotFoundError where one of them, or the check
    for gradient masking, needs `pyautoattack` and it is not installed.
    """
    names = _known(names, (*ATTACKS, *PATCHES), "attack")
    if masking or set(BY_LIBRARY) & set(names):
        import pyautoattack  # noqa: F401
    return names


def needs_held_out(attacks: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether `attack` wants the calibration split too: control policies and patches are made on it."""
    return bool({*attacks} & {*PATCHES} or {*targets} & {*CONTROLS})


def _known(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}: use some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _target_names(model: MIAFormer, targets: Sequence[str] | None) -> list[str]:
    sized = model.adapt_config.chooses_resolution
    names = _known(targets or TARGETS[: 2 if model.calibration else 1], TARGETS, "target")
    if sized and set(names) & {"sampled", "cls-attention"}:
        raise ValueError(
            "the model chooses resolutions, so it draws no decisions and drops no tokens: attack backbone, adaptive, "
            "static or random"
        )
    return names


def _budget_of(model: MIAFormer, names: Sequence[str]) -> float | None:
    """What all targets but the backbone spend, where nobody says it."""
    if model.calibration is not None:
        least, most = model.calibration.range
        return min(max(0.5, least), most)
    if set(names) != {"backbone"}:
        raise ValueError("the model is not calibrated, so it knows no budget: attack its backbone alone")
    return None


def _control_policies(
    model: MIAFormer, names: Sequence[str], budget: float, cap: float | None, calibration: Batches, seed: int
) -> dict[str, AnyPolicy]:
    """Of the controls among the targets, by name. Raises ValueError for one that cannot meet the budget."""
    controls = [name for name in names if name in CONTROLS]
    if not controls:
        return {}
    found, left_out = contenders(model, [budget], controls, cap, calibration.epoch(0), seed)
    if left_out:
        raise ValueError(f"{left_out[0].name} at {budget:g}: {left_out[0].reason}")
    return {one.name: one.policy for one in found}


def _aim(
    model: MIAFormer, name: str, policies: Mapping[str, AnyPolicy], budget: float | None, cap: float | None
) -> Target:
    if name == "backbone":
        return static_target(model)
    policy = policies.get(name)
    if policy is None:
        assert budget is not None  # see `_budget_of`
        policy = _own_policy(model, budget, name == "sampled")
    if isinstance(policy, Look | TwoLooks):
        return looks_target(model, policy, name, cap)
    return adaptive_target(model, policy, name, cap)


def _own_policy(model: MIAFormer, budget: float, sampled: bool) -> AnyPolicy:
    if model.adapt_config.chooses_resolution:
        return model.at_budget(budget)
    return replace(model.learned(model.price_of(budget)), sampling=Sampling() if sampled else None)


def _pixels(model: MIAFormer, data: ImageData, batch_size: int) -> tuple[Tensor, Tensor]:
    """All images, from 0 to 1, and their labels, where the model is."""
    pixels = Pixels.of(model)
    batches = ordered_batches(model, data, batch_size).epoch(0)
    parts = [(pixels.restored(batch.images.to(pixels.mean)), batch.labels) for batch in batches]
    images, labels = (torch.cat(side) for side in zip(*parts, strict=True))
    return images, labels.to(images.device)


def _signs(
    evaluation: RobustnessEvaluation, targets: Sequence[Target], ball: Ball, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Signs of gradient masking on some images: do they keep the class that they have?"""
    found = []
    every = max(len(evaluation.labels) // MASKING_IMAGES, 1)
    images = evaluation.images[::every][:MASKING_IMAGES]
    for place, target in enumerate(targets, start=1):
        aim = steadied(target, DRAWS) if target.is_random else target
        with seeded(evaluation.seed, f"masking, {target.name}"):
            with torch.no_grad():
                labels = aim.deployed(images).logits.argmax(dim=1)
            signs = signs_of_masking(
                aim, images, labels, ball, evaluation.climb, evaluation.num_classes, evaluation.seed
            )
        found += [{"target": target.name, **vars(sign)} for sign in signs]
        on_progress("gradient masking", place, len(targets))
    return found
