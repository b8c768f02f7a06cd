"""HTTP connections that neither wait for ever nor take whatever comes.

uvicorn limits bodies by what the application reads of them, and idle connections once they have had an answer, but not
heads: a thousand connections that send a byte now and then would keep everybody else out, and one head that never ends
would fill the memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
HEAD_BYTES = 65_536


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's faster one, that hangs up on who has not sent the head of a request in time, or a larger one."""

    _head_bytes: int | None = None  # so far, of a head that is under way
    _ended = False  # a request has, in the data that came last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        before, self._ended = self._head_bytes or 0, False
        super().data_received(data)
        if self._head_bytes is not None and not self.transport.is_closing():  # still under way
            self._head_bytes = 0 if self._ended else before + len(data)  # what ended here is not this head's
            if self._head_bytes > HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_bytes is not None:  # else it trails a body: nothing reads those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._hang_up_unless_begun, self.cycle)

    def _hang_up_unless_begun(self, before: Any) -> None:
        """before: the request that was the last one then."""
        nothing_under_way = before is None or before.response_complete
        if self.cycle is before and nothing_under_way and not self.transport.is_closing():
            self.transport.close()
