"""The queue: pictures of different requests, each with its own budget and cap, run together in packed batches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from miaformer.model.policy import Full
from miaformer.prediction.predictor import Embedding, Prediction, Predictor
from miaformer.serving.governor import Governor, Plan, ServiceTime
from miaformer.serving.model_process import ModelDiedError, ModelProcess
from miaformer.serving.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from miaformer.serving.metrics import Metrics
T = TypeVar("T")

LEAD_SECONDS = 0.015  # before a batch should end, the next one is sent on its way
RESTART_SECONDS = 10.0  # in which a model's process is started again
WARM_UPS = 3  # the first of which prepares kernels; the last is what counts


@dataclass(frozen=True)
class Asked:
    """What a request wants for each of its pictures."""

    budget: float | None = None
    cap: float | None = None
    top_k: int = 5
    embed: bool = False  # features, not classes


@dataclass(frozen=True)
class Answer:
    found: Prediction | Embedding
    budget: float | None  # that it was given
    lowered: bool  # given less than was asked, for load


class BusyError(Exception):
    """Too much waits. retry_after: seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the server is busy")
        self.retry_after = retry_after


@dataclass(eq=False)
class Place:
    """A request's, from when it is admitted to its last answer."""

    since: float  # seconds, of a clock
    coming: int  # pictures that are not in the queue yet


@dataclass(eq=False)
class _Picture:
    image: Tensor  # pixels (3, H, W) uint8
    asked: Asked
    wanted: float | None  # budget, where nothing else waits; None: there are none
    cap: float | None


@dataclass(eq=False)
class _Waiting(_Picture):
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Runs what waits, batch after batch: while one runs, the next one gathers.

    Everything but the model's work happens in the event loop. That work is done in one thread, or by `process` where
    one is given, with a model like the predictor's.
    """

    def __init__(
        self, predictor: Predictor, settings: Settings, metrics: Metrics, process: ModelProcess | None = None
    ) -> None:
        self.predictor, self.settings, self._metrics, self._process = predictor, settings, metrics, process
        bounds = None
        if settings.budget is not None and settings.min_budget is not None:
            bounds = settings.budget, settings.min_budget
        # Two threads where they only talk to a process: one batch is on its way there while another runs.
        self._model_threads = ThreadPoolExecutor(1 if process is None else 2, thread_name_prefix="model")
        time_taken = ServiceTime(self._model_threads.submit(lambda: list(self._measured())).result())
        objective = settings.p95_ms / 1000
        self.governor = Governor(time_taken, objective, bounds, settings.max_batch, settings.max_queue)
        self.admitted = 0  # pictures
        self._coming = 0  # of which so many are not in the queue yet
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self._model = asyncio.Lock()  # what runs next is chosen once it is free: who left by then is not run
        self._free_at = 0.0  # when what runs should end
        self._freed_at = 0.0  # when what ran last had ended
        self._task: asyncio.Task[None] | None = None

    # What requests do -------------------------------------------------------------------------------------------

    def check_room(self, pictures: int) -> None:
        """Raises BusyError where so many more would be answered too late."""
        waiting, oldest, busy = self._load()
        retry_after = self.governor.retry_after(waiting, pictures, oldest, busy)
        if retry_after is not None:
            raise BusyError(retry_after)

    @contextmanager
    def room(self, pictures: int) -> Iterator[Place]:
        """Room for the pictures of one request, until its last answer. Raises BusyError where there is none."""
        self.check_room(pictures)
        place = Place(time.perf_counter(), pictures)
        self._count(pictures, pictures)
        try:
            yield place
        finally:
            self._count(-pictures, -place.coming)

    def plan(self) -> Plan:
        """For a batch that would run now."""
        return self.governor.plan(*self._load())

    def submit(self, images: Sequence[Tensor], asked: Asked, place: Place) -> list[asyncio.Future[Answer]]:
        """Answers to come, of pixels (3, H, W) uint8. One that is cancelled before its batch is not run."""
        wanted = None if self.settings.budget is None else least(asked.budget, self.settings.budget)
        cap = least(asked.cap, self.settings.cap)
        loop = asyncio.get_running_loop()
        entries = [_Waiting(image, asked, wanted, cap, place.since, loop.create_future()) for image in images]
        self._count(0, -len(images))
        place.coming -= len(images)
        self._queue.extend(entries)
        self._filled.set()
        return [entry.answer for entry in entries]

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(predictor, *arguments)` where the model is, between two batches.

        Raises BusyError if its process ends meanwhile.
        """
        async with self._model:
            try:
                return await self._of_model(work, *arguments)
            finally:
                self._freed_at = time.perf_counter()

    # What runs them ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._task = asyncio.create_task(self._serve())

    @property
    def trouble(self) -> str | None:
        """What is wrong, if anything is."""
        if self._task is None or self._task.done():
            return "the model's queue has stopped"
        return None if self._process is None else self._process.trouble

    async def close(self) -> None:
        """Answer all that was admitted, then stop."""
        while self.admitted:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._model_threads.shutdown()
        if self._process is not None:
            self._process.close()

    async def _serve(self) -> None:
        before: asyncio.Task[None] | None = None
        while True:
            await self._filled.wait()
            async with self._model:
                batch, plan = self._next_batch()
                if not batch:
                    self._filled.clear()
                    continue
                granted = [least(entry.wanted, plan.budget) for entry in batch]
                expected = self.governor.time.of(len(batch), _mean(granted))
                running = asyncio.create_task(self._answer(batch, granted))
                if before is not None:
                    self._free_at += expected
                    await before
                before = await self._almost_done(running, expected)

    async def _almost_done(self, running: asyncio.Task[None], expected: float) -> asyncio.Task[None] | None:
        """Wait until the next batch had better be on its way. Gives back the task if it still runs then."""
        self._free_at = time.perf_counter() + expected
        await asyncio.wait({running}, timeout=None if self._process is None else max(0.0, expected - LEAD_SECONDS))
        if not running.done():
            return running
        running.result()
        return None

    async def _answer(self, batch: Sequence[_Waiting], granted: Sequence[float | None]) -> None:
        sent, ready = time.perf_counter(), self.trouble is None
        try:
            found, seconds = await self._of_model(*self._work(batch, granted))
        except Exception as error:
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
            return
        finally:
            begun, self._freed_at = max(sent, self._freed_at), time.perf_counter()
        if ready:  # else it may have waited for the model to be loaded again
            self.governor.time.add(len(batch), _total(granted), self._freed_at - begun)  # with all that went with it
        self._metrics.batch_ran(len(batch), seconds)
        for entry, one, budget in zip(batch, found, granted, strict=True):
            if not entry.answer.done():
                lowered = budget is not None and entry.wanted is not None and budget < entry.wanted
                entry.answer.set_result(Answer(one, budget, lowered))

    async def _of_model(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._model_threads, self._run, work, *arguments)
        except ModelDiedError:
            raise BusyError(RESTART_SECONDS) from None

    def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        return work(self.predictor, *arguments) if self._process is None else self._process(work, *arguments)

    def _next_batch(self) -> tuple[list[_Waiting], Plan]:
        """What runs next, first come, first served, until one is of another kind: the model takes one call for all."""
        plan = self.plan()
        batch: list[_Waiting] = []
        while self._queue and len(batch) < plan.pictures:
            if self._queue[0].answer.done():  # its client went away
                self._queue.popleft()
            elif batch and _kind(self._queue[0]) != _kind(batch[0]):
                break
            else:
                batch.append(self._queue.popleft())
        return batch, plan

    def _work(self, batch: Sequence[_Picture], granted: Sequence[float | None]) -> tuple[Any, ...]:
        """The call that answers a batch. Of budgets and of caps either none is None, or all."""
        spend: dict[str, Any] = {"policy": Full()} if self.settings.static else {}
        if granted[0] is not None:
            spend["budget"] = granted
        if batch[0].cap is not None:
            spend["cap"] = [entry.cap for entry in batch]
        images = torch.stack([entry.image for entry in batch])
        if batch[0].asked.embed:
            return _embeddings, images, spend
        return _predictions, images, spend, [entry.asked.top_k for entry in batch]

    def _measured(self) -> Iterator[tuple[int, float, float]]:
        """What a few batches of noise take: where the governor starts from."""
        generator = torch.Generator().manual_seed(0)
        size = (self.predictor.model.backbone.in_chans, *self.predictor.model.image_size())
        asked = Asked(embed=not self.predictor.model.num_classes)
        for pictures in sorted({1, min(8, self.settings.max_batch)}):
            noise = torch.randint(256, (pictures, *size), dtype=torch.uint8, generator=generator)
            for budget in dict.fromkeys((self.settings.budget, self.settings.min_budget)):
                batch = [_Picture(image, asked, budget, self.settings.cap) for image in noise]
                for _ in range(WARM_UPS):
                    _, seconds = self._run(*self._work(batch, [budget] * pictures))
                yield pictures, _total([budget] * pictures), seconds

    def _load(self) -> tuple[int, float, float]:
        """Pictures that wait, seconds since the first came, seconds until the model is free."""
        now = time.perf_counter()
        oldest = now - self._queue[0].since if self._queue else 0.0
        return self._coming + len(self._queue), oldest, max(0.0, self._free_at - now)

    def _count(self, admitted: int, coming: int) -> None:
        self.admitted += admitted
        self._coming += coming
        self._metrics.queue.set(self.admitted)


def _kind(entry: _Picture) -> tuple[bool, bool]:
    """What is the same for all of a batch."""
    return entry.cap is None, entry.asked.embed


def _embeddings(predictor: Predictor, images: Tensor, spend: Mapping[str, Any]) -> tuple[list[Embedding], float]:
    """The features of each, and the seconds it took."""
    start = time.perf_counter()
    found = predictor.embeddings(predictor.embed(images, **spend))
    return found, time.perf_counter() - start


def _predictions(
    predictor: Predictor, images: Tensor, spend: Mapping[str, Any], top_k: Sequence[int]
) -> tuple[list[Prediction], float]:
    """What the model says of each, with so many classes, and the seconds it took."""
    start = time.perf_counter()
    found = predictor.read(predictor.run(images, **spend), max(top_k))
    cut = [replace(one, top_k=one.top_k[:classes]) for one, classes in zip(found, top_k, strict=True)]
    return cut, time.perf_counter() - start


def least(*limits: float | None) -> float | None:
    """The least of those that there are."""
    return min((limit for limit in limits if limit is not None), default=None)


def _mean(budgets: Sequence[float | None]) -> float:
    return _total(budgets) / len(budgets)


def _total(budgets: Sequence[float | None]) -> float:
    return sum(1.0 if budget is None else budget for budget in budgets)
