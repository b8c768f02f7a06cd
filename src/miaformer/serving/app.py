"""The HTTP interface: POST /predict, /embed and /explain, GET /health and /metrics, and a page to play with at /.

Every error is JSON, {"detail": "..."}: 4xx for what a client can mend, 503 with Retry-After where the server is busy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

import miaformer
from miaformer.prediction.predictor import Predictor
from miaformer.serving.model_process import ModelProcess
from miaformer.serving.schema import EmbedReply, Health, PredictReply, Problem, body_of_pictures
from miaformer.serving.server import Server
from miaformer.serving.settings import Settings

PAGE = Path(__file__).parent / "page.html"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "Not a picture, or a damaged one"},
    408: {"model": Problem, "description": "The request did not arrive in time"},
    413: {"model": Problem, "description": "Too many bytes or pixels"},
    415: {"model": Problem, "description": "Neither a picture's bytes nor a form of files"},
    422: {"model": Problem, "description": "A budget, cap or top_k that cannot be"},
    503: {"model": Problem, "description": "Busy: Retry-After says in how many seconds to ask again"},
}

Budget = Annotated[float | None, Query(description="mean MACs, as a fraction of the dense model's")]
Cap = Annotated[float | None, Query(description="the most MACs that one picture may take, a fraction: hard")]
TopK = Annotated[int, Query(description="classes to name")]


class _Direct(APIRoute):
    """Hands requests over as they are. Their parameters are declared for the API page alone: for FastAPI to take them
    apart cost a fifth of a request's time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


class _Shortcut:
    """Middleware: answers what most requests ask for before FastAPI looks at it, whose routing and clearing up took
    another third. Its routes give the same answer, and do where the application is mounted below another path.
    """

    def __init__(self, app: ASGIApp, path: str, answer: Callable[[Request], Awaitable[Response]]) -> None:
        self._app, self._path, self._answer = app, path, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._path and scope["method"] == "POST":
            response = await self._answer(Request(scope, receive, send))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def create_app(
    predictor: Predictor, settings: Settings, name: str = "model", process: ModelProcess | None = None
) -> FastAPI:
    """The application, for any ASGI server. Measures a few batches first, so that it knows how long they take.

    name: of the model, as /health and /metrics say it. process: runs the model, instead of a thread here; what the
    predictor is asked for then needs no weights. Raises ValueError for settings that the model cannot meet.
    """
    server = Server(predictor, settings.for_model(predictor), name, process)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await server.close()

    app = FastAPIOffline(  # its API pages need no network
        title="MIA-Former",
        version=miaformer.__version__,
        summary="Classifies pictures, each by its own compute.",
        lifespan=lifespan,
    )
    app.state.server = server

    async def predict(request: Request, budget: Budget = None, cap: Cap = None, top_k: TopK = 5) -> Response:
        """Classify pictures. Under load they may get less than `budget`: each says what it got and took."""
        return await server.handle(request, server.predict(request))

    async def embed(request: Request, budget: Budget = None, cap: Cap = None) -> Response:
        """Features of pictures: what the classifier reads, or would read. Under load as `predict`."""
        return await server.handle(request, server.embed(request))

    async def explain(
        request: Request, budget: Annotated[list[float] | None, Query()] = None, cap: Cap = None, top_k: TopK = 5
    ) -> Response:
        """What one picture is given at several budgets, block by block, and what that took in time."""
        return await server.handle(request, server.explain(request))

    app.add_middleware(_Shortcut, path="/predict", answer=predict)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether it works, what is served, and what a picture is given now."""
        found = server.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, answer in (("/health", health), ("/metrics", metrics)):  # load balancers ask so
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    takes_pictures = partial(
        app.router.add_api_route, methods=["POST"], route_class_override=_Direct, openapi_extra=body_of_pictures()
    )
    takes_pictures("/predict", predict, responses={**_PROBLEMS, 200: {"model": PredictReply}})
    takes_pictures("/embed", embed, responses={**_PROBLEMS, 200: {"model": EmbedReply}})
    if settings.page and predictor.model.num_classes:
        page = PAGE.read_text(encoding="utf-8")
        takes_pictures("/explain", explain, responses=_PROBLEMS)

        @app.get("/", include_in_schema=False)
        async def play() -> Response:
            return HTMLResponse(page, headers=_PAGE_HEADERS)

    return app
