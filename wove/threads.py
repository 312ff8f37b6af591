"""A pool of daemon threads: a call that never returns does not keep the process alive."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

#: How long, in seconds, an idle thread waits for work before it ends.
IDLE_SECONDS = 5.0


class DaemonPool:
    """Runs callables in at most ``size`` daemon threads, started as they are needed.

    ``concurrent.futures.ThreadPoolExecutor`` joins its threads when the interpreter ends;
    a broker client that hangs, or a user's function that never returns, would hang the
    exit with it.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._work = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._outstanding = 0
        self._closed = False

    def submit(self, func: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``func(*args)`` in a thread; cancelling the future keeps a queued call from starting.

        Raises:
            RuntimeError: the pool is closed, or the system starts no thread for it.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the thread pool {self._name!r} is closed")
            self._work.put((future, func, args))
            self._outstanding += 1
            # As many threads as calls that are queued or running, up to the size.
            if self._threads >= min(self._outstanding, self._size):
                return future
            self._threads += 1
            number = self._threads
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._threads -= 1
                nobody = not self._threads
            if nobody:
                future.cancel()  # nor is it run when there is a thread again
                raise
        return future

    @property
    def has_room(self) -> bool:
        """Whether fewer calls are queued or running than threads may be."""
        return self._outstanding < self._size

    def close_after(self) -> None:
        """Let the threads end after what was submitted; take no more."""
        with self._lock:
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._work.put(None)

    def close(self) -> None:
        """Let the threads end after the calls they are in; queued calls are cancelled."""
        with self._lock:
            self._closed = True
        while not self._work.empty():
            item = self._take(0)
            if item is not None:
                item[0].cancel()
        self.close_after()

    def _take(self, timeout: float) -> tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None:
        try:
            return self._work.get(timeout=timeout) if timeout else self._work.get_nowait()
        except queue.Empty:
            return None

    def _run(self) -> None:
        while True:
            item = self._take(IDLE_SECONDS)
            if item is None:
                with self._lock:
                    if self._closed or self._outstanding < self._threads:
                        self._threads -= 1
                        return
                continue
            _call(*item)
            del item  # an idle thread keeps nothing of the last call alive
            with self._lock:
                self._outstanding -= 1


async def in_thread(func: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking call in a daemon thread of its own.

    The application's default thread pool may be full of the application's own work.
    """
    import asyncio

    pool = DaemonPool(1, "wove-call")
    future = pool.submit(func, *args)
    pool.close_after()
    return await asyncio.wrap_future(future)


def _call(future: Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = func(*args)
    except BaseException as exc:
        # Handed over, not swallowed: whoever waits for the future gets it raised.
        future.set_exception(exc)
    else:
        future.set_result(result)
