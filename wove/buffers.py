"""Room for large bodies, which the system hands out only as it is written to."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: From this size on, in bytes, room is taken from the system itself.
MAPPED_FROM = 1024 * 1024


def room(size: int) -> memoryview:
    """Return writable memory of ``size`` bytes, zeroed.

    A large piece is mapped: a `bytearray` would be written to once before anything has come. It belongs to this
    process alone, and goes with the last object that refers to it. Huge pages are not asked for: where memory
    is handed to a machine as it is touched, a fresh one costs more than the small ones it stands for.
    """
    if size >= MAPPED_FROM:
        with suppress(OSError, AttributeError):  # elsewhere than on Linux
            return _mapped(size)
    return memoryview(bytearray(size))


def _mapped(size: int) -> memoryview:
    import mmap

    # Private: what a forked child writes to it must not appear here.
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def copied(data: Buffer) -> memoryview:
    """Return a writable copy."""
    view = memoryview(data).cast("B")
    copy = room(view.nbytes)
    copy[:] = view
    return copy
