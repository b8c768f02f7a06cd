"""How good is it: calibration, accuracy per compute against controls of equal cost, time.

`calibration` makes the table of budgets; `evaluate` compares policies at equal compute, which `contenders` and
`controls` make; `on_data` does both for a data set, as `miaformer eval` and `bench` do. `bench` and `timing`: time
against the dense model; `drawn`: decisions drawn at random, for models that have none.
"""

from miaformer.evaluation.calibration import calibrate
from miaformer.evaluation.contenders import POLICIES, Contender, LeftOut, contenders, static_decisions
from miaformer.evaluation.controls import (
    KeepRates,
    Simulation,
    cls_attention_policy,
    macs_of,
    random_policy,
    static_policy,
)
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.evaluate import compare, evaluate, spearman
from miaformer.evaluation.on_data import bench_data, evaluate_data, ordered_batches
from miaformer.evaluation.timing import time_against_dense

__all__ = [
    "POLICIES",
    "Contender",
    "KeepRates",
    "LeftOut",
    "Simulation",
    "bench_data",
    "calibrate",
    "cls_attention_policy",
    "compare",
    "contenders",
    "describe_environment",
    "evaluate",
    "evaluate_data",
    "macs_of",
    "ordered_batches",
    "random_policy",
    "spearman",
    "static_decisions",
    "static_policy",
    "time_against_dense",
]
