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


def served(monkeypatch: pytest.MonkeyPatch, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> Any:
    """What `talk` gives of a connection to a server that waits 0.3 s for a head."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)

    async def main() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            config = uvicorn.Config(slow_app, http=protocol.ImpatientProtocol, lifespan="off", log_level="error")
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
