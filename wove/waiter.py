"""The caller's end of a run: a future that gets the outcome."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wove.errors import EnvironmentExecutionError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping

    from wove.delivery import Outcome, Run
    from wove.frames import Frame

    OnProgress = Callable[[Mapping[str, Any]], None]

logger = logging.getLogger("wove.dispatch")


class Waiter:
    """The caller's end of a run."""

    __slots__ = ("frame", "future", "on_progress", "sending", "unacknowledged")

    def __init__(self, future: asyncio.Future[Any], on_progress: OnProgress | None) -> None:
        self.future = future
        self.on_progress = on_progress
        self.sending: asyncio.Task[None] | None = None
        #: What was submitted, where it may have to be submitted again.
        self.frame: Frame | None = None
        #: What is to be said of a cancellation that nobody acknowledged.
        self.unacknowledged = ""

    def renew(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait anew: a cancelled future takes no outcome."""
        self.future = loop.create_future()
        self.on_progress = None

    def cancel(self, reason: str) -> None:
        """Cancel the caller's wait."""
        self.future.cancel(reason)

    def settle(self, outcome: Outcome) -> None:
        """Hand the outcome over."""
        if self.future.done():
            return
        if outcome.kind == "result":
            self.future.set_result(outcome.value)
        elif outcome.exception is not None:
            self.future.set_exception(outcome.exception)
        else:
            self.future.set_exception(_remotely_cancelled(outcome.run))
        # A caller that was cancelled meanwhile does not fetch it.
        if self.future.done() and not self.future.cancelled():
            self.future.exception()

    def report(self, frame: Frame) -> None:
        """Hand a progress or log frame over; a failing callback harms nobody."""
        if self.on_progress is None:
            return
        try:
            self.on_progress(frame)
        except Exception:
            logger.exception("on_progress failed for run %s", frame.get("run_id"))


def _remotely_cancelled(run: Run) -> Exception:
    return EnvironmentExecutionError(
        {
            "kind": "TaskCancelled",
            "message": f"run {run.run_id} of {run.task_id} was cancelled on the other side, not by its caller",
            "traceback": "",
            "retryable": False,
            "source": "backend",
        }
    )
