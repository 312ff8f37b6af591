"""Bounds on what a peer can hold of the server: time, bytes and connections.

aiohttp has no timeout of its own for a connection that sends nothing, half a head, or a
head without its body, and does not compare a declared length with its limit. This guard
adds them by aiohttp's public API.
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Seconds for a connection's first head, and between requests.
HEAD_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75.0
#: Seconds for a body, and the bytes a second that earn a large one more time.
BODY_SECONDS = 30.0
SLOWEST_BODY = 64 * 1024
#: Connections at once, and the part of the process's file descriptors they may take; beyond it
#: the longest idle one is closed.
MAX_CONNECTIONS = 1024
DESCRIPTOR_SHARE = 4
#: Bytes of bodies that may be under way at once; beyond it peers are asked to come back.
MAX_BYTES_IN_FLIGHT = 512 * 1024 * 1024
#: Seconds between two looks at the connections.
SWEEP_SECONDS = 0.25
#: Seconds between two such looks after which the process itself must have stood still.
PAUSE_SECONDS = 3.0


class Guard:
    """Watches the connections of one server and reads bodies under its limits.

    Args:
        on_lost: called with each connection that has ended, soon after it did.
        on_pause: called when the server could not serve for some seconds.
    """

    def __init__(
        self,
        on_lost: Callable[[Any], None] | None = None,
        on_pause: Callable[[], None] | None = None,
    ) -> None:
        self._on_lost = on_lost
        self._on_pause = on_pause
        self._last_seen: dict[Any, float] = {}
        self._used: set[Any] = set()
        self._active: set[Any] = set()
        self._bytes = 0
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        #: Connections at once.
        self.max_connections = MAX_CONNECTIONS
        if descriptors != resource.RLIM_INFINITY:
            # The application needs descriptors too.
            self.max_connections = min(MAX_CONNECTIONS, max(8, descriptors // DESCRIPTOR_SHARE))

    @property
    def connections(self) -> int:
        """How many connections the last sweep saw."""
        return len(self._last_seen)

    async def sweep(self, server: web.Server) -> None:
        """Close connections that idle or dribble, for ever."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            if now - last > PAUSE_SECONDS and self._on_pause is not None:
                self._on_pause()
            last = now
            self._sweep_once(server)

    def _sweep_once(self, server: web.Server) -> None:
        now = time.monotonic()
        live = dict.fromkeys(server.connections)  # in the order in which they came
        for gone in [protocol for protocol in self._last_seen if protocol not in live]:
            del self._last_seen[gone]
            self._used.discard(gone)
            if self._on_lost is not None:
                self._on_lost(gone)
        for protocol in live:
            self._last_seen.setdefault(protocol, now)
        # Those that never asked for anything go first: they may have come before one that a look saw later.
        idle = sorted(
            (p for p in self._last_seen if p not in self._active),
            key=lambda p: (p in self._used, self._last_seen[p]),
        )
        excess = len(live) - self.max_connections
        for index, protocol in enumerate(idle):
            limit = KEEP_ALIVE_SECONDS if protocol in self._used else HEAD_SECONDS
            if index < excess or now - self._last_seen[protocol] > limit:
                _abort(protocol)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count the connection as active while a request is being handled."""
        protocol = request.protocol
        self._active.add(protocol)
        try:
            return await handler(request)
        finally:
            self._active.discard(protocol)
            self._used.add(protocol)
            self._last_seen[protocol] = time.monotonic()

    async def read_body(self, request: web.Request, limit: int) -> bytearray:
        """Read the request's body.

        Args:
            request: its head was read.
            limit: bytes allowed.

        Raises:
            HTTPException: 411 without a length, 413 over the limit, 415 for an encoded
                body, 408 for one that comes too slowly, 503 when too much is under way.
        """
        if request.headers.get("Content-Encoding"):
            raise refusal(web.HTTPUnsupportedMediaType())
        size = request.content_length
        if size is None:
            raise refusal(web.HTTPLengthRequired())
        if size > limit:
            raise refusal(web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size))
        if self._bytes + size > MAX_BYTES_IN_FLIGHT and self._bytes:
            raise refusal(web.HTTPServiceUnavailable(headers={"Retry-After": "1"}))
        if request.content.is_eof():
            # It came with its head, as most do: nobody is waited for.
            body = bytearray(request.content.read_nowait())
            if len(body) != size:
                raise refusal(web.HTTPBadRequest())
            return body
        self._bytes += size
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                return await _read_exactly(request, size, deadline)
        except TimeoutError:
            raise refusal(web.HTTPRequestTimeout()) from None
        except asyncio.IncompleteReadError:
            raise refusal(web.HTTPBadRequest()) from None
        finally:
            self._bytes -= size


async def _read_exactly(request: web.Request, size: int, deadline: asyncio.Timeout) -> bytearray:
    # Into one buffer: joining chunks would hold a large body twice.
    body = bytearray(size)
    at = 0
    begun = asyncio.get_running_loop().time()
    while at < size:
        chunk = await request.content.readany()
        if not chunk:
            raise asyncio.IncompleteReadError(b"", size)
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
        # Bytes that have come earn time for the rest; claimed ones do not.
        deadline.reschedule(begun + BODY_SECONDS + at / SLOWEST_BODY)
    return body


def refusal(response: web.HTTPException) -> web.HTTPException:
    """Return ``response`` made to close its connection: its body may still be on the way."""
    response.force_close()
    return response


def _abort(protocol: Any) -> None:
    transport = protocol.transport
    if transport is not None:
        transport.abort()
