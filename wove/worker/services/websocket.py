"""The WebSocket worker service: one socket for all runs of a caller, who may lose it and come back."""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from wove.eager import run_now
from wove.errors import WoveError
from wove.exchange import (
    ACK,
    ATTACH,
    HELLO,
    MAX_LIST,
    UNKNOWN,
    VERSION,
    Packet,
    PacketReader,
    chunked,
    encode_note,
    framed,
)
from wove.network_security import Seal, channel_key
from wove.worker.services.http import GUARD, Routes, verify
from wove.worker.services.hub import Listener
from wove.worker.services.service import PING_SECONDS, Service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from wove.network_security import Verified

logger = logging.getLogger("wove.worker")

#: Bytes of the stream in one message of the socket, and the room its signature needs.
CHUNK = 512 * 1024
MAX_MESSAGE = CHUNK + 1024
#: Outcomes up to this size, in bytes, may be sent without a turn of the loop.
SEND_NOW_BYTES = 16 * 1024
#: Seconds after which a caller that says nothing, not even that it is there, is gone.
SILENCE_SECONDS = 60.0
SILENCE_LOOKS = 4


def websocket_application(service: Service | None = None, **options: Any) -> web.Application:
    """Return an aiohttp application that runs tasks, for ``app.add_subapp("/wove", ...)``.

    Args:
        service: what runs the tasks; without one it is made of the options.
        options: those of :class:`Service`: ``security``, ``threads``, ``processes``, ``allow``, ...

    Raises:
        ConfigurationError: an option cannot be used.
    """
    routes = _SocketRoutes(service or Service(name="websocket", **options))
    app = web.Application(middlewares=[routes.guard.middleware], client_max_size=0)
    app[GUARD] = routes.guard
    app.add_routes([web.get("/", routes.connect), web.get("/healthz", routes.healthz)])
    app.cleanup_ctx.append(routes.life)
    app.on_shutdown.append(routes.say_goodbye)
    return app


class _SocketRoutes(Routes):
    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._sockets: set[web.WebSocketResponse] = set()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        verified = await verify(self.service, request)
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE, compress=False, timeout=1.0)
        await socket.prepare(request)
        self._sockets.add(socket)
        listener = Listener()
        try:
            await self._converse(socket, verified, listener)
        except (ConnectionError, TimeoutError):
            pass  # it went without a word
        except WoveError as exc:
            logger.warning("a connection from %s: %s", request.remote, exc)
        finally:
            self._sockets.discard(socket)
            self.service.hub.detach(listener)
            await socket.close()
        return socket

    async def say_goodbye(self, app: web.Application) -> None:
        for socket in list(self._sockets):
            await socket.close(code=1001, message=b"the service ends")

    async def _converse(self, socket: web.WebSocketResponse, verified: Verified, listener: Listener) -> None:
        # Both sides have contributed a nonce: what was recorded of one connection fits no other.
        nonce = secrets.token_hex(16)
        hello = encode_note(HELLO, v=VERSION, nonce=nonce, instance=self.service.instance)
        await socket.send_bytes(b"".join([Seal(verified.key, "hello").tag(hello), *hello]))
        key = channel_key(verified.key, nonce.encode())
        down = Seal(key, "down")
        writing = asyncio.create_task(_write(socket, listener, down))
        listener.deliver_now = partial(_send_now, socket, down, asyncio.get_running_loop())
        reading = asyncio.create_task(self._read(socket, listener, Seal(key, "up")))
        listening = asyncio.create_task(self._until_silent(listener))
        try:
            await asyncio.wait((reading, listening), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            listener.deliver_now = None
            for task in (writing, reading, listening):
                task.cancel()
            await asyncio.wait((writing, reading, listening))

    async def _until_silent(self, listener: Listener) -> None:
        # One look now and then: a limit for each message costs as much as the message.
        quiet = 0
        while quiet < SILENCE_LOOKS:
            quiet += 1
            if listener.heard:
                listener.heard, quiet = False, 0
            await asyncio.sleep(SILENCE_SECONDS / SILENCE_LOOKS)

    async def _read(self, socket: web.WebSocketResponse, listener: Listener, seal: Seal) -> None:
        reader = PacketReader(self.service.max_request)
        while True:
            message = await socket.receive()
            listener.heard = True
            if message.type is not WSMsgType.BINARY:
                return
            for raw in reader.feed(seal.open(memoryview(message.data))):
                self._take(Packet(raw), listener)

    def _take(self, packet: Packet, listener: Listener) -> None:
        hub = self.service.hub
        if packet.kind == ATTACH:
            unknown = hub.attach(packet.run_ids, listener)
            for at in range(0, len(unknown), MAX_LIST):
                listener.say(encode_note(UNKNOWN, run_ids=unknown[at : at + MAX_LIST]))
        elif packet.kind == ACK:
            hub.delivered(packet.run_ids)
        else:
            hub.take(packet, listener)


async def _write(socket: web.WebSocketResponse, listener: Listener, seal: Seal) -> None:
    try:
        while True:
            packets = await listener.take(PING_SECONDS)
            listener.ended.clear()  # the caller says itself which outcomes have arrived
            await send_packets(socket, packets, seal)
    except (ConnectionError, RuntimeError) as exc:
        # The reading side notices, too, and cleans up.
        logger.debug("a socket could not be written to: %s", exc)


def _send_now(
    socket: web.WebSocketResponse,
    seal: Seal,
    loop: asyncio.AbstractEventLoop,
    packets: Sequence[Sequence[Buffer]],
) -> bool:
    """Send what is small without a turn of the loop; tell whether it was."""
    if sum(memoryview(part).nbytes for parts in packets for part in parts) > SEND_NOW_BYTES:
        return False
    chunk = b"".join([piece for parts in packets for piece in framed(parts)])
    try:
        run_now(socket.send_bytes(seal.tag([chunk]) + chunk), loop)
    except Exception as exc:
        # The reading side notices, too, and cleans up; the outcome is kept for the next socket.
        logger.debug("a socket could not be written to: %s", exc)
    return True


async def send_packets(socket: Any, packets: Sequence[Sequence[Buffer]], seal: Seal) -> None:
    """Send packets over a socket, in chunks that are each signed."""
    pieces: list[Buffer] = []
    for parts in packets:
        pieces += framed(parts)
    for chunk in chunked(pieces, CHUNK):
        await socket.send_bytes(b"".join([seal.tag([chunk]), chunk]))
