"""What is compared: how each method is trained from the shared backbone, and how it is asked for a budget.

All get the same epochs, teacher, data and augmentation; only the stages differ. Static baselines have modules of their
own: `smaller` (`dense`, the backbone trained on; shallow models, its first blocks trained on), `resolution` and `int8`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from miaformer.evaluation import cls_attention_policy, contenders
from miaformer.evaluation.contenders import Contender
from miaformer.export.engines.onnx_runtime import OnnxModule
from miaformer.lab.baselines.exits import EvenExits, exit_table
from miaformer.lab.baselines.merging import merged_logits, merged_macs, merges_for
from miaformer.lab.baselines.tokens import add_scorers, top_tokens_policy
from miaformer.lab.comparison.ablations import ABLATIONS
from miaformer.lab.comparison.engines import Call, at_budgets, of_module
from miaformer.lab.comparison.int8 import INT8
from miaformer.lab.comparison.method import (
    Entry,
    Method,
    Question,
    adapting,
    by_policy,
    image_shape,
    one_stage,
)
from miaformer.lab.comparison.resolution import RESOLUTION, RESOLUTION_FREE, RESOLUTION_LOOKS, Looked
from miaformer.lab.comparison.smaller import DENSE, SHALLOW
from miaformer.model.model import MIAFormer
from miaformer.model.policy import Look, Policy, Static
from miaformer.model.resolution import Size, resized
from miaformer.training.recipes import Recipe

# How a trained model is asked -----------------------------------------------------------------------------------------


def _learned(model: MIAFormer, question: Question) -> list[Entry]:
    """Our policy, and its controls on the same weights."""
    found, _ = contenders(
        model,
        question.budgets,
        ("learned", "static", "random"),
        calibration=question.calibration(),
        seed=question.seed,
    )
    in_onnx = at_budgets(model)
    shared = Looked(model).by if model.adapt_config.chooses_resolution else lambda policy: None
    return [
        Entry(
            one.name,
            one.budget,
            by_policy(model, one.policy),
            engines=_in_onnx(model, one, in_onnx),
            sharing=shared(one.policy),
        )
        for one in found
    ]


def _in_onnx(model: MIAFormer, one: Contender, learned: Callable[[float], Call]) -> dict[str, Call]:
    """ONNX Runtime: the learned policy's file at this budget, or that of the static decisions."""
    if one.name == "learned":
        return {"onnx": learned(one.budget)}
    if isinstance(one.policy, Static):
        return {"onnx": OnnxModule(partial(_write_static, model, one.policy), batch=1)}
    if isinstance(one.policy, Look) and len(one.policy.sizes) == 1:
        (size,) = one.policy.sizes
        module = _Smaller(model.to_timm(size), size)
        return {"onnx": of_module(module, image_shape(model))["onnx"]}
    return {}


class _Smaller(nn.Module):
    """A static model that makes its images smaller first."""

    def __init__(self, backbone: nn.Module, size: Size) -> None:
        super().__init__()
        self.backbone, self.size = backbone, size

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone(resized(images, self.size))
        return logits


def _write_static(model: MIAFormer, policy: Static, path: Path) -> None:
    from miaformer.export import export_static

    export_static(model, path, policy.decisions)


def _within_reach(make: Callable[[MIAFormer, float], Entry]) -> Callable[[MIAFormer, Question], list[Entry]]:
    """An entry for each budget that the method can go down to."""

    def entries(model: MIAFormer, question: Question) -> list[Entry]:
        found = []
        for budget in question.budgets:
            try:
                found.append(make(model, budget))
            except ValueError:  # below the least it can spend
                continue
        return found

    return entries


def _policy_at(name: str, policy: Callable[[MIAFormer, float], Policy]) -> Callable[[MIAFormer, Question], list[Entry]]:
    """An entry for each budget that a policy made for it can go down to."""
    return _within_reach(lambda model, budget: Entry(name, budget, by_policy(model, policy(model, budget))))


class _Merged(nn.Module):
    """ToMe with a fixed number of merges in each block: a static model of its own."""

    def __init__(self, model: MIAFormer, merges: Sequence[int]) -> None:
        super().__init__()
        self.model, self.merges = model, merges

    def forward(self, images: Tensor) -> Tensor:
        return merged_logits(self.model, images, self.merges)


def _merging(name: str, model: MIAFormer, budget: float) -> Entry:
    cost = model.cost()
    merges = merges_for(cost, budget)
    merged, fraction = _Merged(model, merges), merged_macs(cost, merges) / cost.backbone

    def classify(images: Tensor) -> tuple[Tensor, Tensor]:
        return merged(images), torch.full((len(images),), fraction)

    onnx = of_module(merged, image_shape(model))["onnx"]
    return Entry(name, budget, classify, engines={"onnx": onnx})


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
                found.append(Entry(name, budget, by_policy(model, EvenExits(model.backbone, threshold, keep=keep))))
        return found

    return entries


def _elastic_for_all_epochs(base: Recipe) -> Recipe:
    """Random decisions and no controllers, for as long as everybody adapts."""
    alone = one_stage("elastic")(base)
    keep = next((stage.keep for stage in base.stages if stage.kind == "elastic"), alone.stages[0].keep)
    return replace(alone, stages=(replace(alone.stages[0], keep=keep),), mixup=base.mixup, cutmix=base.cutmix)


LEARNED = Method("learned", "ours, with static and random on its weights", adapting, _learned)

BASELINES: dict[str, Method] = {
    method.name: method
    for method in (
        DENSE,
        INT8,
        RESOLUTION,
        RESOLUTION_FREE,
        RESOLUTION_LOOKS,
        Method(
            "cls-attention",
            "EViT's criterion: tokens by class attention, fine-tuned",
            one_stage("cls-attention"),
            _policy_at("cls-attention", cls_attention_policy),
        ),
        Method(
            "top-tokens",
            "DynamicViT: tokens by trained scorers",
            one_stage("top-tokens"),
            _policy_at("top-tokens", top_tokens_policy),
            prepare=add_scorers,
        ),
        Method(
            "merging",
            "ToMe: similar tokens merged, fine-tuned",
            one_stage("merging"),
            _within_reach(partial(_merging, "merging")),
        ),
        Method("merging-free", "ToMe without training", None, _within_reach(partial(_merging, "merging-free"))),
        Method("exits", "blocks until confident, fine-tuned", one_stage("exits"), _exits("exits", (1.0,))),
        Method(
            "even-exits",
            "a share of the tokens, spread evenly, and blocks until confident: ours without controllers",
            _elastic_for_all_epochs,
            _exits("even-exits", EVEN_SHARES),
        ),
        *SHALLOW,
    )
}

METHODS: dict[str, Method] = {LEARNED.name: LEARNED, **BASELINES, **ABLATIONS}
