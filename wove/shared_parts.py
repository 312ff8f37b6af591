"""What the runs of one ``map`` have in common is encoded once, and fetched once by each worker process.

The function of a ``map`` may carry a lot: ``partial(score, model=weights)``, a bound method, a closure. Where it
goes by value, it is encoded at the first run and never again during that ``map``. From ``FETCH_FROM`` bytes
on it becomes a *part*: payloads name its digest, and workers fetch it from the callback server, which holds
it for as long as one of the runs is open.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from wove.wire import encode_callable, pack_message

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

#: Messages from this size, in bytes, do not pass through the broker: workers fetch them.
FETCH_FROM = 256 * 1024


class Part(NamedTuple):
    """Bytes that several payloads name by their digest.

    Attributes:
        message: they themselves, one buffer after another.
        size: how many they are.
        digest: their SHA-256.
    """

    message: list[Buffer]
    size: int
    digest: bytes

    @property
    def claim(self) -> list[Any]:
        """What payloads say of it."""
        return [self.size, self.digest]


def as_part(message: list[Buffer]) -> Part:
    """Return a message as a part."""
    digest = hashlib.sha256()
    for piece in message:
        digest.update(piece)
    return Part(message, size_of(message), digest.digest())


def size_of(pieces: list[Buffer]) -> int:
    """Return how many bytes these buffers have together."""
    return sum(memoryview(piece).nbytes for piece in pieces)


class SharedCallable:
    """The function of one ``map``. Thread-safe: whoever needs it first encodes it.

    Later changes to what it holds do not reach the runs of that ``map``; arrays that travel out of band
    must not be changed meanwhile at all.
    """

    __slots__ = ("_attachments", "_described", "_func", "_lock", "_part")

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func
        self._lock = threading.Lock()
        self._described: Any = None
        self._attachments: list[Buffer] = []
        self._part: Part | None = None

    def describe(self, attachments: list[Buffer]) -> Any:
        """Return its description, as :func:`wove.wire.encode_callable` does; ``attachments`` grow by its own.

        Raises:
            EncodeError: it cannot be sent.
        """
        with self._lock:
            self._encode()
        if type(self._described) is str:
            return self._described
        codec, first, count = self._described
        described = [codec, first + len(attachments), count]
        attachments.extend(self._attachments)
        return described

    def part(self) -> Part | None:
        """Return it as a part; None when it goes by name, or is small enough for every payload.

        Raises:
            EncodeError: it cannot be sent.
        """
        with self._lock:
            self._encode()
            if self._part is None and size_of(self._attachments) >= FETCH_FROM:
                self._part = as_part(pack_message({"callable": self._described}, self._attachments))
            return self._part

    def _encode(self) -> None:
        if self._described is None:
            attachments: list[Buffer] = []
            self._described = encode_callable(self._func, attachments)
            self._attachments = attachments
