"""What the page at / asks for: one picture at several budgets, block by block, with the time that each took."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from miaformer.data.images import open_image
from miaformer.prediction.explanation import Explanation, explain, seen_picture
from miaformer.prediction.predictor import Predictor
from miaformer.reports.page import data_uri
from miaformer.serving.batcher import Asked, Batcher, least

T = TypeVar("T")

STEPS = 13  # budgets, where none are asked for
REPEATS = 5  # of which the median counts, after one that does not
ENOUGH_SECONDS = 0.1  # who takes longer is run less often


async def explained(
    batcher: Batcher, decoders: Executor, name: str, encoded: bytes, budgets: Sequence[float], asked: Asked
) -> dict[str, Any]:
    """{"picture": data URI of what the model saw, "dense": {top_k, ms}, "steps": [explanation with ms, ...]}.

    Each budget is a piece of work of its own in the model's queue, so that nobody waits long for it.
    """
    predictor = batcher.predictor
    chosen = budgets or _all_budgets(predictor)
    with batcher.room(1):  # one piece of it waits at a time
        loop = asyncio.get_running_loop()
        most = batcher.settings.max_pixels
        image, picture = await loop.run_in_executor(decoders, _prepared, predictor, encoded, name, most)
        cap = least(asked.cap, batcher.settings.cap)
        dense, ms = await batcher.call(_timed, _dense, image, asked.top_k)
        steps = []
        for budget in chosen:
            explanation, step_ms = await batcher.call(_timed, _explained, image, budget, cap, asked.top_k)
            steps.append({**explanation.to_json(), "ms": step_ms})
    return {"name": name, "picture": picture, "dense": {"top_k": dense, "ms": ms}, "steps": steps}


def _all_budgets(predictor: Predictor) -> list[float | None]:
    calibration = predictor.model.calibration
    if calibration is None:
        return [None]
    least, most = calibration.range
    return [least + (most - least) * step / (STEPS - 1) for step in range(STEPS)]


def _prepared(predictor: Predictor, encoded: bytes, name: str, max_pixels: int) -> tuple[Tensor, str]:
    """A picture as the model takes it, and as a person sees that."""
    picture = open_image(encoded, name, max_pixels)
    return predictor.prepare_picture(picture), data_uri(seen_picture(predictor, picture))


def _dense(predictor: Predictor, image: Tensor, top_k: int) -> list[dict[str, Any]]:
    """What the backbone says."""
    return [guess.to_json() for guess in predictor.guesses(predictor.dense(image[None]), top_k)[0]]


def _explained(predictor: Predictor, image: Tensor, budget: float | None, cap: float | None, top_k: int) -> Explanation:
    return explain(predictor, image[None], budget, cap, top_k)[0]


def _timed(predictor: Predictor, function: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """What it gives of the predictor, and its ms."""
    work = partial(function, predictor, *arguments)
    work()  # what ran before, in other batches, has pushed this one's weights out of the caches
    taken: list[float] = []
    while True:
        start = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - start)
        if len(taken) == REPEATS or sum(taken) > ENOUGH_SECONDS:
            return found, 1000 * statistics.median(taken)
