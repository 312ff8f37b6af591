"""What this process holds: memory, descriptors, threads, tasks; and how long its loop was held up."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_TICK = 0.02


class Vitals(NamedTuple):
    """A look at this process."""

    rss: int
    descriptors: int
    threads: frozenset[str]

    @classmethod
    def take(cls) -> Vitals:
        """Look now."""
        gc.collect()
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
        names = frozenset(thread.name for thread in threading.enumerate())
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), names)


def own_time() -> float:
    """Return monotonic seconds without those in which this thread could have run, and others had the processor.

    What a loop is held up by that others do on the machine is not its own fault.
    """
    try:
        with open("/proc/thread-self/schedstat", "rb") as schedstat:
            waited = int(schedstat.read().split()[1])
    except (OSError, IndexError):  # a kernel that does not count it
        waited = 0
    return time.monotonic() - waited / 1e9


class LoopLag:
    """The longest time that the event loop was held up."""

    def __init__(self) -> None:
        self.longest = 0.0

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Watch the running loop."""
        ticker = asyncio.create_task(self._tick(), name="loop-lag")
        try:
            yield
        finally:
            ticker.cancel()
            await asyncio.wait([ticker])

    async def _tick(self) -> None:
        while True:
            before = own_time()
            await asyncio.sleep(_TICK)
            self.longest = max(self.longest, own_time() - before - _TICK)


def tasks_left() -> list[str]:
    """Return the names of the running loop's other tasks."""
    return sorted(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task())
