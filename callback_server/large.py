"""Large bodies, past aiohttp's own buffers: straight from the socket into their place, and straight out of it.

aiohttp hands a body on in pieces that were copied four times; at tens of megabytes that is most of what a
result costs. So the rest of a large body is read by a protocol of its own, which the transport writes into.
aiohttp does not know of those bytes, and its connection ends with the reply.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiohttp import web
    from typing_extensions import Buffer

#: Bytes that are hashed at a time, while more come in.
HASHED_AT_ONCE = 1024 * 1024
#: Bytes that are handed to a transport at a time.
WRITTEN_AT_ONCE = 1024 * 1024
#: Bytes that a peer gets its time for, of those that go out past the transport.
SENT_AT_ONCE = 8 * 1024 * 1024


class Intake(asyncio.BufferedProtocol):
    """Reads the rest of one body.

    Args:
        body: where it goes.
        at: how much of it is there.
        relieved: the protocol that had the connection, and gets it back.
        transport: the connection's.
        on_bytes: called with how much of the body is there, when more is.
    """

    def __init__(
        self,
        body: memoryview,
        at: int,
        relieved: asyncio.BaseProtocol,
        transport: asyncio.Transport,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._body = body
        self.at = at
        self._relieved: Any = relieved
        self._transport = transport
        self._on_bytes = on_bytes
        self._news = asyncio.Event()
        self.lost = False

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.at >= len(self._body)

    def begin(self) -> None:
        """Take the connection over."""
        self._switch(self)

    def end(self) -> None:
        """Give it back. Idempotent."""
        if self._transport.get_protocol() is self:
            self._switch(self._relieved)

    def _switch(self, protocol: asyncio.BaseProtocol) -> None:
        # Paused meanwhile: how its bytes are handed on, a loop may settle when it begins to read.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    async def more(self) -> None:
        """Wait for bytes, or for the end of the connection."""
        if not self.complete and not self.lost:
            self._news.clear()
            await self._news.wait()

    # --- called by the transport ------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._body[self.at :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of them."""
        self.at += nbytes
        self._on_bytes(self.at)
        if self.complete:
            self.end()
        self._news.set()

    def eof_received(self) -> bool | None:
        """Nothing more will come."""
        self.lost = True
        self._news.set()
        self.end()
        kept: bool | None = self._relieved.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the protocol that had the connection as well."""
        self.lost = True
        self._news.set()
        self._relieved.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hand it on."""
        self._relieved.pause_writing()

    def resume_writing(self) -> None:
        """Hand it on."""
        self._relieved.resume_writing()


async def take_body(
    request: web.Request, body: memoryview, hasher: Any, on_bytes: Callable[[int], None]
) -> None:
    """Read a request's body into ``body``, hashing it in a thread meanwhile.

    The connection is good for a reply only afterwards, one that closes it.

    Raises:
        IncompleteReadError: the connection ended before the body did.
    """
    transport = request.transport
    if transport is None:
        raise asyncio.IncompleteReadError(b"", len(body))
    at = 0
    while chunk := request.content.read_nowait():  # what aiohttp has of it
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
    intake = Intake(body, at, request.protocol, transport, on_bytes)
    if not intake.complete:
        intake.begin()
    loop = asyncio.get_running_loop()
    hashed = 0
    try:
        while hashed < len(body):
            ready = intake.at
            if ready - hashed >= HASHED_AT_ONCE or ready == len(body):
                await loop.run_in_executor(None, hasher.update, body[hashed:ready])
                hashed = ready
            elif intake.lost:
                raise asyncio.IncompleteReadError(b"", len(body))
            else:
                await intake.more()
    finally:
        intake.end()


async def send_body(
    request: web.Request, response: web.StreamResponse, message: Sequence[Buffer], taken: Callable[[], None]
) -> None:
    """Send a message as the body of a prepared response, without copying it.

    Args:
        request: what it answers.
        response: its head was sent.
        message: the body.
        taken: called each time that the peer has taken a part.
    """
    views = [memoryview(part).cast("B") for part in message]
    transport = request.transport
    if transport is None or transport.is_closing() or not views:
        return
    # Together with the head; what comes after a full socket waits in the transport, and must not be overtaken.
    await response.write(views[0][:WRITTEN_AT_ONCE])
    views[0] = views[0][WRITTEN_AT_ONCE:]
    plain = transport.get_extra_info("sslcontext") is None
    if plain and not transport.get_write_buffer_size():
        await _send_plain(transport, views, taken)
        return
    for view in views:
        for at in range(0, len(view), WRITTEN_AT_ONCE):
            await response.write(view[at : at + WRITTEN_AT_ONCE])
            taken()


async def _send_plain(
    transport: asyncio.Transport, views: Sequence[memoryview], taken: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    # By another descriptor: those of transports are theirs alone.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
        sock.setblocking(False)
        for view in views:
            for at in range(0, len(view), SENT_AT_ONCE):
                await loop.sock_sendall(sock, view[at : at + SENT_AT_ONCE])
                taken()
