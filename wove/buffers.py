"""Room for large bodies, which the system hands out only as it is written to."""

from __future__ import annotations

import os
import weakref
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


class Original:
    """Bytes of which everybody gets a copy of their own: a page is copied when it is written to.

    Where the system knows no such thing, and for small ones, each copy is made whole.

    Attributes:
        data: the bytes; nobody writes to them once there are copies.
    """

    __slots__ = ("__weakref__", "_file", "data")

    def __init__(self, size: int) -> None:
        self._file: int | None = None
        if size >= MAPPED_FROM:
            with suppress(OSError, AttributeError):  # elsewhere than on Linux, or not allowed
                self.data, self._file = _shared_memory(size)
                weakref.finalize(self, os.close, self._file)
                return
        self.data = room(size)

    def copy(self) -> memoryview:
        """Return a writable copy."""
        if self._file is None:
            return copied(self.data)
        import mmap

        return memoryview(mmap.mmap(self._file, self.data.nbytes, flags=mmap.MAP_PRIVATE))


def _shared_memory(size: int) -> tuple[memoryview, int]:
    import mmap

    file = os.memfd_create("wove", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, size)
        return memoryview(mmap.mmap(file, size)), file
    except BaseException:
        os.close(file)
        raise
