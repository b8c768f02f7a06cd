"""What happens to a request, from its arrival to its answer or refusal."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from torch import Tensor

import miaformer
from miaformer.data.images import ImageError, TooManyPixelsError
from miaformer.model.budget import check_fraction
from miaformer.prediction.predictor import Predictor
from miaformer.serving.batcher import Answer, Asked, Batcher, BusyError
from miaformer.serving.metrics import Metrics
from miaformer.serving.model_process import ModelProcess
from miaformer.serving.playground import explained
from miaformer.serving.settings import Settings
from miaformer.serving.uploads import LastWord, Upload, Uploads

T = TypeVar("T")
Number = TypeVar("Number", int, float)

SMALL_BYTES, SMALL_PIXELS = 16_384, 128 * 128
SIZE_FIRST = (b"\x89PNG", b"\xff\xd8\xff")  # formats that say their size before anything is decoded, as icons do not
CLIENT_LEFT = 499  # as nginx counts those who hang up before their answer
_log = logging.getLogger(__name__)


class Server:
    """One model, its queue, and everything that is counted of it."""

    def __init__(
        self, predictor: Predictor, settings: Settings, name: str, process: ModelProcess | None = None
    ) -> None:
        self.predictor, self.settings, self.name = predictor, settings, name
        self.metrics = Metrics()
        self.metrics.serves(model=name, version=miaformer.__version__)
        self.batcher = Batcher(predictor, settings, self.metrics, process)
        self._uploads = Uploads(settings)
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decoder")

    def start(self) -> None:
        self.batcher.start()

    async def close(self) -> None:
        """Answer everybody who was admitted, then stop."""
        await self.batcher.close()
        self._decoders.shutdown()

    # What is asked ----------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> dict[str, Any]:
        """The answer to POST /predict, but for its time."""
        if not self.predictor.model.num_classes:
            raise HTTPException(422, "the model has no classifier: POST /embed gives features")
        return {"predictions": await self._answers(request, embed=False)}

    async def embed(self, request: Request) -> dict[str, Any]:
        """The answer to POST /embed, but for its time."""
        return {"embeddings": await self._answers(request, embed=True)}

    async def _answers(self, request: Request, embed: bool) -> list[dict[str, Any]]:
        """What is said of each picture of a request."""
        self.batcher.check_room(1)  # before anything is read
        asked = replace(self._asked(request.query_params), embed=embed)
        with ExitStack() as admitted:
            async with self._uploads.of(request) as upload:
                if upload.fields:
                    asked = replace(self._asked({**request.query_params, **upload.fields}), embed=embed)
                names = [name for name, _ in upload.pictures]
                place = admitted.enter_context(self.batcher.room(len(names)))
                images = await self._decode(upload)
                upload.pictures.clear()
            answers = await self._waited_for(request, asyncio.gather(*self.batcher.submit(images, asked, place)))
        for answer in answers:
            self.metrics.spent(answer.found.macs_fraction, answer.budget, answer.lowered)
        return [_said(name, answer) for name, answer in zip(names, answers, strict=True)]

    async def explain(self, request: Request) -> dict[str, Any]:
        """The answer to POST /explain, but for its time."""
        self.batcher.check_room(1)
        query = request.query_params
        budgets = [self._budget(text) for text in query.getlist("budget")]
        async with self._uploads.of(request) as upload:
            asked = self._asked({**query, **upload.fields})
            if len(upload.pictures) > 1:
                raise HTTPException(400, "one picture at a time is explained")
            if "budget" in upload.fields:
                budgets = [self._budget(upload.fields["budget"])]
            name, encoded = upload.pictures[0]
            work = asyncio.ensure_future(explained(self.batcher, self._decoders, name, encoded, budgets, asked))
            return await self._waited_for(request, work)

    def health(self) -> dict[str, Any]:
        model, settings = self.predictor.model, self.settings
        plan = self.batcher.plan()
        return {
            "status": self.batcher.trouble or "ok",
            "model": self.name,
            "version": miaformer.__version__,
            "classes": model.num_classes,
            "image_size": model.image_size(),
            "blocks": len(model.backbone.blocks),
            "heads": model.cost().num_heads,
            "budget": settings.budget,
            "min_budget": settings.min_budget,
            "p95_ms": settings.p95_ms,
            "queue": self.batcher.admitted,
            "serving_budget": plan.budget,
        }

    # How it is answered -----------------------------------------------------------------------------------------

    async def handle(self, request: Request, work: Awaitable[dict[str, Any]]) -> Response:
        """The response to a request whose answer is `work`, whatever becomes of it."""
        start = time.perf_counter()
        try:
            content = await work
        except Exception as error:
            problem = _problem(error)
            self.metrics.answered(request.url.path, problem.status_code, time.perf_counter() - start)
            kind = LastWord if "Connection" in (problem.headers or {}) else JSONResponse
            return kind({"detail": problem.detail}, problem.status_code, problem.headers)
        seconds = time.perf_counter() - start
        self.metrics.answered(request.url.path, 200, seconds)
        return JSONResponse({**content, "ms": round(1000 * seconds, 3)})

    def _asked(self, fields: Mapping[str, str]) -> Asked:
        """Of the query, and of a form's fields, which go before. Raises HTTPException 422."""
        top_k = _number(int, "top_k", fields["top_k"]) if "top_k" in fields else Asked.top_k
        if top_k < 1:
            raise HTTPException(422, f"top_k={top_k} must be at least 1")
        budget = self._budget(fields["budget"]) if "budget" in fields else None
        return Asked(budget, self._cap(fields["cap"]) if "cap" in fields else None, top_k)

    def _budget(self, text: str) -> float:
        budget = _number(float, "budget", text)
        with _unprocessable():
            self.predictor.model.check_budget(check_fraction("budget", budget))
        return budget

    def _cap(self, text: str) -> float:
        cap = _number(float, "cap", text)
        with _unprocessable():
            self.predictor.model.check_cap(cap)
        return cap

    async def _decode(self, upload: Upload) -> list[Tensor]:
        """Small pictures that come alone here and now: to tell another thread of them would take longer."""
        loop, most = asyncio.get_running_loop(), self.settings.max_pixels
        name, encoded = upload.pictures[0]
        if len(upload.pictures) == 1 and len(encoded) <= SMALL_BYTES and encoded.startswith(SIZE_FIRST):
            with suppress(TooManyPixelsError):
                return [self.predictor.pixels(encoded, name, min(SMALL_PIXELS, most))]
        return await asyncio.gather(
            *(
                loop.run_in_executor(self._decoders, self.predictor.pixels, encoded, name, most)
                for name, encoded in upload.pictures
            )
        )

    async def _waited_for(self, request: Request, work: asyncio.Future[T]) -> T:
        """What becomes of it, for as long as the client waits."""
        gone = asyncio.create_task(_left(request))
        patience = self.settings.answer_seconds
        try:
            await asyncio.wait((work, gone), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise HTTPException(CLIENT_LEFT, "the client left")
            raise BusyError(patience)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)


def _problem(error: Exception) -> HTTPException:
    """What a client is told of what went wrong."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, BusyError):
        return HTTPException(503, str(error), {"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, ImageError):
        return HTTPException(413 if isinstance(error, TooManyPixelsError) else 400, str(error))
    _log.error("a request failed", exc_info=error)
    return HTTPException(500, "this should not have happened; the server's log says more")


async def _left(request: Request) -> None:
    """Returns when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _number(kind: type[Number], name: str, text: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise HTTPException(422, f"{name}={text!r} is not a {'whole ' if kind is int else ''}number") from None


@contextmanager
def _unprocessable() -> Iterator[None]:
    """A ValueError is what the client asked for."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def _said(name: str, answer: Answer) -> dict[str, Any]:
    return {"picture": name, **answer.found.to_json(), "budget": answer.budget, "lowered": answer.lowered}
