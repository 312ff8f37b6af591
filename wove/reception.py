"""Takes what an executor's workers say, until it stops receiving."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from wove.background import asked_to_stop
from wove.executors.base import EVENTS_PER_TURN, is_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.background import Background
    from wove.executors.base import EnvironmentExecutor
    from wove.frames import Frame


class Reception:
    """Has each event dealt with in turn.

    Args:
        executor: whose events these are.
        take: deals with one.
        fail: told why nothing comes back any more.

    Attributes:
        taken: how many events have come.
    """

    def __init__(
        self,
        executor: EnvironmentExecutor,
        take: Callable[[Frame], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._executor = executor
        self._take = take
        self._fail = fail
        self.taken = 0

    def start(self, background: Background, name: str) -> None:
        """Be called by the executor with each event where it can do so, else ask it for them in a task."""
        whole = is_whole(self._executor, "attach", "recv")
        if not (whole and self._executor.attach(self._take_attached)):
            background.spawn(self._receive(), name)

    async def _receive(self) -> None:
        try:
            while True:
                # By itself, so that the last of them is not held until the next one comes.
                await self._take_next()
        except asyncio.CancelledError as exc:
            if asked_to_stop():
                raise
            self._fail(exc)
        except Exception as exc:
            self._fail(exc)

    def _take_attached(self, frame: Frame) -> None:
        self.taken += 1
        try:
            self._take(frame)
        except Exception as exc:
            self._fail(exc)

    async def _take_next(self) -> None:
        frame = await self._executor.recv()
        self.taken += 1
        self._take(frame)
        if self.taken % EVENTS_PER_TURN == 0:
            await asyncio.sleep(0)
