"""What else adapts a ViT to a budget, on our engine or beside it, so that one harness trains and measures them all.

`tokens`: the best tokens by trained scorers (DynamicViT) or class attention (EViT). `exits`: leaving when confident.
`merging`: token merging (ToMe). Smaller images are `miaformer.model.resolution`. Each file says how its baseline is
trained too: `OBJECTIVES` are those of stages of these kinds.
`miaformer.lab.comparison.methods` says how each is asked for a budget.
"""

from miaformer.lab.baselines.exits import ExitsObjective
from miaformer.lab.baselines.merging import MergingObjective
from miaformer.lab.baselines.tokens import ClsAttentionObjective, TopTokensObjective
from miaformer.training.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "exits": ExitsObjective,
    "cls-attention": ClsAttentionObjective,
    "top-tokens": TopTokensObjective,
    "merging": MergingObjective,
}
