"""A connection that does not get on with its request is hung up on; one that does is left alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")

import uvicorn

from miaformer.serving import protocol


async def slow_app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Awaitable[None]]) -> None:
    await asyncio.sleep(0.6)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def counting_app(
    scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Says how many headers and bytes it got."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    said = b"<%d, %d>" % (len(scope["headers"]), size)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


def served(
    monkeypatch: pytest.MonkeyPatch,
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    app: Any = slow_app,
) -> Any:
    """What `talk` gives of a connection to a server that waits 0.3 s for a head."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)

    async def main() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            config = uvicorn.Config(app, http=protocol.ImpatientProtocol, lifespan="off", log_level="error")
            server = uvicorn.Server(config)
            task = asyncio.create_task(server._serve(sockets=[listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await talk(reader, writer)
            finally:
                writer.close()
                server.should_exit = True
                await task

    return asyncio.run(main())


def test_half_a_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        answer = asyncio.create_task(reader.read())
        for byte in b"GET / HTTP/1.1\r\n" * 10:  # a byte now and then keeps nothing open
            if answer.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
        return await asyncio.wait_for(answer, 1)

    assert served(monkeypatch, talk) == b""


def test_an_answer_that_takes_longer_is_waited_for_and_the_next_head_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[bytes, bytes]:
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: s\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"ok"), 5)
        writer.write(b"GET / HTTP")
        return head, await asyncio.wait_for(reader.read(), 5)

    head, rest = served(monkeypatch, talk)
    assert head.startswith(b"HTTP/1.1 200")
    assert rest == b""


def test_a_head_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(1 + protocol.HEAD_BYTES // 10_000):
            writer.write(b"y" * 10_000)
            await asyncio.sleep(0.01)
        return await asyncio.wait_for(reader.read(), 5)

    said = served(monkeypatch, talk)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.endswith(b"The head of the request is too large.")


def test_a_body_is_no_part_of_the_head_that_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[bytes]:
        size = 3 * protocol.HEAD_BYTES  # comes in pieces of any size, the last with the next head in it
        writer.write(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size) + b"POST / HTTP/1.1\r\n")
        first = await asyncio.wait_for(reader.readuntil(b">"), 5)
        writer.write(b"Content-Length: 2\r\n\r\nok")
        return [first, await asyncio.wait_for(reader.readuntil(b">"), 5)]

    first, second = served(monkeypatch, talk, counting_app)
    assert first.endswith(b"<1, %d>" % (3 * protocol.HEAD_BYTES))
    assert second.endswith(b"<1, 2>")


def test_what_trails_a_body_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n")
        writer.write(b"X-Trails: y\r\n" * 1000 + b"\r\n")
        return await asyncio.wait_for(reader.readuntil(b">"), 5)

    assert served(monkeypatch, talk, counting_app).endswith(b"<1, 2>")
