"""Rows of everything on a Ray cluster: workers make those of stretches of it, one process keeps them.

Needs the extra `ray`. Workers open the files themselves, under the names that this process sees: on several machines
they must lie on a disk that all have. What a worker did not finish when it died is done again by another.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from miaformer.prediction.classify import RowMaker
from miaformer.prediction.entries import Entry, Position, Source
from miaformer.prediction.sources import Inputs
from miaformer.prediction.unfinished import UnfinishedRun

STRETCH = 8  # batches: what is done again where a worker dies, and what Ray's own work for each is shared by


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A block with Ray: the cluster at an address, one started here, or the one that this process already uses."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class Stretch:
    """Some of the inputs, for a worker that knows nothing of the rest."""

    sources: Sequence[Source]
    place: int  # of the first of them, among all
    skip: int  # so many entries of the first
    count: int | None  # entries; None: all that there are

    def entries(self) -> Iterator[tuple[Position, Entry]]:
        """With the position after each, among all inputs."""
        found = islice(Inputs(self.sources).entries(Position(0, self.skip)), self.count)
        for (sources, entries), entry in found:
            yield Position(self.place + sources, entries), entry


def stretches(inputs: Inputs, start: Position, size: int) -> Iterator[Stretch]:
    """Everything after a position, in order, so many entries each or fewer.

    A source that holds unknown many, as a tar archive does, is one stretch.
    """
    place, skip, held = start.sources, start.entries, 0  # where the stretch begins, and how many it has
    for here in range(start.sources, len(inputs.sources)):
        begin = start.entries if here == start.sources else 0
        total = inputs.sources[here].count
        while total is not None and held + total - begin >= size:
            yield Stretch(inputs.sources[place : here + 1], place, skip, size)
            begin += size - held
            place, skip, held = here, begin, 0
        if total is not None:
            held += total - begin
            continue
        if held:
            yield Stretch(inputs.sources[place:here], place, skip, held)
        yield Stretch(inputs.sources[here : here + 1], here, begin, None)
        place, skip, held = here + 1, 0, 0
    if held:
        yield Stretch(inputs.sources[place:], place, skip, held)


def predict_on_ray(
    inputs: Inputs,
    make_rows: Callable[[], RowMaker],
    run: UnfinishedRun,
    batch_size: int,
    workers: int,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> None:
    """`run.predict` by so many workers, each with a maker of rows of its own. cpus, gpus: that Ray sets aside for each.

    address: of a cluster; None starts one on this machine. Rows come in the order of the inputs.

    Raises RuntimeError where a worker fails by itself: dying is not failing.
    """
    on_rows(run.tally.rows)
    work = [{"stretch": pickle.dumps(part)} for part in stretches(inputs, run.position, STRETCH * batch_size)]
    if work:
        with cluster(address):
            import ray

            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.execution_options.preserve_order = True
            found = ray.data.from_items(work, override_num_blocks=len(work)).flat_map(
                _Worker,
                fn_constructor_args=(make_rows, batch_size),
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=cpus,
                num_gpus=gpus,
            )
            try:
                for batch in found.iter_rows():
                    on_rows(run.add(json.loads(batch["rows"]), Position(batch["sources"], batch["entries"])))
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"a worker failed: {error.__cause__ or error}") from error
    run.finish()


class _Worker:
    """Reads, decodes and makes the rows of stretches; in a process of its own."""

    def __init__(self, make_rows: Callable[[], RowMaker], batch_size: int) -> None:
        self._maker, self._batch_size = make_rows(), batch_size
        self._decoders = ThreadPoolExecutor(2)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        entries = pickle.loads(row["stretch"]).entries()
        while batch := list(islice(entries, self._batch_size)):
            found = [entry for _, entry in batch]
            rows = self._maker.rows(found, list(self._decoders.map(self._maker.prepare, found)))
            sources, entry = batch[-1][0]
            yield {"rows": json.dumps(rows), "sources": sources, "entries": entry}
