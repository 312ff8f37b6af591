"""What crosses between a network executor and its worker service: commands there, events back.

A *packet* is one message of :mod:`wove.wire`: an envelope that holds a command or an event, then attachments
with the user's values. On a stream each packet is preceded by its length (u32), which counts the signature
that may stand before the packet.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.backend import encode_arguments
from wove.errors import ProtocolError, lost, normalize_exception, safe_text
from wove.remote_errors import decode_exception
from wove.wire import decode_value, encode_callable, encode_light, pack_message, unpack_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from wove.frames import Frame

VERSION = 1
#: Largest packet, in bytes, unless a setting says otherwise.
MAX_PACKET = 1024 * 1024 * 1024

#: Commands and events that only the two ends of a connection speak of.
ATTACH = "attach"
ACK = "ack"
HELLO = "hello"
PING = "ping"
UNKNOWN = "unknown"
#: Metadata at the head of a gRPC answer: the commands were taken. A head alone does not say so, as an error has one too.
TAKEN = "wove-taken"
#: Entries of a list within an envelope; longer ones are sent in several packets.
MAX_LIST = 60

#: Packets up to this size, in bytes, are copied rather than kept in pieces.
SMALL_PACKET = 16 * 1024

_LENGTH = struct.Struct(">I")


def encode_run(frame: Frame, reference: str | None = None) -> list[Buffer]:
    """Encode a ``run_task`` command.

    Args:
        frame: the command.
        reference: the callable's name, where that was looked up and the arguments were seen to be scalars.

    Raises:
        EncodeError: the callable or an argument cannot be sent; names it.
    """
    attachments: list[Buffer] = []
    delivery = frame.get("delivery") or {}
    positional, keywords = list(frame.get("positional", ())), dict(frame["args"])
    encode = encode_arguments if reference is None else _encode_scalars
    envelope = {
        "type": frames.RUN_TASK,
        "v": VERSION,
        "run_id": frame["run_id"],
        "task_id": frame["task_id"],
        "attempt": delivery.get("attempt", 1),
        "heartbeat": delivery.get("heartbeat_seconds"),
        "keep": delivery.get("keep", False),
        "max_body": frame.get("max_body"),
        "callable": reference or encode_callable(frame["callable"], attachments),
        "args": encode(positional, keywords, attachments),
    }
    return pack_message(envelope, attachments)


def _encode_scalars(positional: list[Any], keywords: dict[str, Any], attachments: list[Buffer]) -> list[Any]:
    return encode_light([positional, keywords], attachments)


def encode_cancel(run_id: str) -> list[Buffer]:
    """Encode a ``cancel_task`` command."""
    return pack_message({"type": frames.CANCEL_TASK, "run_id": run_id}, [])


def encode_note(kind: str, **fields: Any) -> list[Buffer]:
    """Encode a command or an event that holds no user's value."""
    return pack_message({"type": kind, **fields}, [])


def lost_frame(run_id: str, task_id: str, message: str, *, attempt: int = 1, seq: int = 1) -> Frame:
    """Build the event that ends a run whose worker is gone: the waiter gets ``WorkerLostError``."""
    return frames.event(frames.TASK_ERROR, run_id, task_id, attempt, seq, error=lost(message))


class Packet:
    """A packet that was received: its envelope, decoded under tight limits, and raw attachments."""

    __slots__ = ("attachments", "envelope", "raw")

    def __init__(self, raw: Buffer) -> None:
        """Open a packet that was verified.

        Raises:
            ProtocolError: it is malformed.
        """
        self.raw = raw
        self.envelope, self.attachments = unpack_message(raw)
        if type(self.envelope.get("type")) is not str:
            raise ProtocolError("a packet's type is a string")

    @property
    def kind(self) -> str:
        """Its type."""
        kind: str = self.envelope["type"]
        return kind

    @property
    def run_id(self) -> str:
        """The run that it speaks of.

        Raises:
            ProtocolError: it names none.
        """
        run_id = self.envelope.get("run_id")
        if not frames.is_run_id(run_id):
            raise ProtocolError(f"{self.kind[:40]}: run_id is not 32 hexadecimal characters")
        return str(run_id)

    @property
    def task_id(self) -> str:
        """The name of its task."""
        return safe_text(self.envelope.get("task_id"), 1_000)

    @property
    def attempt(self) -> int:
        """Which attempt of its run it speaks of, from 1."""
        attempt = self.envelope.get("attempt")
        return attempt if isinstance(attempt, int) and attempt > 0 else 1

    @property
    def run_ids(self) -> list[str]:
        """The runs that it lists.

        Raises:
            ProtocolError: it lists none, or something else.
        """
        listed = self.envelope.get("run_ids")
        if type(listed) is not list or not all(frames.is_run_id(run_id) for run_id in listed):
            raise ProtocolError(f"{self.kind[:40]}: run_ids is a list of run ids")
        return listed

    @property
    def is_terminal(self) -> bool:
        """Whether it ends its run."""
        return self.kind in frames.TERMINAL

    @property
    def needs_care(self) -> bool:
        """Whether decoding may run code of the user's, or take long: not on an event loop."""
        if not self.attachments:
            return False
        result = self.envelope.get("result")
        if type(result) is not list or not result or result[0] == "pickle":
            return True
        return sum(part.nbytes for part in self.attachments) > 64 * 1024

    def event(self) -> Frame:
        """Decode an event. Only for verified bytes: a pickle runs code.

        A result that cannot be rebuilt here is an error of its run, and of no other.

        Raises:
            ProtocolError: the event is malformed.
        """
        frame: Frame = self.envelope
        frames.check_event(frame)
        if "exception" in frame:
            frame["exception"] = decode_exception(frame["exception"], self.attachments)
        if "result" in frame:
            decode_result(frame, self.attachments)
        return frame


def decode_result(
    frame: Frame,
    attachments: Sequence[memoryview],
    rebuild: Callable[[Any, Sequence[memoryview]], Any] = decode_value,
) -> None:
    """Decode the result in ``frame``; where it cannot be rebuilt the frame becomes a ``task_error``.

    Raises:
        ProtocolError: it is malformed.
    """
    try:
        frame["result"] = rebuild(frame["result"], attachments)
    except ProtocolError:
        raise
    except BaseException as exc:
        # Its class is missing here, say, or its module calls sys.exit(): that ends one run and nothing else.
        text = f"the result cannot be rebuilt in the submitter: {type(exc).__name__}: {safe_text(exc, 500)}"
        error = {**normalize_exception(exc, source="executor"), "kind": "ResultDecodeError", "message": text}
        del frame["result"]
        frame.update(type=frames.TASK_ERROR, error=error)


def framed(parts: Sequence[Buffer], tag: bytes = b"") -> list[Buffer]:
    """Return a packet as it stands on a stream: its length, its signature, its bytes."""
    if len(parts) == 1 and type(part := parts[0]) is bytes and len(part) <= SMALL_PACKET:
        return [b"".join((_LENGTH.pack(len(tag) + len(part)), tag, part))]
    size = len(tag) + sum(memoryview(part).nbytes for part in parts)
    return [_LENGTH.pack(size) + tag, *parts]


def split_packets(body: Buffer, limit: int = MAX_PACKET) -> Iterator[memoryview]:
    """Split a whole body into its packets.

    Raises:
        ProtocolError: the packets do not fill the body.
    """
    view = memoryview(body)
    at = 0
    while at < view.nbytes:
        if view.nbytes - at < _LENGTH.size:
            raise ProtocolError("a packet is cut short")
        (size,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if size > limit or at + size > view.nbytes:
            raise ProtocolError("a packet is longer than its body, or than allowed")
        yield view[at : at + size]
        at += size


class PacketReader:
    """Cuts a stream into packets. A large packet is gathered in one buffer of its own.

    Args:
        limit: largest packet, in bytes.
    """

    __slots__ = ("_at", "_body", "_head", "_limit")

    def __init__(self, limit: int = MAX_PACKET) -> None:
        self._limit = limit
        self._head = bytearray()
        self._body: bytearray | None = None
        self._at = 0

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two packets."""
        return self._body is None and not self._head

    def feed(self, data: Buffer) -> list[memoryview]:
        """Take the next bytes and return the packets that they complete.

        Raises:
            ProtocolError: a packet is larger than the limit; the stream cannot be read on.
        """
        view = memoryview(data)
        done: list[memoryview] = []
        if self.idle:
            view = self._take_small(view, done)
        while view.nbytes or (self._body is not None and self._at == len(self._body)):
            if self._body is None:
                view = self._read_head(view)
                continue
            taken = view[: len(self._body) - self._at]
            self._body[self._at : self._at + taken.nbytes] = taken
            self._at += taken.nbytes
            view = view[taken.nbytes :]
            if self._at == len(self._body):
                done.append(memoryview(self._body))
                self._body = None
        return done

    def _take_small(self, view: memoryview, done: list[memoryview]) -> memoryview:
        """Take the small packets that are there as a whole, which most are; return what follows them."""
        at, end = 0, view.nbytes
        while at + _LENGTH.size <= end:
            (size,) = _LENGTH.unpack_from(view, at)
            after = at + _LENGTH.size + size
            if size > SMALL_PACKET or size > self._limit or after > end:
                break
            # A copy: what it is read into is read into again.
            done.append(memoryview(bytes(view[at + _LENGTH.size : after])))
            at = after
        return view[at:]

    def room(self) -> memoryview | None:
        """Return where the rest of a large packet belongs, to be read into directly, or None."""
        if self._body is None or len(self._body) - self._at < 65_536:
            return None
        return memoryview(self._body)[self._at :]

    def filled(self, count: int) -> memoryview | None:
        """Say how many bytes were read into :meth:`room`; return the packet when that completes it."""
        self._at += count
        if self._body is None or self._at < len(self._body):
            return None
        done, self._body = memoryview(self._body), None
        return done

    def _read_head(self, view: memoryview) -> memoryview:
        wanted = _LENGTH.size - len(self._head)
        self._head += view[:wanted]
        if len(self._head) == _LENGTH.size:
            (size,) = _LENGTH.unpack(self._head)
            if size > self._limit:
                raise ProtocolError(f"a packet of {size} bytes is larger than allowed ({self._limit})")
            self._head.clear()
            self._body = bytearray(size)
            self._at = 0
        return view[wanted:]


def chunked(pieces: Sequence[Buffer], size: int) -> Iterator[bytes | memoryview]:
    """Cut the bytes of a stream into chunks of at most ``size``, small pieces joined."""
    small: list[Buffer] = []
    waiting = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if waiting and waiting + view.nbytes > size:
            yield b"".join(small)
            small, waiting = [], 0
        if view.nbytes > size:
            for at in range(0, view.nbytes, size):
                yield view[at : at + size]
            continue
        small.append(view)
        waiting += view.nbytes
    if small:
        yield b"".join(small)
