"""The door of a listener that speaks TLS: who has not shaken hands yet is bounded too.

asyncio's own server shows a connection to nobody before its handshake is done, and gives that a minute: idle
connections would take the application's file descriptors, unseen by the guard.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.callback_server.guard import HEAD_SECONDS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

logger = logging.getLogger("wove.callback_server")

#: Connections that are taken from the kernel at a time.
ACCEPT_AT_ONCE = 64
#: Seconds that a handshake gets when others wait for its place.
CROWDED_SECONDS = 0.5
#: Seconds that a peer gets to say goodbye as TLS wants it.
GOODBYE_SECONDS = 2.0
#: Seconds after which a full house, or a system without file descriptors, is looked at again.
PAUSE_SECONDS = 0.05
#: How often, a millisecond apart, is looked for connections that were cut off and are open yet.
CUT_OFF_LOOKS = 500


class TlsDoor:
    """Accepts connections and hands them over once they speak TLS.

    Args:
        factory: makes the protocol of a connection.
        context: what TLS is spoken by.
        limit: handshakes under way at once; beyond it connections wait in the kernel.
    """

    def __init__(self, factory: Callable[[], Any], context: ssl.SSLContext, limit: int) -> None:
        self._factory = factory
        self._context = context
        self._limit = max(1, limit)
        self._loop = asyncio.get_running_loop()
        # In the order in which they came, with the time at which they did.
        self._shaking: dict[asyncio.Task[None], float] = {}
        self._sockets: list[socket.socket] = []
        self._connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    @property
    def handshakes(self) -> int:
        """How many are under way."""
        return len(self._shaking)

    def open(self, sockets: Sequence[socket.socket], backlog: int) -> None:
        """Accept from these bound sockets."""
        self._sockets = list(sockets)
        for listening in self._sockets:
            listening.listen(backlog)
            listening.setblocking(False)
            self._loop.add_reader(listening.fileno(), self._accept, listening)

    def close(self) -> None:
        """Accept no more, and break off handshakes."""
        for listening in self._sockets:
            if listening.fileno() >= 0:
                self._loop.remove_reader(listening.fileno())
        self._sockets = []
        for task in tuple(self._shaking):
            task.cancel()

    async def cut_off(self) -> None:
        """End every connection, those too whose peers owe TLS's own goodbye, and wait until they are closed.

        By their sockets: a TLS transport of asyncio's that was closed twice, as aiohttp does, has forgotten
        what it stands for, and aborting it does nothing.
        """
        for connection in tuple(self._connections):
            _cut(connection)
        for _ in range(CUT_OFF_LOOKS):
            if not any(connection.fileno() >= 0 for connection in tuple(self._connections)):
                return
            await asyncio.sleep(0.001)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if len(self._shaking) >= self._limit and not self._evict():
                self._pause(listening)
                return
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                logger.warning("no connection can be accepted at the moment: %s", exc.strerror)
                self._pause(listening)
                return
            connection.setblocking(False)
            self._connections.add(connection)
            task = self._loop.create_task(self._shake_hands(connection), name="wove-handshake")
            self._shaking[task] = self._loop.time()
            task.add_done_callback(partial(self._done, connection))

    def _evict(self) -> bool:
        """Break off the oldest handshake, if it has had its time."""
        oldest, begun = next(iter(self._shaking.items()))
        if self._loop.time() - begun < CROWDED_SECONDS:
            return False
        del self._shaking[oldest]
        oldest.cancel()
        return True

    def _pause(self, listening: socket.socket) -> None:
        self._loop.remove_reader(listening.fileno())

        def go_on() -> None:
            if listening in self._sockets:
                self._loop.add_reader(listening.fileno(), self._accept, listening)

        self._loop.call_later(PAUSE_SECONDS, go_on)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HEAD_SECONDS,
                ssl_shutdown_timeout=GOODBYE_SECONDS,
            )
        except (OSError, asyncio.CancelledError) as exc:
            # Strangers, scanners, workers with another authority: who they are is for their own logs.
            logger.debug("a TLS handshake failed: %s", type(exc).__name__)
            # Its transport owns it, and may be registered with the loop: that one sees the end, and closes it.
            _cut(connection)

    def _done(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._shaking.pop(task, None)
        if task.cancelled() or task.exception() is not None:
            connection.close()  # it was not begun, or never got a transport
        if not task.cancelled() and task.exception() is not None:
            logger.error("a connection could not be taken", exc_info=task.exception())


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it is closed, or its peer has gone
        connection.shutdown(socket.SHUT_RDWR)
