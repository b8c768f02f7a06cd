"""Ours without one of its parts, or with another in its place: trained and asked as ours is.

All of them have controllers, also where the recipe's own model chooses resolutions (`with_controllers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from miaformer.evaluation import contenders
from miaformer.lab.comparison.method import (
    FRACTIONS,
    Entry,
    Method,
    Question,
    adaptation_epochs,
    adapting,
    by_policy,
    with_controllers,
)
from miaformer.model.config import Grain
from miaformer.model.model import MIAFormer
from miaformer.training.recipes import Recipe
from miaformer.training.stages import OBJECTIVES

ALL_GRAINS: tuple[Grain, ...] = ("depth", "heads", "tokens")
LATER_TOKENS: dict[str, Any] = {"first_token_block": None, "last_token_block": None}  # in all blocks but the first two


def _without(*kinds: str) -> Callable[[Recipe], Recipe]:
    """Ours without some stages. The first that is left and decides gets their epochs, and the rates and temperatures of
    the supervised stage; the last one anneals.
    """

    def recipe(base: Recipe) -> Recipe:
        left = [stage for stage in adapting(base).stages if stage.kind not in kinds]
        heir = next(place for place, stage in enumerate(left) if OBJECTIVES[stage.kind].decides)
        missing = adaptation_epochs(base) - sum(stage.epochs for stage in left)
        first = next(stage for stage in adapting(base).stages if OBJECTIVES[stage.kind].decides)
        left[heir] = replace(first, kind=left[heir].kind, epochs=left[heir].epochs + missing)
        left[-1] = replace(left[-1], anneal=1.0)
        return replace(base, stages=tuple(left))

    return recipe


def _for_budget(budget: float, base: Recipe) -> Recipe:
    """Ours trained for this budget, give or take a hundredth, instead of for all of them."""
    return replace(adapting(base), budgets=(budget - 0.01, budget + 0.01))


def _ablation(
    name: str,
    about: str,
    recipe: Callable[[Recipe], Recipe] = adapting,
    budgets: Sequence[float] | None = None,
    **adapt: Any,
) -> Method:
    """Ours with other stages, or with other fields of `AdaptConfig`. budgets: to be asked for; None: all."""

    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        asked = [budget for budget in question.budgets if budgets is None or budget in budgets]
        found = contenders(model, asked, ("learned",))[0] if asked else []
        return [Entry(name, one.budget, by_policy(model, one.policy)) for one in found]

    def changed(base: Recipe) -> Recipe:
        base = with_controllers(base)
        return replace(recipe(base), adapt={**base.adapt, **adapt})

    return Method(name, about, changed, entries)


ABLATIONS: dict[str, Method] = {
    method.name: method
    for method in (
        _ablation("only-depth", "one grain", grains=("depth",)),
        _ablation("only-heads", "one grain", grains=("heads",)),
        _ablation("only-tokens", "one grain", grains=("tokens",)),
        _ablation("no-depth", "two grains", grains=("heads", "tokens")),
        _ablation("no-heads", "two grains", grains=("depth", "tokens")),
        _ablation("no-tokens", "two grains", grains=("depth", "heads")),
        _ablation("all-grains", "three grains", grains=ALL_GRAINS),
        _ablation("no-elastic", "its epochs supervised", _without("elastic")),
        _ablation("no-reinforce", "its epochs supervised", _without("reinforce")),
        _ablation("no-supervised", "its epochs reinforce", _without("supervised")),
        _ablation("only-reinforce", "all epochs reinforce", _without("elastic", "supervised")),
        _ablation(
            "no-distillation",
            "true labels alone",
            lambda base: replace(adapting(base), distill_weight=0.0),
        ),
        *(
            _ablation(
                f"only-{budget:g}",
                "trained for one budget",
                partial(_for_budget, budget),
                budgets=(budget,),
            )
            for budget in FRACTIONS
        ),
        # Beside all-grains: how heads are chosen, and what the MLP does where heads go.
        _ablation("subset-heads", "any subset, not the first k", grains=ALL_GRAINS, head_choice="subset"),
        _ablation("coupled-mlp", "the paper's MLP width", grains=ALL_GRAINS, mlp_width="coupled"),
        _ablation("full-mlp", "MLPs keep their width", grains=ALL_GRAINS, mlp_width="full"),
        _ablation("later-tokens", "tokens decided in all blocks but the first two", **LATER_TOKENS),
        # Beside later-tokens.
        _ablation("per-block-tokens", "and they may come back", **LATER_TOKENS, token_scope="per_block"),
        _ablation("content-tokens", "what is in tokens tells them apart too", token_choice="content"),
    )
}
