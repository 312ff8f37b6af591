"""The thread and the event loop in which an adapter's methods run."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from wove.errors import SubmitError
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: Seconds that the thread gets to end.
JOIN_SECONDS = 0.5


class Lane:
    """Whatever an adapter does here, the caller's loop stays free and the caller's deadline holds."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"wove-lane-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            _cancel_all(self._loop)
            self._loop.close()

    async def call(self, method: Callable[[], Awaitable[Any]], seconds: float, what: str) -> Any:
        """Await ``method()`` in the lane.

        Args:
            method: called in the lane's thread.
            seconds: how long it may take.
            what: the adapter's method, for messages.

        Raises:
            SubmitError: it took longer, or ended in a way that would end the lane.
            Exception: what it raised.
        """
        future = asyncio.run_coroutine_threadsafe(self._guarded(method, what), self._loop)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not limit.expired():
                raise  # the adapter's own
            raise SubmitError(
                f"the adapter's {what}() took longer than {seconds:g} s", maybe_accepted=what == "submit"
            ) from None

    async def _guarded(self, method: Callable[[], Awaitable[Any]], what: str) -> Any:
        task = asyncio.current_task()
        try:
            return await method()
        except asyncio.CancelledError as exc:
            if self._stopping or (task is not None and task.cancelling()):
                raise
            raise SubmitError(f"the adapter's {what}() was cancelled from within") from exc
        except Exception:
            raise
        except BaseException as exc:
            # SystemExit would end the loop, and with it every later call.
            raise SubmitError(f"the adapter's {what}() raised {type(exc).__name__}: {exc}") from exc

    async def stop(self) -> None:
        """End the loop; a call that hangs keeps its daemon thread, and nothing else."""
        self._stopping = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        await in_thread(self._thread.join, JOIN_SECONDS)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=JOIN_SECONDS))
