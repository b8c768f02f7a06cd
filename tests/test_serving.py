"""A server answers what the model says, shares batches, gives way under load, and minds its limits."""

from __future__ import annotations

import asyncio
import io
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")

import httpx
from command_line import classifier
from fastapi.testclient import TestClient

from miaformer import load
from miaformer.prediction.predictor import Predictor
from miaformer.serving import Settings, create_app
from miaformer.serving.governor import HEADROOM, ServiceTime


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), format: str = "PNG") -> bytes:
    generator = torch.Generator().manual_seed(seed)
    spread = 1 + 200 * torch.rand((), generator=generator)
    pixels = (torch.rand(*size, 3, generator=generator) * spread).to(torch.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(encoded, format)
    return encoded.getvalue()


@pytest.fixture(scope="module")
def predictor(calibrated: Path) -> Predictor:
    return Predictor(load(calibrated))


def settings(predictor: Predictor, **changes: Any) -> Settings:
    return Settings(**{"p95_ms": 60_000, "page": False, **changes}).for_model(predictor)


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with TestClient(create_app(predictor, settings(predictor))) as client:
        yield client


Ask = Callable[..., Awaitable[httpx.Response]]


def together(app: Any, work: Callable[[Ask], Awaitable[Any]]) -> Any:
    """What `work` gives, in one event loop with the server."""

    async def main() -> Any:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as client,
        ):
            return await work(client.post)

    return asyncio.run(main())


def check_says(said: dict[str, Any], predictor: Predictor, encoded: bytes, top_k: int = 5, **spend: Any) -> None:
    (alone,) = predictor.read(predictor.run([predictor.prepare(encoded)], **spend), top_k)
    assert said["label"] == alone.top_k[0].label
    assert said["class"] == alone.top_k[0].name
    assert [guess["label"] for guess in said["top_k"]] == [guess.label for guess in alone.top_k]
    assert [guess["probability"] for guess in said["top_k"]] == pytest.approx(
        [guess.probability for guess in alone.top_k], abs=1e-5
    )
    assert said["macs_fraction"] == pytest.approx(alone.macs_fraction)
    assert said["tokens_kept"] == pytest.approx(alone.tokens_kept)


# What it answers ------------------------------------------------------------------------------------------------


def test_a_picture_is_the_body(client: TestClient, predictor: Predictor) -> None:
    for content_type in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "image/png"}):
        reply = client.post("/predict", content=picture(), headers=content_type)
        assert reply.status_code == 200
        (said,) = reply.json()["predictions"]
        budget = predictor.model.calibration.range[1]
        check_says(said, predictor, picture(), budget=budget)
        assert said["budget"] == budget
        assert said["lowered"] is False
        assert reply.json()["ms"] > 0


def test_budget_cap_and_top_k_are_asked_in_the_query_or_in_the_form(client: TestClient, predictor: Predictor) -> None:
    asked = {"budget": 0.4, "cap": 0.6, "top_k": 2}
    (said,) = client.post("/predict", content=picture(), params=asked).json()["predictions"]
    check_says(said, predictor, picture(), top_k=2, budget=0.4, cap=0.6)
    form = {name: str(value) for name, value in asked.items()}
    assert client.post("/predict", files={"any": picture()}, data=form).json()["predictions"][0] == {
        **said,
        "picture": "upload",
    }


def test_pictures_of_a_form_are_answered_in_their_order(client: TestClient, predictor: Predictor) -> None:
    files = [("file", (f"{seed}.png", picture(seed))) for seed in range(5)]
    predictions = client.post("/predict", files=files, data={"budget": "0.5"}).json()["predictions"]
    assert [said["picture"] for said in predictions] == [f"{seed}.png" for seed in range(5)]
    for seed, said in enumerate(predictions):
        check_says(said, predictor, picture(seed), budget=0.5)
    assert len({said["macs_fraction"] for said in predictions}) > 1


def test_features_are_those_of_the_predictor(client: TestClient, predictor: Predictor) -> None:
    encoded = [picture(seed) for seed in range(3)]
    files = [("file", (f"{number}.png", one)) for number, one in enumerate(encoded)]
    said = client.post("/embed", files=files, data={"budget": "0.6"}).json()["embeddings"]
    wanted = predictor.embed([predictor.prepare(one) for one in encoded], budget=0.6)
    assert wanted.features is not None
    assert [one["picture"] for one in said] == ["0.png", "1.png", "2.png"]
    assert torch.allclose(torch.tensor([one["features"] for one in said]), wanted.features, atol=1e-5)
    assert [one["macs_fraction"] for one in said] == pytest.approx(wanted.trace.macs_fraction.tolist())
    assert client.post("/embed", content=b"no picture").status_code == 400
    assert client.post("/embed?budget=9", content=encoded[0]).status_code == 422


def test_requests_of_both_kinds_are_answered_apart(predictor: Predictor) -> None:
    """They wait in one queue, and a batch has one kind."""

    async def work(ask: Ask) -> list[httpx.Response]:
        paths = ["/predict", "/embed"] * 4
        return list(await asyncio.gather(*(ask(path, content=picture(seed)) for seed, path in enumerate(paths))))

    replies = together(create_app(predictor, settings(predictor)), work)
    assert [reply.status_code for reply in replies] == [200] * 8
    for place, reply in enumerate(replies):
        assert ("embeddings" if place % 2 else "predictions") in reply.json()


def test_a_model_without_a_classifier_embeds_and_says_that_it_does_not_classify() -> None:
    bare = Predictor(classifier(classes=0))
    with TestClient(create_app(bare, settings(bare, page=True))) as client:
        (said,) = client.post("/embed", content=picture()).json()["embeddings"]
        assert len(said["features"]) == bare.model.num_features
        reply = client.post("/predict", content=picture())
        assert (reply.status_code, "POST /embed" in reply.json()["detail"]) == (422, True)
        assert client.get("/").status_code == client.post("/explain", content=picture()).status_code == 404
        assert client.get("/health").json()["classes"] == 0


def test_the_shortcut_answers_as_the_routes_do(client: TestClient, predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor))
    app.user_middleware.clear()
    asked: list[dict[str, Any]] = [
        {"content": picture(), "params": {"budget": 0.4, "top_k": 2}},
        {"files": {"any": picture()}, "data": {"cap": "0.6"}},
        {"content": b"a cat"},
        {"content": picture(), "params": {"budget": "much"}},
    ]
    with TestClient(app) as around:
        for one in asked:
            straight, routed = client.post("/predict", **one), around.post("/predict", **one)
            assert straight.status_code == routed.status_code
            answers = [{**reply.json(), "ms": None} for reply in (straight, routed)]
            assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("size", "format", "beside"),
    [((24, 20), "PNG", False), ((24, 20), "JPEG", False), ((24, 20), "ICO", True), ((128, 129), "PNG", True)],
)
def test_small_pictures_are_decoded_at_once_and_others_beside(
    predictor: Predictor, size: tuple[int, int], format: str, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Icons are decoded before they say their size."""
    threads: list[bool] = []
    decode = Predictor.pixels

    def noted(*args: Any) -> Any:
        pixels = decode(*args)
        threads.append(threading.current_thread().name.startswith("decoder"))
        return pixels

    monkeypatch.setattr(Predictor, "pixels", noted)
    blank = io.BytesIO()
    Image.new("RGB", size).save(blank, format)  # few bytes, whatever its size
    for encoded in (blank.getvalue(), picture(size=size, format=format)):
        with TestClient(create_app(predictor, settings(predictor))) as client:
            (said,) = client.post("/predict", content=encoded).json()["predictions"]
        check_says(said, predictor, encoded, budget=said["budget"])
    assert threads == [beside] * 2


def test_requests_share_batches_and_answers_are_their_own(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor))
    asked = [
        {"budget": (0.35, 0.5, 0.7)[seed % 3], "top_k": 1 + seed % 3, **({"cap": 0.5} if seed % 4 == 0 else {})}
        for seed in range(24)
    ]

    async def work(post: Ask) -> list[httpx.Response]:
        return await asyncio.gather(
            *(post("/predict", content=picture(seed), params=one) for seed, one in enumerate(asked))
        )

    for seed, (one, reply) in enumerate(zip(asked, together(app, work), strict=True)):
        (said,) = reply.json()["predictions"]
        spend = {name: one[name] for name in ("budget", "cap") if name in one}
        check_says(said, predictor, picture(seed), top_k=int(one["top_k"]), **spend)
        assert said["macs_fraction"] <= one.get("cap", 1.0)
    metrics = app.state.server.metrics.text().decode()
    assert number(metrics, "miaformer_batch_pictures_sum") == 24
    assert number(metrics, "miaformer_batch_pictures_count") < 24


def test_without_settings_of_its_own_it_has_the_models_budgets(predictor: Predictor) -> None:
    app = create_app(predictor, Settings(p95_ms=60_000, page=False))

    async def work(post: Ask) -> list[httpx.Response]:  # some ask, some do not, in one batch
        asked = [{"budget": 0.4}, {}, {"budget": 0.5}, {}]
        return await asyncio.gather(*(post("/predict", content=picture(), params=one) for one in asked))

    said = [reply.json()["predictions"][0]["budget"] for reply in together(app, work)]
    most = predictor.model.calibration.range[1]
    assert said == [0.4, most, 0.5, most]


def test_the_operators_cap_and_budget_are_the_most_there_is(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor, budget=0.6, min_budget=0.4, cap=0.5))
    with TestClient(app) as client:
        for asked in ({"budget": 0.8, "cap": 0.9}, {}):
            (said,) = client.post("/predict", content=picture(), params=asked).json()["predictions"]
            assert said["budget"] == 0.6
            assert said["macs_fraction"] <= 0.5
            assert said["lowered"] is False
        (said,) = client.post("/predict", content=picture(), params={"budget": 0.35}).json()["predictions"]
        assert said["budget"] == 0.35  # less than load would lower it to: what was asked


def test_a_model_without_budgets_executes_everything(predictor: Predictor) -> None:
    plain = Predictor(classifier())
    with TestClient(create_app(plain, settings(plain))) as client:
        (said,) = client.post("/predict", content=picture()).json()["predictions"]
        assert said["budget"] is None
        assert (said["depth_kept"], said["heads_kept"], said["tokens_kept"]) == (1, 1, 1)
        refused = client.post("/predict", content=picture(), params={"budget": 0.5})
        assert refused.status_code == 422
        assert "not calibrated" in refused.json()["detail"]
    with TestClient(create_app(predictor, Settings(static=True, page=False))) as client:
        (said,) = client.post("/predict", content=picture(), params={"budget": 0.5}).json()["predictions"]
        assert said["tokens_kept"] == 1
        assert said["budget"] is None  # it asked for one, and there are none here


# What is wrong with a request -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({"content": b""}, 400, "the body is empty"),
    "text": ({"content": b"a cat"}, 400, "body: not a picture"),
    "truncated": ({"content": picture()[:-20]}, 400, "body: .*truncated"),
    "a broken one among others": (
        {"files": [("a", ("good.png", picture())), ("b", ("bad.png", b"\x89PNG"))]},
        400,
        "bad.png: ",
    ),
    "json": ({"json": {"image": "aGk="}}, 415, "application/json: send a picture's bytes"),
    "a form without files": ({"files": {"budget": (None, "0.4")}}, 400, "the form has no file"),
    "a picture as text": (
        {"files": {"picture": (None, picture(size=(60, 60)))}},
        400,
        "text of more than 1,024 bytes: send pictures as files, with a filename",
    ),
    "a form without an end": (
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        ".",
    ),
    "a form without a boundary": (
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "boundary",
    ),
    "too many files": ({"files": [("f", (f"{n}.png", picture())) for n in range(33)]}, 400, "Too many files"),
    "too large": ({"content": bytes(11 * 2**20)}, 413, "limit of 10,485,760 bytes"),
    "too many pixels": (
        {"content": picture(size=(300, 300))},
        413,
        "300 x 300 pixels are more than the limit of 50,000",
    ),
    "budget 0": ({"content": picture(), "params": {"budget": 0}}, 422, "budget=0.* must be a fraction"),
    "budget nan": ({"content": picture(), "params": {"budget": "nan"}}, 422, "budget=nan must be a fraction"),
    "budget words": ({"content": picture(), "params": {"budget": "much"}}, 422, "budget='much' is not a number"),
    "budget words in a form": (
        {"files": {"f": picture()}, "data": {"budget": "much"}},
        422,
        "budget='much' is not a number",
    ),
    "budget out of reach": ({"content": picture(), "params": {"budget": 1e-3}}, 422, "below .*, the least"),
    "cap 2": ({"content": picture(), "params": {"cap": 2}}, 422, "cap=2.* must be a fraction"),
    "cap out of reach": (
        {"content": picture(), "params": {"cap": 1e-3}},
        422,
        "of the backbone's MACs that patch embedding",
    ),
    "top_k 0": ({"content": picture(), "params": {"top_k": 0}}, 422, "top_k=0 must be at least 1"),
}


@pytest.fixture(scope="module")
def strict_client(predictor: Predictor) -> Iterator[TestClient]:
    app = create_app(predictor, settings(predictor, max_pixels=50_000))
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(strict_client: TestClient, kind: str) -> None:
    request, status, said = WRONG[kind]
    reply = strict_client.post("/predict", **request)
    assert reply.status_code == status, reply.text
    assert re.search(said, reply.json()["detail"], re.DOTALL), reply.text
    assert strict_client.get("/health").json()["queue"] == 0
    assert strict_client.app.state.server._uploads.held == 0
    assert strict_client.post("/predict", content=picture()).status_code == 200


def test_wrong_paths_and_methods_are_said(client: TestClient) -> None:
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing").status_code == 404
    assert client.get("/").status_code == 404  # this server has no page


async def call(app: Any, *chunks: bytes | float, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """The messages that POST /predict sends where its body comes in chunks, with pauses of so many seconds between
    them; None at the end: the client hangs up.
    """
    sent: list[dict[str, Any]] = []
    rest = list(chunks)

    async def receive() -> dict[str, Any]:
        while rest and isinstance(rest[0], float):
            await asyncio.sleep(rest.pop(0))
        if not rest:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": rest.pop(0), "more_body": any(isinstance(r, bytes) for r in rest)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    encoded = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": encoded, "app": app}
    await app({**scope, "http_version": "1.1", "scheme": "http", "server": ("server", 80)}, receive, send)
    return sent


def in_lifespan(app: Any, work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with app.router.lifespan_context(app):
            return await work()

    return asyncio.run(main())


def test_small_pictures_mind_the_limit_of_pixels_too(predictor: Predictor) -> None:
    with TestClient(create_app(predictor, settings(predictor, max_pixels=479))) as client:
        reply = client.post("/predict", content=picture(size=(24, 20)))
    assert reply.status_code == 413
    assert "more than the limit of 479" in reply.json()["detail"]


def test_slow_uploads_are_hung_up_on(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor, upload_seconds=0.2))
    sent = in_lifespan(app, lambda: call(app, picture()[:50], 5.0, picture()[50:]))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert app.state.server._uploads.held == 0


def test_bodies_without_a_length_are_counted(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor, max_upload_bytes=1000, max_held_bytes=1000))
    sent = in_lifespan(app, lambda: call(app, *[bytes(400)] * 4))
    assert sent[0]["status"] == 413


def test_uploads_together_hold_no_more_than_is_allowed(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor, max_upload_bytes=5000, max_held_bytes=9000))

    async def work() -> list[list[dict[str, Any]]]:
        slow = [call(app, bytes(4000), 0.3, b"no picture") for _ in range(2)]
        return await asyncio.gather(*slow, call(app, 0.1, bytes(2000), b""))

    *slow, third = in_lifespan(app, work)
    assert third[0]["status"] == 503
    assert any(name == b"retry-after" for name, _ in third[0]["headers"])
    assert [sent[0]["status"] for sent in slow] == [400, 400]
    assert app.state.server._uploads.held == 0


def test_pictures_that_cannot_be_read_leave_no_trace_in_the_queue(predictor: Predictor) -> None:
    with TestClient(create_app(predictor, settings(predictor, max_queue=2, max_pictures=1))) as client:
        assert [client.post("/predict", content=b"no picture").status_code for _ in range(5)] == [400] * 5
        assert [client.post("/predict", content=picture()).status_code for _ in range(5)] == [200] * 5


def test_who_hangs_up_is_not_run(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor))

    async def work() -> None:
        server = app.state.server
        blocker = asyncio.create_task(server.batcher.call(lambda _: time.sleep(0.5)))
        await asyncio.sleep(0)  # it has the model now
        await call(app, picture(), 0.1)  # leaves while the model is busy
        await blocker
        await asyncio.sleep(0.1)

    in_lifespan(app, work)
    metrics = app.state.server.metrics.text().decode()
    assert number(metrics, "miaformer_batch_pictures_sum") == 0
    assert number(metrics, 'miaformer_requests_total{path="/predict",status="499"}') == 1


# Under load -----------------------------------------------------------------------------------------------------


def flood(app: Any, requests: int, **query: Any) -> list[httpx.Response]:
    async def work(post: Ask) -> list[httpx.Response]:
        return await asyncio.gather(
            *(post("/predict", content=picture(seed % 8), params=query) for seed in range(requests))
        )

    return together(app, work)


def test_load_lowers_budgets_and_answers_say_so(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(predictor, settings(predictor, p95_ms=1e6, budget=0.8, min_budget=0.4, max_batch=4))
    governor = app.state.server.batcher.governor
    slow = ServiceTime((n, n * b, 10 * n * b) for n in (1, 8) for b in (0.4, 0.8))  # next to which a test takes no time
    monkeypatch.setattr(slow, "add", lambda *batch: None)
    monkeypatch.setattr(governor, "time", slow)
    monkeypatch.setattr(governor, "_objective", 40 * 10 * 0.6 / HEADROOM)  # 40 pictures fit at a budget of 0.6
    replies = flood(app, 40)
    assert {reply.status_code for reply in replies} == {200}
    said = [reply.json()["predictions"][0] for reply in replies]
    assert min(one["budget"] for one in said) == pytest.approx(0.6, abs=0.02)  # of who came first: all were there
    assert max(one["budget"] for one in said) == 0.8  # of who came last: few were left
    for one in said:
        assert one["lowered"] == (one["budget"] < 0.8)
    metrics = app.state.server.metrics.text().decode()
    assert number(metrics, "miaformer_lowered_total") == sum(one["lowered"] for one in said)


class Beside:
    """In the place of a `ModelProcess`: runs the model here, and sees what is under way at once."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.trouble: str | None = None
        self.sent: list[int] = []  # pictures of each batch
        self.under_way = self.most_under_way = 0
        self.seconds = 0.0  # that a batch takes longer
        self._one_at_a_time = threading.Lock()

    def __call__(self, work: Callable[..., Any], images: Any, *arguments: Any) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.sent.append(len(images))
        with self._one_at_a_time:
            time.sleep(self.seconds)
            found = work(self.predictor, images, *arguments)
        self.under_way -= 1
        return found

    def close(self) -> None:
        pass


def test_the_next_batch_is_on_its_way_when_one_ends_and_no_more_than_that(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(predictor)
    app = create_app(predictor, settings(predictor, max_batch=4), process=beside)
    batcher = app.state.server.batcher
    answer, chosen, most_chosen = batcher._answer, 0, 0

    async def counted(*batch: Any) -> None:
        nonlocal chosen, most_chosen
        chosen += 1
        most_chosen = max(most_chosen, chosen)
        await answer(*batch)
        chosen -= 1

    monkeypatch.setattr(batcher, "_answer", counted)
    beside.seconds = 0.02  # more than it has been told, so the next one is sent too early rather than too late
    replies = flood(app, 40)
    for seed, reply in enumerate(replies):
        assert reply.status_code == 200
        (said,) = reply.json()["predictions"]
        check_says(said, predictor, picture(seed % 8), budget=said["budget"])
    assert beside.most_under_way == most_chosen == 2
    assert max(beside.sent) == 4


def test_waiting_for_a_model_to_be_loaded_again_is_not_taken_for_its_time(predictor: Predictor) -> None:
    beside = Beside(predictor)
    app = create_app(predictor, settings(predictor), process=beside)
    governor = app.state.server.batcher.governor
    usual = governor.time.of(1, 0.5)
    beside.seconds = 1.0

    async def work(post: Ask) -> None:
        beside.trouble = "it is being loaded again"
        assert (await post("/predict", content=picture())).status_code == 200
        assert governor.time.of(1, 0.5) == usual
        beside.trouble = None
        assert (await post("/predict", content=picture())).status_code == 200
        assert governor.time.of(1, 0.5) > usual

    together(app, work)


def test_past_the_least_budget_requests_are_refused_with_a_time_to_come_back(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor, max_queue=40, max_pictures=1))
    replies = flood(app, 100)
    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.status_code for reply in replies} == {200, 503}
    assert len(refused) <= 60
    for reply in refused:
        assert int(reply.headers["Retry-After"]) >= 1
        assert reply.json() == {"detail": "the server is busy"}
    assert number(app.state.server.metrics.text().decode(), "miaformer_refused_total") == len(refused)


def test_what_was_admitted_is_answered_before_it_stops(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor))
    replies: list[asyncio.Task[httpx.Response]] = []

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            async with app.router.lifespan_context(app):
                replies.extend(
                    asyncio.create_task(client.post("/predict", content=picture(seed))) for seed in range(20)
                )
                while app.state.server.batcher.admitted < 20:
                    await asyncio.sleep(0.001)
            assert all(reply.done() for reply in replies) or app.state.server.batcher.admitted == 0
            return await asyncio.gather(*replies)

    assert {reply.status_code for reply in asyncio.run(main())} == {200}


def test_a_batch_that_fails_fails_alone(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(predictor, settings(predictor))
    with TestClient(app, raise_server_exceptions=False) as client:
        run, fail = predictor.run, iter([True])

        def broken_once(*args: Any, **kwargs: Any) -> Any:
            if next(fail, False):
                raise RuntimeError("out of memory, say")
            return run(*args, **kwargs)

        monkeypatch.setattr(predictor, "run", broken_once)
        assert client.post("/predict", content=picture()).status_code == 500
        assert client.post("/predict", content=picture()).status_code == 200
        assert client.get("/health").json()["status"] == "ok"


def test_health_says_when_nothing_runs_any_more(predictor: Predictor) -> None:
    app = create_app(predictor, settings(predictor))
    with TestClient(app) as client:
        said = client.get("/health")
        assert said.status_code == 200
        assert said.json()["blocks"] == 3
        for path in ("/health", "/metrics"):
            asked = client.head(path)
            assert (asked.status_code, asked.content) == (200, b""), path
        assert said.json()["serving_budget"] == said.json()["budget"]
        app.state.server.batcher._task.cancel()
        assert client.get("/health").status_code in (200, 503)  # the loop has yet to see it
        stopped = client.get("/health")
        assert (stopped.status_code, stopped.json()["status"]) == (503, "the model's queue has stopped")


# The page's questions -------------------------------------------------------------------------------------------


def test_a_picture_is_explained_at_every_budget(predictor: Predictor) -> None:
    with TestClient(create_app(predictor, settings(predictor, page=True))) as client:
        reply = client.post("/explain", content=picture(), params={"budget": [0.4, 0.7], "top_k": 2})
        assert reply.status_code == 200
        content = reply.json()
        assert content["picture"].startswith("data:image/png;base64,")  # a small one, so without loss
        with torch.inference_mode():
            dense = predictor.model.backbone(predictor.prepare(picture())[None]).argmax().item()
        assert content["dense"]["top_k"][0]["label"] == dense
        assert content["dense"]["ms"] > 0
        for budget, step in zip((0.4, 0.7), content["steps"], strict=True):
            trace = predictor.run([predictor.prepare(picture())], budget=budget).trace
            assert step["budget"] == budget
            assert step["depth"] == trace.depth[0].tolist()
            assert step["tokens"] == trace.tokens[0].tolist()
            assert step["prediction"]["macs_fraction"] == pytest.approx(trace.macs_fraction.item())
        assert len(client.post("/explain", content=picture()).json()["steps"]) == 13
        several = client.post("/explain", files=[("a", picture()), ("b", picture())])
        assert several.status_code == 400
        assert client.get("/").status_code == 200
        assert "default-src 'none'" in client.get("/").headers["Content-Security-Policy"]


# What an operator may ask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"p95_ms": 0}, "p95_ms=0 must be a positive number"),
        ({"upload_seconds": float("nan")}, "upload_seconds=nan must be a positive"),
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"max_held_bytes": 10}, "max_held_bytes=10 is less than one upload"),
        ({"max_queue": 4}, "max_queue=4 is less than one request"),
        ({"cap": 1e-3}, "take: give a larger cap"),
        ({"budget": 0.5, "min_budget": 0.6}, "min_budget=0.6 is more than budget=0.5"),
    ],
)
def test_settings_that_cannot_be_are_named(predictor: Predictor, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(predictor, **changes)


def test_budgets_are_filled_in_from_the_model(predictor: Predictor) -> None:
    least, most = predictor.model.calibration.range
    filled = Settings().for_model(predictor)
    assert filled.budget == most
    assert least <= filled.min_budget < filled.budget
    asked = Settings(budget=0.5, min_budget=0.4).for_model(predictor)
    assert (asked.budget, asked.min_budget) == (0.5, 0.4)
    assert Settings(static=True, budget=0.5).for_model(predictor).budget is None
    with pytest.raises(ValueError, match="below"):
        Settings(budget=0.5, min_budget=0.001).for_model(predictor)
    with pytest.raises(ValueError, match=r"min_budget=0.6 is more than budget=0.5"):
        Settings(budget=0.5, min_budget=0.6)
    plain = Predictor(classifier())
    assert Settings().for_model(plain).budget is None
    with pytest.raises(ValueError, match="not calibrated"):
        Settings(budget=0.5).for_model(plain)


def number(metrics: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)[1])


@pytest.mark.parametrize("allowed", [(), ("https://one.example", "https://two.example:8080"), ("*",)])
def test_pages_of_other_sites_may_ask_where_they_are_allowed(predictor: Predictor, allowed: tuple[str, ...]) -> None:
    ask = {"Origin": "https://two.example:8080", "Access-Control-Request-Method": "POST"}
    with TestClient(create_app(predictor, settings(predictor, allow_origins=allowed))) as client:
        before = client.options("/predict", headers=ask)
        answer = client.post("/predict", content=picture(), headers={"Origin": ask["Origin"]})
        stranger = client.post("/predict", content=picture(), headers={"Origin": "https://three.example"})
    assert answer.status_code == stranger.status_code == 200  # a browser, not the server, keeps it from the page
    named = "access-control-allow-origin"
    if not allowed:
        assert before.status_code == 405
        assert named not in answer.headers
        return
    assert before.status_code == 200
    assert before.headers[named] == answer.headers[named] == ("*" if allowed == ("*",) else ask["Origin"])
    assert stranger.headers.get(named) == ("*" if allowed == ("*",) else None)


@pytest.mark.parametrize(
    "wrong", ["example.org", "https://example.org/page", "", "https://*.example.org", "https://Example.org"]
)
def test_an_origin_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not a valid origin"):
        Settings(allow_origins=(wrong,))
