"""From a request to the pictures in it, never holding more than the limits allow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as BaseHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from miaformer.serving.settings import Settings

LINGER_SECONDS = 2.0
RETRY_AFTER = 1  # seconds, where uploads hold too much memory


@dataclass(frozen=True)
class Upload:
    """pictures: (name, encoded bytes), at least one; fields: what a form said beside them."""

    pictures: list[tuple[str, bytes]]
    fields: Mapping[str, str]


_MOST_TEXT = 1024  # bytes of a field of a form that is no file


class Uploads:
    """Reads requests, and knows how many bytes of all of them are held."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = 0  # bytes

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[Upload]:
        """The pictures of a request: its body, or the files of its form. They count as held until the end.

        Raises HTTPException: 408 too slow, 413 too large, 415 or 400 nothing that could be a picture, 503 too many at
        once.
        """
        counted = _Counted(self, request)
        try:
            yield await self._within_time(Request(request.scope, counted.receive))
        finally:
            self.held -= counted.bytes

    async def _within_time(self, request: Request) -> Upload:
        seconds = self._settings.upload_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._read(request)
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {seconds:g} s", _CLOSE) from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left before its request was whole") from None

    async def _read(self, request: Request) -> Upload:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await self._read_form(request)
        if kind == "application/json" or kind.startswith("multipart/"):
            raise HTTPException(
                415, f"content type {kind}: send a picture's bytes as the body, or multipart/form-data with files"
            )
        body = await request.body()
        if not body:
            raise HTTPException(400, "the body is empty: send a picture's bytes, or multipart/form-data with files")
        return Upload([("body", body)], {})

    async def _read_form(self, request: Request) -> Upload:
        most = self._settings.max_pictures
        pictures: list[tuple[str, bytes]] = []
        fields: dict[str, str] = {}
        try:
            async with request.form(max_files=most, max_fields=16, max_part_size=_MOST_TEXT) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        pictures.append((value.filename or name, await value.read()))
                    else:
                        fields[name] = value
        except BaseHTTPException as error:
            if not error.detail.startswith("Part exceeded"):
                raise
            raise HTTPException(
                400,
                f"a field of the form is text of more than {_MOST_TEXT:,} bytes: send pictures as files, with a "
                "filename, as `curl -F picture=@photo.jpg` does",
            ) from None
        if not pictures:
            raise HTTPException(400, "the form has no file: send each picture as a file, in a field of any name")
        return Upload(pictures, fields)


class _Counted:
    """Passes a request on, chunk by chunk, as long as there is room."""

    def __init__(self, uploads: Uploads, request: Request) -> None:
        self._uploads, self._receive = uploads, request.receive
        self.bytes = 0
        said = request.headers.get("content-length", "")
        if said.isdigit():
            self._check(int(said))

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self._check(self.bytes + size)
        self.bytes += size
        self._uploads.held += size
        return message

    def _check(self, size: int) -> None:
        settings = self._uploads._settings
        if size > settings.max_upload_bytes:
            limit = settings.max_upload_bytes
            raise HTTPException(413, f"the request is larger than the limit of {limit:,} bytes", _CLOSE)
        if self._uploads.held + size - self.bytes > settings.max_held_bytes:
            raise HTTPException(503, "too many uploads at once", {"Retry-After": str(RETRY_AFTER), **_CLOSE})


_CLOSE = {"Connection": "close"}  # what is left of the body is not kept


class LastWord(JSONResponse):
    """A reply to a request that may still be under way, after which the connection closes.

    Closing at once would make the client's system throw the reply away, unread, as soon as it sends on. So the reply
    goes out, and what comes is read and dropped, for a while.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
