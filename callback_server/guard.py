"""Bounds on what a peer can hold of the server: time, bytes and connections.

aiohttp has no timeout of its own for a connection that sends nothing, half a head, or a
head without its body, and does not compare a declared length with its limit. This guard
adds them by aiohttp's public API.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import resource
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from wove.buffers import room
from wove.callback_server.large import send_body, take_body
from wove.refusals import count_refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from typing_extensions import Buffer

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Body = TypeVar("Body", bytearray, memoryview)

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
#: Bodies from this size, in bytes, go past aiohttp, and are hashed while they come in.
LARGE_FROM = 1024 * 1024
#: Bytes of bodies that may be under way at once; beyond it peers are asked to come back.
MAX_BYTES_IN_FLIGHT = 512 * 1024 * 1024
#: Bodies up to this size, in bytes, are no part of that: they are as many as there are connections, and who claims
#: large ones must not keep others from reporting small ones.
SMALL_BODY = 256 * 1024
#: Seconds between two looks at the connections.
SWEEP_SECONDS = 0.25
#: Connections that are closed in one turn of the loop: others have their turns between.
CLOSED_AT_ONCE = 16
#: Seconds between two such looks after which the process itself must have stood still.
PAUSE_SECONDS = 3.0


class Guard:
    """Watches the connections of one server and reads bodies under its limits.

    Args:
        on_lost: called with each connection that has ended, soon after it did.
        on_pause: called when the server could not serve for some seconds.
        counted_as: under what name errors that are answered count as refusals; "" for not at all.
    """

    def __init__(
        self,
        on_lost: Callable[[Any], None] | None = None,
        on_pause: Callable[[], None] | None = None,
        counted_as: str = "",
    ) -> None:
        self._on_lost = on_lost
        self._on_pause = on_pause
        self._counted_as = counted_as
        #: All that the last look saw, and those that it may close: since when, the longest first.
        self._known: set[Any] = set()
        self._silent: dict[Any, float] = {}  # they never asked for anything
        self._reading: dict[Any, float] = {}  # their request's body is on its way
        self._idle: dict[Any, float] = {}  # their last request was answered
        self._active: set[Any] = set()
        #: Connections that are good for one more reply only.
        self._spent: set[Any] = set()
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
        return len(self._known)

    async def sweep(self, server: web.Server) -> None:
        """Close connections that idle or dribble, for ever."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = time.monotonic()
            if now - last > PAUSE_SECONDS and self._on_pause is not None:
                self._on_pause()
            last = now
            for number, protocol in enumerate(self._look(server), 1):
                if protocol not in self._active:  # it may have asked for something meanwhile
                    _abort(protocol)
                if number % CLOSED_AT_ONCE == 0:
                    await asyncio.sleep(0)

    def _look(self, server: web.Server) -> list[Any]:
        """See who came and went; return those that are to be closed."""
        # A few times a second, between the requests of others: sets, and no look at each connection.
        now = time.monotonic()
        live = dict.fromkeys(server.connections)  # in the order in which they came
        for gone in self._known.difference(live):
            self._known.discard(gone)
            for waiting in (self._silent, self._reading, self._idle):
                waiting.pop(gone, None)
            if self._on_lost is not None:
                self._on_lost(gone)
        if len(live) > len(self._known):
            for protocol in [protocol for protocol in live if protocol not in self._known]:
                self._known.add(protocol)
                if protocol not in self._active and protocol not in self._reading:
                    self._silent[protocol] = now
        # Those that never asked for anything go first: they may have come before one that a look saw later. Then
        # those whose bodies do not come: who they are is not known before that.
        doomed: list[Any] = []
        excess = len(live) - self.max_connections
        for waiting, limit in (
            (self._silent, HEAD_SECONDS),
            (self._reading, math.inf),  # it has a limit of its own
            (self._idle, KEEP_ALIVE_SECONDS),
        ):
            overdue = itertools.takewhile(partial(_older, now - limit), waiting.values())
            count = max(sum(1 for _ in overdue), min(excess, len(waiting)))
            doomed.extend(itertools.islice(waiting, count))
            excess -= count
        return doomed

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count the connection as active while a request is being handled."""
        protocol = request.protocol
        self._silent.pop(protocol, None)
        self._idle.pop(protocol, None)
        self._active.add(protocol)
        try:
            response = await handler(request)
            if protocol in self._spent:
                response.force_close()
            return response
        except web.HTTPException as exc:
            if exc.status >= 400 and self._counted_as:
                count_refusal(f"{self._counted_as}:{exc.status}")
            if protocol in self._spent:
                exc.force_close()
            raise
        finally:
            self._spent.discard(protocol)
            self._active.discard(protocol)
            self.seen(protocol)

    def seen(self, protocol: Any) -> None:
        """Note that a connection was used this moment."""
        self._silent.pop(protocol, None)
        self._idle.pop(protocol, None)  # the longest idle one stands first
        self._idle[protocol] = time.monotonic()
        self._known.add(protocol)  # it may have ended before a look saw it

    async def read_body(self, request: web.Request, limit: int) -> bytearray:
        """Read the request's body. Meanwhile its connection may have to make room, as an idle one has.

        Args:
            request: its head was read.
            limit: bytes allowed.

        Raises:
            HTTPException: 411 without a length, 413 over the limit, 415 for an encoded
                body, 408 for one that comes too slowly, 503 when too much is under way.
        """
        return await self._read(request, limit, _read_exactly)

    async def read_large(self, request: web.Request, limit: int, hasher: Any) -> memoryview:
        """Read a large body, and hash it meanwhile in a thread; the reply ends its connection.

        Args:
            request: its head was read.
            limit: bytes allowed.
            hasher: is updated by the body.

        Raises:
            HTTPException: as :meth:`read_body`.
        """
        return await self._read(request, limit, partial(self._take, hasher))

    async def _take(
        self, hasher: Any, request: web.Request, size: int, deadline: asyncio.Timeout
    ) -> memoryview:
        self._spent.add(request.protocol)
        begun = asyncio.get_running_loop().time()
        body = room(size)
        await take_body(request, body, hasher, lambda at: _earn(deadline, begun, at))
        return body

    async def _read(
        self,
        request: web.Request,
        limit: int,
        read: Callable[[web.Request, int, asyncio.Timeout], Awaitable[Body]],
    ) -> Body:
        if request.headers.get("Content-Encoding"):
            raise refusal(web.HTTPUnsupportedMediaType())
        size = request.content_length
        if size is None:
            raise refusal(web.HTTPLengthRequired())
        if size > limit:
            raise refusal(web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=size))
        counted = size if size > SMALL_BODY else 0
        if counted and self._bytes and self._bytes + counted > MAX_BYTES_IN_FLIGHT:
            raise refusal(web.HTTPServiceUnavailable(headers={"Retry-After": "1"}))
        if read is _read_exactly and request.content.is_eof():
            # It came with its head, as most do: nobody is waited for.
            body = bytearray(request.content.read_nowait())
            if len(body) != size:
                raise refusal(web.HTTPBadRequest())
            return body
        self._bytes += counted
        self._active.discard(request.protocol)
        self._reading[request.protocol] = time.monotonic()
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                return await read(request, size, deadline)
        except TimeoutError:
            raise refusal(web.HTTPRequestTimeout()) from None
        except asyncio.IncompleteReadError:
            raise refusal(web.HTTPBadRequest()) from None
        finally:
            self._bytes -= counted
            self._reading.pop(request.protocol, None)
            self._active.add(request.protocol)


async def send_guarded(request: web.Request, response: web.StreamResponse, message: Sequence[Buffer]) -> bool:
    """Send a message as the body of a prepared response, as long as the peer takes it.

    Returns:
        False when it took nothing for BODY_SECONDS, or left: the connection is closed.
    """
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(BODY_SECONDS) as deadline:
            await send_body(request, response, message, lambda: deadline.reschedule(now() + BODY_SECONDS))
    except (TimeoutError, ConnectionError):
        _abort(request.protocol)
        return False
    return True


async def _read_exactly(request: web.Request, size: int, deadline: asyncio.Timeout) -> bytearray:
    # Into one buffer, which grows with what comes: joining chunks would hold a large body twice, and
    # a claimed length would take memory, and the loop's time, for nothing.
    body = bytearray()
    begun = asyncio.get_running_loop().time()
    while len(body) < size:
        chunk = await request.content.readany()
        if not chunk:
            raise asyncio.IncompleteReadError(b"", size)
        body += chunk
        _earn(deadline, begun, len(body))
    return body


def _older(than: float, since: float) -> bool:
    return since < than


def _earn(deadline: asyncio.Timeout, begun: float, at: int) -> None:
    # Bytes that have come earn time for the rest; claimed ones do not.
    deadline.reschedule(begun + BODY_SECONDS + at / SLOWEST_BODY)


def refusal(response: web.HTTPException) -> web.HTTPException:
    """Return ``response`` made to close its connection: its body may still be on the way."""
    response.force_close()
    return response


def _abort(protocol: Any) -> None:
    transport = protocol.transport
    if transport is not None:
        transport.abort()
