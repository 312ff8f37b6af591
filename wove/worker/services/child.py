"""A worker process as its parent sees it: commands come over a private socket, events go back.

The socket's descriptor is named in ``WOVE_STDIO_FD``; standard input, output and error belong to the tasks.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from wove import frames
from wove.errors import ConfigurationError
from wove.exchange import HELLO, VERSION, Packet, PacketReader, encode_note, framed
from wove.worker.services.output import capture_output
from wove.worker.services.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from wove.worker.allowed import AllowList

logger = logging.getLogger("wove.worker")

DESCRIPTOR = "WOVE_STDIO_FD"
SEARCH_PATH = "WOVE_STDIO_PATH"
#: Seconds that the interpreter gets to end by itself.
EXIT_SECONDS = 2.0
#: Buffers that one system call takes.
_MAX_BUFFERS = 64


def serve_parent(*, threads: int, allow: AllowList | None) -> None:
    """Run commands until the parent says so, or is gone.

    Raises:
        ConfigurationError: this process was not started by an executor or a service.
    """
    parent = _Parent(_take_socket())
    for folder in reversed(os.environ.pop(SEARCH_PATH, "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    capture_output()
    runner = Runner(threads=threads, allow=allow, backend="stdio")
    parent.send(encode_note(HELLO, v=VERSION, pid=os.getpid()))
    try:
        _take_commands(parent, runner)
    finally:
        runner.close()
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
    # What tasks start must not hold the line open when this process has died.
    connection.set_inheritable(False)
    return connection


def _take_commands(parent: _Parent, runner: Runner) -> None:
    while True:
        for packet in parent.receive():
            if packet is None or packet.kind == frames.SHUTDOWN:
                return
            if packet.kind == frames.RUN_TASK:
                runner.run(packet, parent.emit)
            elif packet.kind == frames.CANCEL_TASK:
                runner.cancel(packet.run_id)


class _Parent:
    """The private socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = PacketReader()
        self._buffer = memoryview(bytearray(256 * 1024))
        self._lock = threading.Lock()
        self._gone = False

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
        """Send a packet; waits while the parent does not read."""
        buffers = [memoryview(part).cast("B") for part in framed(parts)]
        with self._lock:
            while buffers and not self._gone:
                try:
                    sent = self._socket.sendmsg(buffers[:_MAX_BUFFERS])
                except OSError as exc:
                    # Without its parent this process ends: the reading side notices as well.
                    self._gone = True
                    logger.info("the parent is gone: %s", exc)
                    return
                while buffers and sent >= buffers[0].nbytes:
                    sent -= buffers.pop(0).nbytes
                if sent:
                    buffers[0] = buffers[0][sent:]
