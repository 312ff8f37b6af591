"""The event loop that gRPC calls are made in, and the way from there to the loop that asked for them."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from typing import Any


class Pipe:
    """Carries what a call yields from the loop of calls to the loop that it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._ready = asyncio.Event()

    def put(self, *items: Any) -> None:
        """Hand items over, from any thread."""
        self._items.extend(items)
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            pass  # that loop has ended, and whoever waited with it

    async def get(self) -> Any:
        """Return the next item, waiting for it."""
        while not self._items:
            self._ready.clear()
            if not self._items:  # another thread may have put one meanwhile
                await self._ready.wait()
        return self._items.popleft()


_loops: dict[int, asyncio.AbstractEventLoop] = {}
_own: dict[int, weakref.ref[asyncio.AbstractEventLoop]] = {}
_loops_lock = threading.Lock()


def loop_of_calls() -> asyncio.AbstractEventLoop:
    """Return the event loop that calls are made in: the running one, else this process's for gRPC.

    grpcio polls once per process, for all event loops: several that are open at once get in each other's way. So
    the loop that comes first makes its own calls, and others have theirs made in a thread that never ends.
    """
    running = asyncio.get_running_loop()
    pid = os.getpid()
    with _loops_lock:
        first = _own[pid]() if pid in _own else None
        if pid not in _loops and (first is None or first is running or first.is_closed()):
            _own[pid] = weakref.ref(running)
            return running
        loop = _loops.get(pid)
        if loop is None:
            loop = _loops[pid] = asyncio.new_event_loop()
            threading.Thread(target=_run_for_ever, args=(loop,), name="wove-grpc", daemon=True).start()
        return loop


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
