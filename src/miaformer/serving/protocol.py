"""HTTP connections that do not wait for ever: who has not sent the head of a request in time is hung up on.

uvicorn limits bodies by what the application reads of them, and idle connections once they have had an answer, but not
heads: a thousand connections that send a byte now and then would keep everybody else out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class ImpatientProtocol(H11Protocol):
    """uvicorn's, whose h11 also limits how large a head may be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

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
