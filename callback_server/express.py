"""Workers' usual requests, answered where they arrive: without a task, a request object or a turn of the loop.

A worker's report of a short task comes in one piece, in one form: then it is recognised, verified and taken at
once, in a fraction of the time. Everything else, and everything that is wrong in any way, goes the ordinary way
through aiohttp, whose answers to it are the only ones there are.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from wove.callback_server.replies import Answer

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger("wove.callback_server")

#: The head of a report as :mod:`wove.worker.plain_http` writes it, and in no other form.
_REPORT = re.compile(
    rb"POST /wove/v1/events/([0-9a-f]{32}) HTTP/1\.1\r\n"
    rb"Host: [!-~]{1,300}\r\n"
    rb"Content-Type: (application/(?:msgpack|json))\r\n"
    rb"Wove-Key: ([A-Za-z0-9._-]{1,64})\r\n"
    rb"Wove-Signature: ([0-9a-f]{64})\r\n"
    rb"Wove-Final: ([01])\r\n"
    rb"Content-Length: ([0-9]{1,9})\r\n\r\n"
)
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,15})\r\n")


class Report(NamedTuple):
    """A request to take events in, verified in no way yet.

    Attributes:
        run_id: whose.
        codec: the body's content type.
        kid: the key id.
        tag: its signature.
        final: whether it says that it ends the run.
        body: its body.
    """

    run_id: str
    codec: str
    kid: str
    tag: bytes
    final: bool
    body: Buffer


class Express:
    """Makes the connections of one listener.

    Args:
        ordinary: makes aiohttp's protocol of a connection.
        take: takes a report in; None for one that is to go the ordinary way.
        seen: told of each connection by which a report came.
    """

    def __init__(
        self,
        ordinary: Callable[[], Any],
        take: Callable[[Any, Report], Answer | None],
        seen: Callable[[Any], None],
    ) -> None:
        self._ordinary = ordinary
        self.take = take
        self.seen = seen
        #: Connections by which a request came that goes the ordinary way, and is not answered yet.
        self.busy: set[Any] = set()

    def __call__(self) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(self, self._ordinary())

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Notice when a request that went the ordinary way is answered to its last byte."""
        response: web.StreamResponse
        try:
            response = await handler(request)
        except web.HTTPException as exc:
            await _answer(request, exc)
            self.busy.discard(request.protocol)
            raise
        await _answer(request, response)
        self.busy.discard(request.protocol)
        return response


async def _answer(request: web.Request, response: web.StreamResponse) -> None:
    # What aiohttp does after its handlers, a moment sooner; it deals with a peer that is gone.
    with suppress(ConnectionError):
        await response.prepare(request)
        await response.write_eof()


class Connection(asyncio.Protocol):
    """One connection; aiohttp's protocol stands behind it, and is what the guard and the contacts know.

    Whose bytes belong to which request is known as long as a peer waits for each answer. One that does not has
    all its requests handled the ordinary way, in order, from then on.
    """

    def __init__(self, express: Express, ordinary: Any) -> None:
        self._express = express
        self._inner = ordinary
        self._transport: Any = None
        #: Bytes that are still to come of a request that goes the ordinary way.
        self._owed = 0
        self._always_ordinary = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = transport
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._express.busy.discard(self._inner)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hold back answers; the peer does not read them."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Go on with them."""
        self._inner.resume_writing()

    def eof_received(self) -> bool | None:
        """The peer says nothing more."""
        keep: bool | None = self._inner.eof_received()
        return keep

    def data_received(self, data: bytes) -> None:
        """Take a report that is whole, or hand over what came."""
        if self._always_ordinary:
            self._inner.data_received(data)
        elif self._owed:
            self._go_on(data)
        elif self._inner in self._express.busy:
            self._always_ordinary = True  # it does not wait for its answers
            self._inner.data_received(data)
        elif not self._take(data):
            self._begin(data)

    def _take(self, data: bytes) -> bool:
        match = _REPORT.match(data)
        if match is None or len(data) - match.end() != int(match[6]) or self._transport.is_closing():
            return False
        report = Report(
            match[1].decode(),
            match[2].decode(),
            match[3].decode(),
            bytes.fromhex(match[4].decode()),
            match[5] == b"1",
            memoryview(data)[match.end() :],
        )
        try:
            answer = self._express.take(self._inner, report)
        except Exception:
            logger.exception("a report of run %s could not be taken", report.run_id)
            self._transport.abort()
            return True
        if answer is None:
            return False
        self._express.seen(self._inner)
        self._transport.write(written(answer))
        return True

    def _begin(self, data: bytes) -> None:
        """Hand over the beginning of a request, and find out where it ends."""
        size = _size(data)
        if size is None or size < len(data):
            self._always_ordinary = True
        else:
            self._owed = size - len(data)
            self._express.busy.add(self._inner)
        self._inner.data_received(data)

    def _go_on(self, data: bytes) -> None:
        if len(data) > self._owed:
            self._always_ordinary = True
        self._owed = max(0, self._owed - len(data))
        self._inner.data_received(data)


def _size(data: bytes) -> int | None:
    """Return the bytes of the request that begins so; None when that cannot be told at once."""
    end = data.find(b"\r\n\r\n")
    head = data[: end + 2].lower()
    if end < 0 or b"\nconnection:" in head or b"\ntransfer-encoding:" in head or b"\nupgrade:" in head:
        return None
    claimed = head.count(b"content-length")
    if not claimed:
        return end + 4
    match = _LENGTH.search(head)
    return end + 4 + int(match[1]) if match is not None and claimed == 1 else None


def written(answer: Answer) -> bytes:
    """Return an answer as it goes over the wire; it tells our clock, as :func:`wove.callback_server.replies.reply` does."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
    if answer.status == 204:
        first = "HTTP/1.1 204 No Content\r\n"
    else:
        phrase, size = HTTPStatus(answer.status).phrase, len(answer.text)
        first = f"HTTP/1.1 {answer.status} {phrase}\r\nContent-Length: {size}\r\n"
    return f"{first}Wove-Time: {time.time():.6f}\r\n{lines}\r\n{answer.text}".encode("ascii")
