"""Wakes an environment for the next deadline of its runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds by which a timer is late when this process was suspended, and what an executor then
#: gets to hand over what it has received.
SUSPENDED_SECONDS = 3.0
CATCH_UP_SECONDS = 0.5
#: Turns of the loop that a deadline waits at most for events that have arrived and were not read yet.
MAX_CATCH_UP = 100


class Alarm:
    """One timer, set to the earliest of many deadlines.

    Args:
        loop: whose clock the deadlines are of.
        next_deadline: returns the earliest one, or None.
        progress: a number that grows while events are being read.
        expire: called once a deadline has passed, and all that came before it was read.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        next_deadline: Callable[[], float | None],
        progress: Callable[[], int],
        expire: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._next_deadline = next_deadline
        self._progress = progress
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None
        self._waking: set[asyncio.Task[None]] = set()

    def set(self) -> None:
        """Look whether there is an earlier deadline than the one that is waited for."""
        due = self._next_deadline()
        if due is None:
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._wake)

    def stop(self) -> None:
        """Wake no more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._waking:
            task.cancel()

    def _wake(self) -> None:
        timer, self._timer = self._timer, None
        late = self._loop.time() - timer.when() if timer is not None else 0.0
        task = self._loop.create_task(self._catch_up(late), name="wove-expire")
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def _catch_up(self, late: float) -> None:
        if late > SUSPENDED_SECONDS:
            # The whole process stood still, it may be: what came meanwhile is still to be read.
            await asyncio.sleep(CATCH_UP_SECONDS)
        # What has arrived counts, however late a busy loop comes to read it.
        for _ in range(MAX_CATCH_UP):
            read = self._progress()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if read == self._progress():
                break
        self._expire()
        self.set()
