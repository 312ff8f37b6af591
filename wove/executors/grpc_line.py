"""A gRPC call that stays open: commands go up, events come down, and no run pays for a call of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from wove.errors import ProtocolError, WoveError
from wove.exchange import HELLO, PING, Packet, PacketReader, chunked, encode_note, framed
from wove.network_security import Seal, channel_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

#: Bytes of the stream in one message.
CHUNK = 512 * 1024
#: Seconds between two looks whether anything has come, at most.
LOOK_SECONDS = 5.0


class Line:
    """One open call. All methods are called in the event loop that it was opened in.

    Args:
        call: the call, of which nothing has been read yet.
        seals: what signs what goes up, and verifies what comes down.
        max_message: largest packet that is taken, in bytes.
        timeout: seconds of silence, while something is expected, after which the service is given up.
        take: takes the packets that have come, verified.
        ended: told once, with the reason, that nothing comes any more.
    """

    def __init__(
        self,
        call: Any,
        seals: tuple[Seal, Seal],
        *,
        max_message: int,
        timeout: float,
        take: Callable[[list[Packet]], None],
        ended: Callable[[Line, Exception], None],
    ) -> None:
        self._call = call
        self._up, self._down = seals
        self._reader = PacketReader(max_message)
        self._timeout = timeout
        self._take = take
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._outbox: list[Sequence[Buffer]] = []
        self._writing: asyncio.Task[None] | None = None
        self._reading = self._loop.create_task(self._read(), name="wove-grpc-line")
        self._heard = True
        self._quiet = 0.0
        self._pause = min(LOOK_SECONDS, max(0.02, timeout / 4))
        self._looking = self._loop.call_later(self._pause, self._look)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send a packet; what is sent in one turn of the loop leaves together."""
        self._outbox.append(parts)
        if self._writing is None:
            self._writing = self._loop.create_task(self._write(), name="wove-grpc-line-write")

    def close(self) -> None:
        """End the call; nobody is told."""
        self._ended = _nobody
        self._reading.cancel()

    async def _write(self) -> None:
        try:
            while self._outbox:
                outbox, self._outbox = self._outbox, []
                pieces: list[Buffer] = []
                for parts in outbox:
                    pieces += framed(parts)
                for chunk in chunked(pieces, CHUNK):
                    await self._call.write(b"".join((self._up.tag([chunk]), chunk)))
        except Exception:
            self._call.cancel()  # the reading side says what is wrong
        finally:
            self._writing = None

    async def _read(self) -> None:
        problem: Exception = ConnectionError("it ended the call")
        try:
            while isinstance(message := await self._call.read(), bytes):
                self._heard = True
                raws = self._reader.feed(self._down.open(memoryview(message)))
                if raws:
                    self._take([Packet(raw) for raw in raws])
            problem = ConnectionError(f"{(await self._call.code()).name}: {await self._call.details()}")
        except WoveError as exc:
            problem = exc
        except Exception as exc:
            problem = ConnectionError(str(exc) or type(exc).__name__)
        finally:
            self._looking.cancel()
            self._call.cancel()
            if self._writing is not None:
                self._writing.cancel()
            if self._quiet >= self._timeout:
                problem = ConnectionError(
                    f'nothing came from it for {self._timeout:g} s (executor_config["timeout"])'
                )
            self._ended(self, problem)

    def _look(self) -> None:
        """Ask whether anybody is there when nothing has come; give up when nothing comes for too long."""
        if self._heard:
            self._quiet = 0.0
        else:
            self._quiet += self._pause
            if self._quiet >= self._timeout:
                self._call.cancel()
                self._reading.cancel()
                return
            self.send(encode_note(PING))
        self._heard = False
        self._looking = self._loop.call_later(self._pause, self._look)


def _nobody(line: Line, problem: Exception) -> None:
    """Hear that a line has ended which was closed on purpose."""


def read_hello(message: object, key: bytes | None) -> tuple[Seal, Seal]:
    """Return the seals of a line whose first message this is.

    Args:
        message: the first message.
        key: the key that the answer to the call is signed with.

    Raises:
        NetworkSecurityError: it is not signed by somebody who holds the secret.
        ProtocolError: it is none.
    """
    if not isinstance(message, bytes):
        raise ProtocolError("the call has ended at once")
    hello = Packet(Seal(key, "hello").open(memoryview(message)))
    nonce = hello.envelope.get("nonce")
    if hello.kind != HELLO or not isinstance(nonce, str) or not 16 <= len(nonce) <= 64:
        raise ProtocolError("the call does not begin with a greeting")
    # Both sides have contributed a nonce: what was recorded of one line fits no other.
    shared = channel_key(key, nonce.encode())
    return Seal(shared, "up"), Seal(shared, "down")
