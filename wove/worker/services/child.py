"""A worker process as its parent sees it: commands come over a private socket, events go back.

The socket's descriptor is named in ``WOVE_STDIO_FD``; standard input, output and error belong to the tasks.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from wove.errors import ConfigurationError
from wove.exchange import HELLO, SMALL_PACKET, VERSION, Packet, PacketReader, encode_note, framed
from wove.worker.services.output import capture_output
from wove.worker.services.runner import Runner
from wove.worker.services.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from wove.worker.allowed import AllowList

logger = logging.getLogger("wove.worker")

DESCRIPTOR = "WOVE_STDIO_FD"
SEARCH_PATH = "WOVE_STDIO_PATH"
#: How long a thread may keep the interpreter while others, such as the one that sends, wait for it.
SWITCH_SECONDS = 0.0005
#: Seconds that the interpreter gets to end by itself.
EXIT_SECONDS = 2.0
#: Buffers that one system call takes, and packets that may wait for their turn.
_MAX_BUFFERS = 256
MAX_WAITING = 1_000
#: Outcomes of short tasks that leave together, at most.
HELD_PACKETS = 8


def serve_parent(*, threads: int, allow: AllowList | None) -> None:
    """Run commands until the parent says so, or is gone.

    Raises:
        ConfigurationError: this process was not started by an executor or a service.
    """
    parent = Parent(_take_socket())
    for folder in reversed(os.environ.pop(SEARCH_PATH, "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    capture_output()
    sys.setswitchinterval(SWITCH_SECONDS)
    runner = Runner(threads=threads, allow=allow, backend="stdio")
    parent.send(encode_note(HELLO, v=VERSION, pid=os.getpid()))
    try:
        Turns(parent, runner).run()
    finally:
        runner.close_now()
        # Threads of the user's that do not end must not keep the process.
        last = threading.Timer(EXIT_SECONDS, os._exit, (0,))
        last.daemon = True
        last.start()


def _take_socket() -> socket.socket:
    text = os.environ.pop(DESCRIPTOR, "")
    if not text.isdigit():
        raise ConfigurationError(
            "a stdio worker is started by its executor, not by hand: put "
            '{"executor": "stdio"} into an environment definition'
        )
    connection = socket.socket(fileno=int(text))
    # The other side's process may have a default timeout for its sockets, which comes along.
    connection.setblocking(True)
    # What tasks start must not hold the line open when this process has died.
    connection.set_inheritable(False)
    return connection


class Parent:
    """The private socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = PacketReader()
        self._buffer = memoryview(bytearray(256 * 1024))
        self._lock = threading.Lock()
        self._waiting: deque[list[Buffer]] = deque()
        self._gone = False
        #: The thread whose packets wait for company.
        self._holder = 0

    def receive(self) -> list[Packet | None]:
        """Wait for the next commands; None stands for the end."""
        room = self._reader.room()
        count = self._socket.recv_into(self._buffer if room is None else room)
        if not count:
            return [None]
        if room is not None:
            done = self._reader.filled(count)
            return [] if done is None else [Packet(done)]
        return [Packet(raw) for raw in self._reader.feed(self._buffer[:count])]

    def emit(self, kind: str, parts: Sequence[Buffer]) -> None:
        """Send an event."""
        self.send(parts)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send a packet. While one thread sends, it sends for the others, too; all wait for a parent that is slow."""
        self._waiting.append(framed(parts))
        if self._holder and len(self._waiting) < HELD_PACKETS and self._holder == threading.get_ident():
            return
        self._flush()

    def hold(self) -> None:
        """Let what this thread sends wait for company, until :meth:`release`."""
        self._holder = threading.get_ident()

    def release(self) -> None:
        """Send what waits."""
        self._holder = 0
        if self._waiting:
            self._flush()

    def _flush(self) -> None:
        if len(self._waiting) > MAX_WAITING:
            with self._lock:
                self._send_waiting()
            return
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                self._send_waiting()
            finally:
                self._lock.release()

    def _send_waiting(self) -> None:
        while self._waiting and not self._gone:
            buffers: list[Buffer] = []
            while self._waiting and len(buffers) < _MAX_BUFFERS:
                buffers += self._waiting.popleft()
            if len(buffers) > 1 and all(memoryview(part).nbytes <= SMALL_PACKET for part in buffers):
                # As one: for each piece costs the system as much as a large one.
                buffers = [b"".join(buffers)]
            try:
                self._send_all([memoryview(part).cast("B") for part in buffers])
            except OSError as exc:
                # Without its parent this process ends: the reading side notices as well.
                self._gone = True
                logger.info("the parent is gone: %s", exc)
        if self._gone:
            self._waiting.clear()

    def _send_all(self, buffers: list[memoryview]) -> None:
        at = 0
        while at < len(buffers):
            sent = self._socket.sendmsg(buffers[at : at + _MAX_BUFFERS])
            while at < len(buffers) and sent >= buffers[at].nbytes:
                sent -= buffers[at].nbytes
                at += 1
            if sent:
                buffers[at] = buffers[at][sent:]
