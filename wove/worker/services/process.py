"""One child process: its private socket, its output, the runs it has."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from wove.exchange import SMALL_PACKET, Packet, PacketReader, framed
from wove.worker.context import MAX_MESSAGE
from wove.worker.services.child import DESCRIPTOR

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

logger = logging.getLogger("wove.worker")

#: Bytes read at once, and how often before others have their turn.
_READ = 256 * 1024
_TURNS = 16
_PACKETS = 200
_MAX_BUFFERS = 256
#: Seconds between the end of the line and the end of the process, at most.
_GRACE_SECONDS = 1.0


class Child:
    """A worker process, spoken with from one thread.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: str | os.PathLike[str] | None
    ) -> None:
        self.runs: dict[str, Any] = {}
        self.accepted = 0
        self.ready = False
        self.closed = False
        #: Whether the loop is told when it can be written to.
        self.writing = False
        #: Whether the last look at the socket left something unread.
        self.more = False
        self.idle_since = time.monotonic()
        #: Set when it is ready, or has ended.
        self.settled = threading.Event()
        self.exited = threading.Event()
        self.unsent: deque[memoryview] = deque()
        self._reader = PacketReader()
        self._buffer = memoryview(bytearray(_READ))
        self._words: deque[str] = deque(maxlen=20)
        self._partial: dict[Any, bytes] = {}
        self.socket, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(  # noqa: S603 - the user's own command
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={**env, DESCRIPTOR: str(theirs.fileno())},
                cwd=cwd,
                # Ctrl-C in a terminal is for the parent, which decides what becomes of its children.
                start_new_session=True,
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self.socket.setblocking(False)
        self.pipes: list[Any] = [self.process.stdout, self.process.stderr]
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    # --- the socket -----------------------------------------------------------

    def put(self, parts: Sequence[Buffer]) -> None:
        """Keep a packet for the next :meth:`flush`."""
        self.unsent.extend(memoryview(part).cast("B") for part in framed(parts))

    def flush(self) -> None:
        """Send what waits, as far as it fits, and others need not wait for their turn."""
        for _ in range(_TURNS):
            if not self.unsent:
                return
            try:
                sent = self.socket.sendmsg(_joined(self.unsent))
            except BlockingIOError:
                return
            except OSError:
                self.unsent.clear()  # it has ended, and its exit says the rest
                return
            while self.unsent and sent >= self.unsent[0].nbytes:
                sent -= self.unsent.popleft().nbytes
            if sent:
                self.unsent[0] = self.unsent[0][sent:]

    def receive(self) -> list[Packet | None]:
        """Return the packets that have arrived; None stands for the end."""
        packets: list[Packet | None] = []
        self.more = False
        for _ in range(_TURNS):
            room = self._reader.room()
            try:
                count = self.socket.recv_into(self._buffer if room is None else room)
            except BlockingIOError:
                return packets
            except ConnectionResetError:
                count = 0
            if not count:
                return [*packets, None]
            if room is not None:
                done = self._reader.filled(count)
                packets += [] if done is None else [Packet(done)]
            else:
                packets += [Packet(raw) for raw in self._reader.feed(self._buffer[:count])]
            if len(packets) >= _PACKETS or (packets and count < _READ):
                break  # others have their turn; or there was no more, and the loop says when there is
        self.more = True
        return packets

    # --- what it prints -------------------------------------------------------

    def read_output(self, pipe: Any) -> tuple[list[str], bool]:
        """Return what was printed there, in pieces of whole lines, and whether the pipe has ended."""
        data = self._partial.pop(pipe, b"")
        ended = False
        for _ in range(_TURNS):
            try:
                chunk = os.read(pipe.fileno(), _READ)
            except BlockingIOError:
                break
            except (OSError, ValueError):
                chunk = b""
            if not chunk:
                ended = True
                break
            data += chunk
        whole, _, rest = data.rpartition(b"\n")
        if ended or len(rest) > MAX_MESSAGE:
            whole, rest = data, b""
        if rest:
            self._partial[pipe] = rest
        return self._messages(whole.decode("utf-8", "replace").rstrip("\n")), ended

    def _messages(self, text: str) -> list[str]:
        if not text:
            return []
        lines = text.split("\n")
        self._words.extend(line[:500] for line in lines[-20:])
        messages: list[str] = []
        piece: list[str] = []
        size = 0
        for line in lines:
            for at in range(0, max(1, len(line)), MAX_MESSAGE):
                part = line[at : at + MAX_MESSAGE]
                if piece and size + len(part) + 1 > MAX_MESSAGE:
                    messages.append("\n".join(piece))
                    piece, size = [], 0
                piece.append(part)
                size += len(part) + 1
        messages.append("\n".join(piece))
        return messages

    def last_words(self) -> str:
        """Return the last lines it has printed."""
        return "\n".join(self._words)

    # --- its end --------------------------------------------------------------

    def kill(self) -> None:
        """End it, and what it has started in its session, at once."""
        if self.exited.is_set():
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has ended this moment

    def kill_soon(self, seconds: float = _GRACE_SECONDS) -> None:
        """End it unless it ends by itself."""

        def wait() -> None:
            if not self.exited.wait(seconds):
                logger.warning("worker process %d did not end by itself: killed", self.process.pid)
                self.kill()

        threading.Thread(target=wait, name=f"wove-kill-{self.process.pid}", daemon=True).start()

    def release(self) -> None:
        """Close what it was spoken with by."""
        self.closed = True
        self.socket.close()
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []


def _joined(unsent: deque[memoryview]) -> list[Buffer]:
    """Return what is to be sent next: small pieces as one, for each costs the system as much as a large one."""
    pieces: list[Buffer] = list(islice(unsent, _MAX_BUFFERS))
    if len(pieces) > 1 and all(memoryview(piece).nbytes <= SMALL_PACKET for piece in pieces):
        return [b"".join(pieces)]
    return pieces


def describe_exit(code: int | None) -> str:
    """Say how a process ended."""
    if code is None:
        return "closed its line"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"exited with {code}"
