"""What is compared: how each method is trained from the shared backbone, and how it is asked for a budget.

All get the same epochs, teacher, data and augmentation; only the stages differ. Three kinds of controls do not adapt:
`dense`, the backbone trained on; shallow models, its first blocks trained on; narrow ones, of fewer channels, trained
from scratch for as long as backbone and adaptation together, with the backbone as their teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from miaformer.backbone import transformer_blocks
from miaformer.comparison.ablations import ABLATIONS
from miaformer.comparison.method import FRACTIONS, OURS, Classify, Entry, Method, Question, adaptation_epochs, by_policy
from miaformer.evaluation import cls_attention_policy, contenders
from miaformer.evaluation.controls import top_tokens_policy
from miaformer.model import MIAFormer
from miaformer.policy import Full
from miaformer.rivals.exits import EarlyExit, exit_table
from miaformer.rivals.merging import merged_logits, merged_macs, merges_for
from miaformer.rivals.policies import token_scorers
from miaformer.training.recipes import Kind, Recipe


def _one_stage(kind: Kind) -> Callable[[Recipe], Recipe]:
    """Adaptation as a single stage of this kind, with the learning rates of the recipe's supervised stage.

    Images are not mixed, as they are not where ours is adapted.
    """

    def recipe(base: Recipe) -> Recipe:
        supervised = next(stage for stage in base.stages if stage.kind == "supervised")
        stage = replace(supervised, kind=kind, epochs=adaptation_epochs(base), anneal=1.0)
        return replace(base, stages=(stage,), mixup=0.0, cutmix=0.0)

    return recipe


def _narrow(fraction: float) -> Callable[[Recipe], Recipe]:
    """A backbone of about this fraction of the MACs by fewer channels, heads of even size, trained from scratch.

    Without what makes a backbone do with less, which a model that never does can do without.
    """

    def recipe(base: Recipe) -> Recipe:
        args = base.model_args
        heads = args["num_heads"]
        dim = 2 * heads * round(math.sqrt(fraction) * args["embed_dim"] / (2 * heads))
        plain = (replace(s, patch_drop=(0.0, 0.0), early_weight=0.0) for s in base.only("backbone").stages)
        stages = *plain, *_one_stage("backbone")(base).stages
        return replace(base, model_args={**args, "embed_dim": dim}, stages=stages)

    return recipe


def _first_blocks(fraction: float) -> Callable[[nn.Module], None]:
    """Leaves a backbone only so many of its blocks, from the first on."""

    def shrink(backbone: nn.Module) -> None:
        kept = max(round(fraction * len(transformer_blocks(backbone))), 1)
        backbone.blocks = nn.Sequential(*transformer_blocks(backbone)[:kept])

    return shrink


# How a trained model is asked -----------------------------------------------------------------------------------------


def _as_backbone(name: str) -> Callable[[MIAFormer, Question], list[Entry]]:
    """The static model on our engine, so that its last block computes what is read alone, as everybody's does.

    Its MACs are a fraction of the comparison's backbone's.
    """

    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        def classify(images: Tensor) -> tuple[Tensor, Tensor]:
            output = model.run(images, policy=Full())
            return output.logits, output.trace.macs / question.backbone_macs

        return [Entry(name, None, classify)]

    return entries


def _learned(model: MIAFormer, question: Question) -> list[Entry]:
    """Our policy, and its controls on the same weights."""
    found, _ = contenders(
        model,
        question.budgets,
        ("learned", "static", "random"),
        calibration=question.calibration(),
        seed=question.seed,
    )
    return [Entry(one.name, one.budget, by_policy(model, one.policy)) for one in found]


def _within_reach(
    name: str, make: Callable[[MIAFormer, float], Classify]
) -> Callable[[MIAFormer, Question], list[Entry]]:
    """An entry for each budget that the method can go down to."""

    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        found = []
        for budget in question.budgets:
            try:
                found.append(Entry(name, budget, make(model, budget)))
            except ValueError:  # below the least it can spend
                continue
        return found

    return entries


def _merging(model: MIAFormer, budget: float) -> Classify:
    cost = model.cost()
    merges = merges_for(cost, budget)
    fraction = merged_macs(cost, merges) / cost.backbone

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        return merged_logits(model, images, merges), torch.full((len(images),), fraction)

    return classify


EVEN_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)  # of the tokens


def _exits(name: str, shares: Sequence[float]) -> Callable[[MIAFormer, Question], list[Entry]]:
    """Leaving when confident, with the share of tokens and the threshold that are best on the calibration images."""

    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        tables = [exit_table(model, question.calibration(), share) for share in shares]
        found = []
        for budget in question.budgets:
            macs = budget * model.cost().backbone
            reached = [(*table.at(macs), table.keep) for table in tables if table.macs[0] <= macs]
            if reached:
                _, threshold, keep = max(reached)
                found.append(Entry(name, budget, by_policy(model, EarlyExit(model.backbone, threshold, keep))))
        return found

    return entries


def _elastic_for_all_epochs(base: Recipe) -> Recipe:
    """Random decisions and no controllers, for as long as everybody adapts."""
    supervised, elastic = (next(s for s in base.stages if s.kind == kind) for kind in ("supervised", "elastic"))
    stage = replace(elastic, epochs=adaptation_epochs(base), lr=supervised.lr, anneal=1.0)
    return replace(base, stages=(stage,))


def _put_scorers(model: MIAFormer) -> None:
    scorers = token_scorers(len(model.controllers), model.embed_dim)
    model.controllers = scorers  # type: ignore[assignment]  # in their place, for this method alone


RIVALS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("learned", "ours, with static and random on its weights", lambda base: base.only(*OURS), _learned),
        Method("dense", "the backbone, trained on for as long", _one_stage("backbone"), _as_backbone("dense")),
        Method(
            "cls-attention",
            "EViT's criterion: tokens by class attention, fine-tuned",
            _one_stage("cls-attention"),
            _within_reach("cls-attention", lambda model, b: by_policy(model, cls_attention_policy(model, b))),
        ),
        Method(
            "top-tokens",
            "DynamicViT: tokens by trained scorers",
            _one_stage("top-tokens"),
            _within_reach("top-tokens", lambda model, b: by_policy(model, top_tokens_policy(model, b))),
            prepare=_put_scorers,
        ),
        Method(
            "merging",
            "ToMe: similar tokens merged, fine-tuned",
            _one_stage("merging"),
            _within_reach("merging", _merging),
        ),
        Method("merging-free", "ToMe without training", None, _within_reach("merging-free", _merging)),
        Method("exits", "blocks until confident, fine-tuned", _one_stage("exits"), _exits("exits", (1.0,))),
        Method(
            "even-exits",
            "a share of the tokens, spread evenly, and blocks until confident: ours without controllers",
            _elastic_for_all_epochs,
            _exits("even-exits", EVEN_SHARES),
        ),
        *(
            Method(
                f"shallow-{fraction:g}",
                f"the first blocks, about {fraction:g} of them, trained on",
                _one_stage("backbone"),
                _as_backbone("shallow"),
                shrink=_first_blocks(fraction),
            )
            for fraction in FRACTIONS
        ),
        *(
            Method(
                f"narrow-{fraction:g}",
                f"a ViT of about {fraction:g} of the MACs, from scratch",
                _narrow(fraction),
                _as_backbone("narrow"),
                from_scratch=True,
            )
            for fraction in FRACTIONS
        ),
    )
}

METHODS: dict[str, Method] = {**RIVALS, **ABLATIONS}
