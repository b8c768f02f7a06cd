"""Milliseconds of each entry beside the dense backbone, both on their fastest engine, at batch 1 and 32.

What is timed lies in a run's `timed.json`, `times` in the order of the points of `measured.json`: for each batch size
`ms`, `dense_ms`, their `fraction` (medians of the ratios of calls made one after the other), `engine` and
`dense_engine`, and the milliseconds of all `engines` and `dense_engines`. Older files hold one time, at `batch` 64,
our engine beside eager PyTorch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miaformer.data import LabelledBatch
from miaformer.evaluation.timing import Race
from miaformer.export.engines import EngineUnavailableError
from miaformer.lab.comparison.engines import Call, of_module
from miaformer.lab.comparison.method import Entry

BATCHES = {1: 24, 32: 2}  # batch size: how many different batches of test pictures are timed
SWEEPS = 5  # over all of them
AGREEMENT = 1e-2  # of the logits' scale: an engine that computes something else is not timed
MOST_ODD = 0.1  # of the images: a decision may be so close that rounding turns it

Times = dict[str, dict[str, Any]]  # by batch size, as JSON has it: a string


def timed_pictures(batches: Iterable[LabelledBatch], device: torch.device) -> Tensor:
    """As many images as are timed, or all there are."""
    most, found = max(size * count for size, count in BATCHES.items()), []
    for batch in batches:
        found.append(batch.images)
        if sum(map(len, found)) >= most:
            break
    return torch.cat(found)[:most].to(device)


@torch.inference_mode()
def time_entries(backbone: nn.Module, entries: Sequence[Entry], pictures: Tensor) -> list[Times]:
    """Of each entry, by batch size; sizes that the pictures do not fill are left out."""
    shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
    dense, times = of_module(backbone, shape), [Times() for _ in entries]
    for size, count in BATCHES.items():
        batches = [batch for batch in pictures.split(size)[:count] if len(batch) == size]
        if not batches:
            continue
        dense_calls, _ = _agreeing(dense, backbone, batches[0])
        for entry, found in zip(entries, times, strict=True):
            own = [entry.read(batch) for batch in batches]
            others, left_out = _agreeing(entry.engines, entry.run, own[0])
            calls = {entry.engine: entry.run, **others}
            found[str(size)] = {**_raced(dense_calls, calls, list(zip(batches, own, strict=True))), **left_out}
    return times


def _agreeing(engines: Mapping[str, Call], reference: Call, images: Tensor) -> tuple[dict[str, Call], dict[str, Any]]:
    """Those that run here and give the logits of the reference, and `left_out`: why others do not."""
    wanted = reference(images)
    calls, reasons = {}, {}
    for name, call in engines.items():
        try:
            odd = (call(images) - wanted).abs().amax(dim=1) > AGREEMENT * wanted.abs().max()
        except EngineUnavailableError as error:
            reasons[name] = str(error)
            continue
        if odd.double().mean() > MOST_ODD:
            reasons[name] = "it gives other logits"
        else:
            calls[name] = call
    return calls, {"left_out": reasons} if reasons else {}


def _raced(
    dense: Mapping[str, Call], own: Mapping[str, Call], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """All engines in turn. batches: as the backbone takes them, and as the entry does.

    Calls of one image are rehearsed: what is left in caches is worth milliseconds.
    """
    calls = [lambda both, call=call: call(both[0]) for call in dense.values()]
    calls += [lambda both, call=call: call(both[1]) for call in own.values()]
    for call in calls:  # which warms up
        call(batches[0])
    race = Race(calls, batches, rehearse=len(batches[0][0]) == 1)
    for _ in range(SWEEPS):
        race.sweep()
    dense_ms = {name: race.ms(place) for place, name in enumerate(dense)}
    own_ms = {name: race.ms(place) for place, name in enumerate(own, start=len(dense))}
    best_dense, best = min(dense_ms, key=lambda name: dense_ms[name]), min(own_ms, key=lambda name: own_ms[name])
    return {
        "ms": own_ms[best],
        "dense_ms": dense_ms[best_dense],
        "fraction": race.fraction(len(dense) + list(own).index(best), list(dense).index(best_dense)),
        "engine": best,
        "dense_engine": best_dense,
        "engines": own_ms,
        "dense_engines": dense_ms,
        "batches": len(batches),
        "sweeps": SWEEPS,
    }


def read_times(directory: Path, points: int) -> list[Times]:
    """Of a run's points, whichever form its file has; nothing of what has not been timed."""
    path = directory / "timed.json"
    if not path.exists():
        return [{} for _ in range(points)]
    report = json.loads(path.read_text())
    if "batch" not in report:
        return [Times(times) for times in report["times"]]
    engines = {"engine": "eager", "dense_engine": "eager"}
    return [{} if time is None else {str(report["batch"]): {**time, **engines}} for time in report["times"]]


def mean_times(seeds: Sequence[Times]) -> Times:
    """Over the seeds that were timed; engines as the first has them."""
    found: Times = {}
    for size in dict.fromkeys(size for times in seeds for size in times):
        timed = [times[size] for times in seeds if size in times]
        means = {name: sum(one[name] for one in timed) / len(timed) for name in ("ms", "dense_ms", "fraction")}
        found[size] = {**means, "engine": timed[0]["engine"], "dense_engine": timed[0]["dense_engine"]}
    return found
