"""--latency FILE --budget-ms MS, of commands that run a model: from milliseconds to the price that brings them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miaformer.evaluation.latency import LatencyCalibration, LatencyTable
    from miaformer.model.model import MIAFormer


@dataclass(frozen=True)
class MsBudget:
    """A mean time asked for, and what it comes to."""

    asked_ms: float
    price: float
    macs_fraction: float  # on the calibration images
    table: LatencyTable


def add_budget_ms(parser: argparse.ArgumentParser, several: bool = False) -> None:
    parser.add_argument(
        "--budget-ms",
        type=float,
        metavar="MS",
        nargs="+" if several else None,
        help="mean milliseconds per image, predicted by the table of --latency",
    )
    parser.add_argument("--latency", metavar="FILE", help="table that `miaformer profile --data` wrote on this machine")


def open_budgets_ms(
    asked_ms: list[float], latency: str | None, model: MIAFormer, batch_size: int | None = None
) -> list[MsBudget]:
    """What the budgets in ms come to.

    Raises ValueError where there is no table, one of another model, device, dtype, number of threads or batch size
    (None: any will do), one without calibration, and for budgets out of reach.
    """
    from miaformer.evaluation.latency_files import read_latency

    if latency is None:
        raise ValueError("--budget-ms needs a measured table: add --latency FILE, which `miaformer profile` writes")
    found = read_latency(latency)
    try:
        found.table.check_fits(model)
    except ValueError as error:
        raise ValueError(f"{latency}: {error}") from error
    if batch_size is not None and batch_size != found.table.batch_size:
        raise ValueError(
            f"{latency} was measured with batches of {found.table.batch_size}: add --batch-size "
            f"{found.table.batch_size}, or measure it with --batch-size {batch_size}"
        )
    calibration: LatencyCalibration | None = found.calibration
    if calibration is None:
        raise ValueError(f"{latency} holds no budgets in ms: measure it with `miaformer profile --data`")
    budgets = []
    for ms in asked_ms:
        price = calibration.price(ms)
        budgets.append(MsBudget(ms, price, calibration.macs_fraction(price), found.table))
    return budgets
