"""A row of everything: read and decode the next batch while the model runs this one, and keep the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from miaformer.prediction.classify import RowMaker
from miaformer.prediction.entries import Entry, Position, Unreadable
from miaformer.prediction.sources import Inputs
from miaformer.prediction.unfinished import UnfinishedRun

if TYPE_CHECKING:
    from torch import Tensor

_Prepared = tuple[Position, list[Entry], "list[Tensor | Unreadable]"]  # position: after the batch


def predict(
    inputs: Inputs,
    maker: RowMaker,
    run: UnfinishedRun,
    batch_size: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> None:
    """Make the rows that a run does not have yet, and finish it.

    Batches are the same whether it was resumed or not, and so are rows. on_rows: is told how many there are.
    """
    on_rows(run.tally.rows)
    for position, entries, prepared in _ahead(inputs, run.position, maker, batch_size):
        on_rows(run.add(maker.rows(entries, prepared), position))
    run.finish()


def _ahead(inputs: Inputs, start: Position, maker: RowMaker, batch_size: int) -> Iterator[_Prepared]:
    """Batches, prepared. The next one is read in one thread and prepared in others: two at most are in memory."""
    stream = inputs.entries(start)
    reader, workers = ThreadPoolExecutor(1), ThreadPoolExecutor()

    def read() -> list[tuple[Position, Entry, Future[Tensor | Unreadable]]]:
        batch = islice(stream, batch_size)
        return [(position, entry, workers.submit(maker.prepare, entry)) for position, entry in batch]

    try:
        following = reader.submit(read)
        while batch := following.result():
            following = reader.submit(read)
            yield batch[-1][0], [entry for _, entry, _ in batch], [prepared.result() for _, _, prepared in batch]
    finally:
        reader.shutdown(cancel_futures=True)
        workers.shutdown(cancel_futures=True)
