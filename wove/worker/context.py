"""What a running task can learn and say about its own run, and how others cancel it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Longest message of a progress or log frame, in characters.
MAX_MESSAGE = 8_000


class RunContext:
    """The running task's view of its run; get it with :func:`current`.

    Attributes:
        run_id: 32 hexadecimal characters, the same in the broker and in logs; empty
            when the function was called without Wove.
        task_id: the task's name.
        attempt: which attempt of the run this is, from 1.
        cancelled: becomes True when the caller no longer wants the result. A
            synchronous task that runs for long looks at it now and then.
    """

    __slots__ = ("_emit", "attempt", "cancelled", "run_id", "task_id")

    def __init__(self, run_id: str, task_id: str, attempt: int, emit: Callable[..., None] | None) -> None:
        self.run_id = run_id
        self.task_id = task_id
        self.attempt = attempt
        self.cancelled = False
        self._emit = emit

    def progress(self, fraction: float | None, message: str = "") -> None:
        """Report how far the task is.

        Args:
            fraction: from 0 to 1, or None when unknown.
            message: what it is doing, at most 8,000 characters.

        Raises:
            ValueError: the fraction is not within 0 and 1.
        """
        if fraction is not None:
            fraction = float(fraction)
            if not 0 <= fraction <= 1:
                raise ValueError(f"a progress fraction is from 0 to 1; got {fraction!r}")
        self._send(frames.PROGRESS, fraction=fraction, message=cut(str(message), MAX_MESSAGE))

    def log(self, message: str) -> None:
        """Send a line of text to whoever waits for the run, at most 8,000 characters."""
        self._send(frames.LOG, message=cut(str(message), MAX_MESSAGE))

    def _send(self, kind: str, **fields: Any) -> None:
        if self._emit is not None:
            self._emit(kind, **fields)


class Cancellable:
    """A run, as those see it who may cancel it.

    Attributes:
        context: the running task's view of it.
        on_cancel: stops what is executed, where that can be stopped.
    """

    __slots__ = ("context", "on_cancel")

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.on_cancel: Callable[[], None] | None = None

    def cancel(self) -> None:
        """The caller no longer wants the result. Callable from any thread."""
        if self.context.cancelled:
            return
        self.context.cancelled = True
        stop = self.on_cancel  # a task that ends at this moment takes it away
        if stop is not None:
            stop()


_current: ContextVar[RunContext] = ContextVar("wove_run")


def current() -> RunContext:
    """Return the context of the running task.

    Outside a run, as in a unit test of the function, a context that reports nowhere.
    """
    try:
        return _current.get()
    except LookupError:
        return RunContext("", "", 0, None)


@contextmanager
def bind(context: RunContext) -> Iterator[RunContext]:
    """Make ``context`` the current one within the block."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
