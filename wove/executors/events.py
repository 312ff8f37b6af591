"""Commands out, events in: what the executors share that carry packets."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import EncodeError, normalize_exception
from wove.exchange import Packet, encode_run
from wove.plain_data import TAG
from wove.threads import DaemonPool
from wove.wire import importable_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from wove.frames import Frame

logger = logging.getLogger("wove.executors")

#: Threads that encode arguments and rebuild results: one that hangs holds up few others.
ENCODERS = 4
DECODERS = 4
#: Longest text and most arguments that are encoded on the event loop.
_LIGHT_TEXT = 4_000
_LIGHT_ARGUMENTS = 16
_LIGHT_SCALARS = frozenset({type(None), bool, int, float})


def light_reference(frame: Frame) -> str | None:
    """Return the callable's name if the command is encoded in microseconds, without the caller's own code."""
    positional, keywords = frame.get("positional", ()), frame["args"]
    if len(positional) + len(keywords) > _LIGHT_ARGUMENTS:
        return None
    for value in (*positional, *keywords.values()):
        kind = type(value)
        if kind not in _LIGHT_SCALARS and (kind not in (str, bytes) or len(value) > _LIGHT_TEXT):
            return None
    if any(type(name) is not str or name == TAG for name in keywords):
        return None
    return importable_reference(frame["callable"])


class CommandEncoder:
    """Turns ``run_task`` commands into packets, those that may take long in threads of its own.

    Args:
        name: the environment's.
    """

    def __init__(self, name: str) -> None:
        self._pool = DaemonPool(ENCODERS, f"wove-encode-{name}")

    def encode_light(self, frame: Frame) -> list[Buffer] | None:
        """Encode a command that takes microseconds, and no other.

        Raises:
            EncodeError: the callable or an argument cannot be sent; names it.
        """
        reference = light_reference(frame)
        return None if reference is None else encode_run(frame, reference)

    async def encode(self, frame: Frame) -> list[Buffer]:
        """Encode a command.

        Raises:
            EncodeError: the callable or an argument cannot be sent; names it.
        """
        light = self.encode_light(frame)
        if light is not None:
            return light
        # Encoding runs the caller's code, and a large argument takes its time: not on the loop.
        return await asyncio.wrap_future(self._pool.submit(_encode_run, frame))

    def close(self) -> None:
        """Release the threads."""
        self._pool.close()


def _encode_run(frame: Frame) -> list[Buffer]:
    try:
        return encode_run(frame)
    except Exception:
        raise
    except BaseException as exc:
        # An argument whose pickling exits: an error of its own run only.
        raise EncodeError(f"encoding the arguments raised {type(exc).__name__}: {exc}") from exc


class EventDecoder:
    """Turns packets into frames, those that may take long in threads of its own.

    Args:
        put: takes frames, from any thread.
        name: the environment's.
    """

    def __init__(self, put: Callable[[list[Frame]], Any], name: str) -> None:
        self._put = put
        self._pool = DaemonPool(DECODERS, f"wove-decode-{name}")

    def take(self, kind: str, parts: Sequence[Buffer]) -> None:
        """Take an event as a worker service sends it."""
        self.take_packet(Packet(parts[0] if len(parts) == 1 else b"".join(parts)))

    def take_packet(self, packet: Packet) -> None:
        """Take a packet that was verified."""
        if packet.needs_care:
            # Only outcomes hold values of the user's: whatever came before them has been handed over.
            self._pool.submit(self._decode, packet)
        else:
            self._decode(packet)

    def _decode(self, packet: Packet) -> None:
        try:
            frame = packet.event()
        except Exception as exc:
            # A peer that breaks the rules harms its own run: that gets an error instead.
            logger.warning("a malformed event of run %s: %s", packet.envelope.get("run_id"), exc)
            frame = malformed(packet, exc)
        self._put([frame])

    def close(self) -> None:
        """Release the threads."""
        self._pool.close()


def malformed(packet: Packet, exc: Exception) -> Frame:
    """Return the error that takes a malformed event's place."""
    envelope = packet.envelope
    error = normalize_exception(exc, source="executor")
    run_id, task_id = str(envelope.get("run_id")), str(envelope.get("task_id"))
    return frames.event(frames.TASK_ERROR, run_id, task_id, 1, 1, error=error)
