"""A callback listener: one address, one thread, one event loop of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError

from wove.callback_server.beats import Beats
from wove.callback_server.contacts import Contacts
from wove.callback_server.door import TlsDoor
from wove.callback_server.events import Events
from wove.callback_server.express import Express
from wove.callback_server.guard import Guard
from wove.callback_server.routes import Routes
from wove.callback_server.run_table import OpenRuns
from wove.errors import ConfigurationError

if TYPE_CHECKING:
    from wove.callback_server.batches import OpenBatch
    from wove.callback_server.runs import OpenRun
    from wove.callback_server.tls import ListenerTls

logger = logging.getLogger("wove.callback_server")


class _NoPeerBytes(logging.Filter):
    """Drops aiohttp's reports of requests that are no HTTP: noise, and bytes of whoever sent them."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not issubclass(kind, HttpProcessingError)


_http_logger = logging.getLogger("wove.callback_server.http")
_http_logger.addFilter(_NoPeerBytes())

#: Connections that the kernel accepts while the loop is busy: a fleet reports all at once.
BACKLOG = 1024
#: Seconds that starting and stopping may take.
START_SECONDS = 10.0
STOP_SECONDS = 3.0


class CallbackListener:
    """Takes the events of all runs of this process that name its address.

    It has a thread and a loop of its own, so that a busy application neither delays
    workers nor is delayed by them.

    Args:
        host: the address to listen on.
        port: the port; 0 for a free one.
        tls: how it speaks TLS, or None.
    """

    def __init__(self, host: str, port: int, tls: ListenerTls | None = None) -> None:
        self.host = host
        self.port = port
        self.tls = tls
        self.runs = OpenRuns()
        self.contacts = Contacts()
        self.guard = Guard(self.contacts.lost, self.runs.forgive, "callback")
        self._events = Events(self.runs, self.contacts)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Listen. Blocks until the port is bound.

        Raises:
            ConfigurationError: the address cannot be bound; says what to change.
        """
        bound: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(bound,), name=f"wove-callback-{self.host}", daemon=True
        )
        self._thread.start()
        try:
            self.port = bound.result(START_SECONDS)
        except OSError as exc:
            raise ConfigurationError(self._explain(exc)) from exc

    def _explain(self, exc: OSError) -> str:
        if exc.errno == errno.EADDRINUSE:
            return (
                f"callback_port {self.port} on {self.host} is taken by another process: choose another "
                "callback_port, or 0 for any free one"
            )
        # The resolver's numbers are not the system's.
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror or str(exc)
        return (
            f"cannot listen on callback_host {self.host!r}, callback_port {self.port}: {reason}; callback_host is "
            "an address of this machine"
        )

    def stop(self) -> None:
        """Stop listening and end the thread. Idempotent."""
        thread, loop, stop = self._thread, self._loop, self._stop
        if thread is None:
            return
        self._thread = None
        if loop is not None and stop is not None and thread.is_alive():
            with suppress(RuntimeError):  # it has ended this moment
                loop.call_soon_threadsafe(stop.set)
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            logger.warning("the callback listener on %s:%s did not stop in time", self.host, self.port)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def close_in_child(self) -> None:
        """Give the inherited sockets up, in a forked child: the parent alone listens."""
        self._thread = None
        for inherited in self._sockets:
            os.close(inherited.detach())
        self._sockets = []

    # --- runs, from any thread ------------------------------------------------

    def open_run(self, run: OpenRun) -> None:
        """Take events for ``run``."""
        self.runs.add(run)

    def open_batch(self, batch: OpenBatch) -> None:
        """Take events for a batch and its members."""
        self.runs.add_batch(batch)

    def close_runs(self, run_ids: list[str], *, ended: bool = True) -> None:
        """Take no more events for these runs; ``ended`` tells whether they are over."""
        if any(run_id in self.runs for run_id in run_ids):
            self.runs.withdraw()  # this moment, however busy the loop is
        self._call(lambda: [self.runs.close(run_id, ended=ended) for run_id in run_ids])

    def wake_run(self, run: OpenRun) -> None:
        """Let the run's workers hear that another attempt has begun."""
        self._call(run.wake)

    def cancel_run(self, run_id: str) -> None:
        """Tell the run's worker to stop."""
        self.runs.withdraw()
        self._call(self.runs.cancel, run_id)

    async def take_parked(self, run_id: str, blob: bytes) -> None:
        """Take an outcome in that a worker has left with the backend; see :meth:`Events.take_parked`."""
        loop = self._loop
        if loop is None:
            return
        parked = self._events.take_parked(run_id, blob)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(parked, loop))

    def _call(self, func: Any, *args: Any) -> None:
        # In the loop's own thread: waking a held beat touches asyncio objects.
        if self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(func, *args)
            except RuntimeError:
                pass  # the loop has ended, and the runs with it

    # --- in the thread --------------------------------------------------------

    def _run(self, bound: Future[int]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve(bound))
        except BaseException as exc:
            if not bound.done():
                bound.set_exception(exc)
            else:
                logger.exception("the callback listener on %s:%s failed", self.host, self.port)
                self.runs.fail_all(exc)
            if not isinstance(exc, Exception):
                raise

    async def _serve(self, bound: Future[int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        beats = Beats(self.runs, self.guard, self.contacts)
        routes = Routes(self.runs, self.guard, beats, self._events)
        # None only until the runner is set up, and connections come later.
        express = Express(lambda: cast("Any", runner.server)(), routes.take_report, self.guard.seen)
        app = web.Application(middlewares=[express.middleware, self.guard.middleware], client_max_size=0)
        app.add_routes(routes.table())
        runner = web.AppRunner(
            app,
            access_log=None,
            logger=_http_logger,
            handle_signals=False,
            handler_cancellation=True,
            # The guard knows of every request, aiohttp only of some.
            keepalive_timeout=24 * 3600.0,
            lingering_time=0,
            auto_decompress=False,
            max_line_size=4096,
            max_field_size=4096,
            shutdown_timeout=0.25,
        )
        await runner.setup()
        sweeper: asyncio.Task[None] | None = None
        door: TlsDoor | None = None
        listening: asyncio.Server | None = None
        try:
            server = runner.server
            if server is None:
                raise RuntimeError("aiohttp started no server")
            listening = await self._loop.create_server(
                express,
                self.host,
                self.port,
                backlog=BACKLOG,
                reuse_address=True,
                # Who speaks TLS comes in by a door of its own.
                start_serving=self.tls is None,
            )
            # asyncio shows its sockets, and not what takes to close them in a forked child.
            self._sockets = [getattr(sock, "_sock", sock) for sock in listening.sockets]
            for accepting in self._sockets:
                _notice_black_holes(accepting)
            if self.tls is not None:
                door = TlsDoor(express, self.tls.context, self.guard.max_connections // 2)
                door.open(self._sockets, BACKLOG)
            sweeper = asyncio.create_task(self.guard.sweep(server))
            bound.set_result(int(self._sockets[0].getsockname()[1]))
            await self._stop.wait()
        finally:
            if sweeper is not None:
                sweeper.cancel()
            await self._accept_no_more()
            if door is not None:
                door.close()
            if listening is not None:
                listening.close()
            connections = runner.server.connections if runner.server is not None else []
            transports = [c.transport for c in connections if c.transport is not None]
            await runner.cleanup()
            for transport in transports:  # those too whose peers do not take what they were sent
                transport.abort()
            if door is not None:
                await door.cut_off()
            await _turns()  # what was dropped is closed in the loop's next turns

    async def _accept_no_more(self) -> None:
        """Leave off accepting, and let connections that were accepted this moment get their handlers.

        asyncio drops a connection, without closing it, whose server is closed between its
        acceptance and its handler; its worker would wait for an answer in vain.
        """
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            with suppress(OSError, NotImplementedError):
                loop.remove_reader(listening.fileno())
        await _turns()


async def _turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def _notice_black_holes(listening: Any) -> None:
    """Let the kernel find out that a peer does not answer any more; accepted sockets inherit this.

    A frozen process still answers: its kernel does. So this tells a dead line from a dead worker.
    """
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):
                listening.setsockopt(socket.IPPROTO_TCP, option, value)
    with suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
