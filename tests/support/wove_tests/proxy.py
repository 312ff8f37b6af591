"""A TCP proxy with bad weather: what a network does to connections, switched on and off at run time.

It runs in a thread of its own; its verbs may be called from any thread and have taken effect when they
return. One weather holds at a time, and ``up()`` is the good one. ::

    with TcpProxy("127.0.0.1", server_port) as proxy:
        ...  # clients connect to proxy.port
        proxy.reset()
        ...
        proxy.up()
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Callable

#: The way that bytes go: ``request`` from the client to the server, ``response`` back.
Direction = Literal["request", "response", "both"]

_LOOPBACK = "127.0.0.1"
_CHUNK = 64 * 1024
_BACKLOG = 512
_SWITCH_SECONDS = 5.0
#: Seconds without another piece of a request after which it is taken to be whole.
_WHOLE_AFTER = 0.05
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class _Passage:
    """What happens to bytes that go one way."""

    swallow: bool = False
    delay: float = 0.0
    jitter: float = 0.0
    piece: int = 0
    pause: float = 0.0
    cut_before: int = 0


@dataclass(frozen=True, slots=True)
class _Weather:
    """What happens to connections and to what passes through them."""

    name: str = "up"
    listening: bool = True
    resetting: bool = False
    request: _Passage = _Passage()
    response: _Passage = _Passage()


class _Cut(Exception):
    """The connection is to end here."""


class _Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.upstream: asyncio.StreamWriter | None = None
        self.task = asyncio.current_task()
        #: Bytes were swallowed: what came after them would be another conversation.
        self.spoiled = False
        #: Bytes of the response to the latest request that have passed.
        self.answered = 0
        #: When a piece of a request last came, by the loop's clock.
        self.asked_at = 0.0

    def cut(self, *, reset: bool = False) -> None:
        """End both connections; what they still hold is dropped."""
        if reset:
            sock = self.client.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        for writer in (self.client, self.upstream):
            if writer is not None:
                writer.transport.abort()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


class TcpProxy:
    """Listens on a loopback port and passes what comes to a server.

    Args:
        upstream_host: where the server listens.
        upstream_port: its port; it may start to listen later.
        seed: of the jitter.
    """

    def __init__(self, upstream_host: str, upstream_port: int, *, seed: int = 0) -> None:
        self._upstream = (upstream_host, upstream_port)
        self._random = random.Random(seed)
        self._weather = _Weather()
        self._links: set[_Link] = set()
        #: What may not be closed yet, because the other end does not read.
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._server: asyncio.Server | None = None
        #: How many pieces of data are on their way.
        self._passing = 0
        #: Connections accepted so far.
        self.accepted = 0
        #: Bytes that have passed, or been swallowed, by the way they went.
        self.passed: dict[Direction, int] = {"request": 0, "response": 0}
        # Bound, never listening: the port stays ours, and refuses connections, while the proxy is down.
        self._holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((_LOOPBACK, 0))
        self.port: int = self._holder.getsockname()[1]

    def __enter__(self) -> Self:
        ready: threading.Event = threading.Event()
        self._ended = asyncio.Event()
        self._switching = asyncio.Lock()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="tcp-proxy")
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._holder.close()

    # --- the verbs ----------------------------------------------------------------

    @property
    def upstream_port(self) -> int:
        """The port that the server listens on, or will."""
        return self._upstream[1]

    @property
    def weather(self) -> str:
        """The name of the verb that holds."""
        return self._weather.name

    def up(self) -> None:
        """Let everything pass. Connections that bytes were swallowed from are cut."""
        self._switch(_Weather())

    def down(self) -> None:
        """Refuse new connections and cut the existing ones."""
        self._switch(_Weather("down", listening=False), _Link.cut)

    def reset(self) -> None:
        """Reset (RST) the existing connections, and new ones as soon as they are accepted."""
        self._switch(_Weather("reset", resetting=True), lambda link: link.cut(reset=True))

    def black_hole(self, direction: Direction = "both") -> None:
        """Accept connections and swallow what is sent, ends of connections included."""
        self._switch(_in_direction("black_hole", direction, _Passage(swallow=True)))

    def cut_after_commit(self, before: int = 1) -> None:
        """Let whole requests through, and cut before byte ``before`` (from 1) of the response reaches the client."""
        self._switch(_in_direction("cut_after_commit", "response", _Passage(cut_before=before)))

    def latency(self, seconds: float, jitter: float = 0.0, direction: Direction = "both") -> None:
        """Hold each piece of data for ``seconds``, give or take ``jitter``."""
        self._switch(_in_direction("latency", direction, _Passage(delay=seconds, jitter=jitter)))

    def slicer(self, size: int = 16, pause: float = 0.0, direction: Direction = "both") -> None:
        """Pass data on in pieces of ``size`` bytes, with a pause after each."""
        self._switch(_in_direction("slicer", direction, _Passage(piece=size, pause=pause)))

    def cut(self) -> None:
        """Cut the connections that exist now, whatever the weather."""
        self._switch(self._weather, _Link.cut)

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self._passing)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._links)

    # --- in the thread ------------------------------------------------------------

    def _switch(self, weather: _Weather, treat: Callable[[_Link], None] | None = None) -> None:
        asyncio.run_coroutine_threadsafe(self._apply(weather, treat), self._loop).result(_SWITCH_SECONDS)

    async def _apply(self, weather: _Weather, treat: Callable[[_Link], None] | None) -> None:
        async with self._switching:
            self._weather = weather
            if weather.listening:
                await self._listen()
            else:
                await self._close_listener()
            for link in list(self._links):
                if treat is not None:
                    treat(link)
                elif link.spoiled:
                    link.cut()

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._listen()
        finally:
            ready.set()
        await self._ended.wait()
        self._weather = _Weather("down", listening=False)
        await self._close_listener()
        # Also those that are being accepted this moment; a task that never began would leave its connection open.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for link in list(self._links):
                link.cut()
            await asyncio.wait(others, timeout=0.05)
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)  # transports say in a turn of their own that they are closed

    async def _listen(self) -> None:
        if self._server is not None:
            return
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, self.port))
        self._server = await asyncio.start_server(self._serve, sock=listener, backlog=_BACKLOG)

    async def _close_listener(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        # asyncio drops a connection, without closing it, whose server is closed between its acceptance and its handler.
        for listening in server.sockets:
            self._loop.remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer)
        self._links.add(link)
        pumps: list[asyncio.Task[None]] = []
        try:
            self._writers.add(writer)
            if self._weather.resetting or not self._weather.listening:
                link.cut(reset=self._weather.resetting)
                return
            answers, link.upstream = await asyncio.open_connection(*self._upstream)
            self._writers.add(link.upstream)
            pumps += [
                asyncio.ensure_future(self._pump(link, reader, link.upstream, "request")),
                asyncio.ensure_future(self._pump(link, answers, writer, "response")),
            ]
            await asyncio.gather(*pumps)
        except (OSError, _Cut, asyncio.CancelledError):
            pass  # one of the ends has gone, or the weather took it
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            for end in (writer, link.upstream):
                if end is not None:
                    end.close()

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Literal["request", "response"],
    ) -> None:
        while True:
            data = await reader.read(_CHUNK)
            self.passed[way] += len(data)
            passage: _Passage = getattr(self._weather, way)
            if passage.swallow:
                link.spoiled = True
                if not data:
                    await asyncio.Event().wait()  # the other end does not hear of it; until the link is cut
                continue
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            if way == "request":
                link.answered = 0
                link.asked_at = self._loop.time()
            self._passing += 1
            try:
                await self._pass_on(link, data, writer, passage)
            finally:
                self._passing -= 1

    async def _pass_on(
        self, link: _Link, data: bytes, writer: asyncio.StreamWriter, passage: _Passage
    ) -> None:
        if passage.delay or passage.jitter:
            spread = self._random.uniform(-passage.jitter, passage.jitter)
            await asyncio.sleep(max(0.0, passage.delay + spread))
        last = passage.cut_before > 0 and link.answered + len(data) >= passage.cut_before
        if last:
            data = data[: passage.cut_before - 1 - link.answered]
        link.answered += len(data)
        size = passage.piece or len(data) or 1
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            if passage.piece:
                await asyncio.sleep(passage.pause)
        if last:
            # A server may begin to answer before it has all of a request, such as the EXEC that ends it.
            while self._loop.time() - link.asked_at < _WHOLE_AFTER:
                await asyncio.sleep(_WHOLE_AFTER / 5)
            raise _Cut


def _in_direction(name: str, direction: Direction, passage: _Passage) -> _Weather:
    clear = _Passage()
    return _Weather(
        name,
        request=passage if direction in ("request", "both") else clear,
        response=passage if direction in ("response", "both") else clear,
    )
