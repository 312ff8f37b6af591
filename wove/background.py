"""The tasks that an environment has under way beside its callers' own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

#: Seconds that tasks which were cancelled get to end.
END_SECONDS = 0.3


class Background:
    """Keeps a reference to each of them, as the loop alone would let a task be collected.

    Args:
        loop: where they run.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._farewells: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task."""
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def say_farewell(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task that stopping waits for: a message to a worker or to the backend."""
        self.await_farewell(self.spawn(work, name))

    def await_farewell(self, task: asyncio.Task[None]) -> None:
        """Have stopping wait for a task that was started before."""
        if not task.done():
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    async def farewells(self, seconds: float) -> None:
        """Wait so long at most for what stopping waits for."""
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=seconds)

    async def end(self) -> None:
        """Cancel all of them."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)


def asked_to_stop() -> bool:
    """Tell whether the current task was cancelled, and not just met a CancelledError."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
