"""Executes the runs of a batch one after another."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from wove.errors import is_cancellation, is_time_limit
from wove.worker.batch_session import BatchSession
from wove.worker.calls import cancelled_itself, explain_failed_load, has_leave, load, source_of
from wove.worker.context import bind
from wove.worker.courier import courier_for
from wove.worker.hooks import keep
from wove.worker.pace import measured

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.tables import Row
    from wove.worker.assignment import Assignment
    from wove.worker.context import Cancellable
    from wove.worker.hooks import BackendHooks

logger = logging.getLogger("wove.worker")


def run_batch(
    assignment: Assignment,
    backend: Mapping[str, Any] | None,
    hooks: BackendHooks,
    *,
    redelivered: bool | int,
) -> bool:
    """Execute the runs of a batch; as :func:`wove.worker.execution.run` for a single one.

    Returns:
        True when at least one of them was executed.

    Raises:
        BaseException: what the first of them that failed has raised, after all were executed and
            reported, so that the backend counts the message as failed.
    """
    session = BatchSession(assignment, backend)
    if not has_leave(session, hooks, redelivered=redelivered):
        logger.info("batch %s is not wanted (any more): skipped", assignment.run_id)
        hooks.refused(session)
        return False
    hooks.begins(session)
    with courier_for(assignment.origin).caring_for(session):
        loaded = load(session, assignment.load_batch, hooks)
        if loaded is None:
            keep(session, hooks)
            return False
        func, rows = loaded
        session.expect(len(rows))
        work = _Work(session, func, rows, hooks)
        try:
            work.execute()
        finally:
            # Also when a time limit strikes, or a task ends the process: nothing that is done is lost.
            try:
                session.give_back()
                session.deliver()
            finally:
                keep(session, hooks)
        if work.again is not None:
            # Those runs are open, and the fence keeps the others from being executed again.
            session.retried(
                work.again if isinstance(work.again, BaseException) else type(work.again).__name__
            )
    if isinstance(work.again, BaseException):
        raise work.again
    hooks.passed = work.again
    if work.failure is not None:
        raise work.failure
    return work.executed > 0


class _Work:
    """The execution of a batch."""

    def __init__(self, session: BatchSession, func: Any, rows: list[Row], hooks: BackendHooks) -> None:
        self._session = session
        self._func = func
        self._rows = rows
        self._hooks = hooks
        self.executed = 0
        #: What the first run that failed has raised.
        self.failure: BaseException | None = None
        #: What a run has raised or returned that the backend will retry.
        self.again: Any = None

    def execute(self) -> None:
        """Execute one run after another."""
        session = self._session
        with measured(session.assignment.function):
            while (place := session.next_place()) is not None:
                row = self._rows[place]
                item = session.begin(place, row[0])
                begun = time.monotonic()
                try:
                    self._run(place, row, item)
                finally:
                    session.end(time.monotonic() - begun)
                    self.executed += 1

    def _run(self, place: int, row: Row, item: Cancellable) -> None:
        session = self._session
        try:
            positional, keywords = session.assignment.decode_row(row)
            func = session.assignment.another(self._func) if self.executed else self._func
        except BaseException as exc:
            explain_failed_load(session, exc)
            self._fail(place, row[0], exc, source=source_of(exc))
            return
        try:
            with bind(item.context):
                result = func(*positional, **keywords)
                if hasattr(result, "__await__"):
                    from wove.worker.coroutines import drive

                    result = drive(result, item)
        except BaseException as exc:
            self._end_badly(place, row[0], item, exc)
            return
        if self._hooks.runs_again(result):
            self.again = result
            return
        try:
            session.add_result(place, row[0], result)
        except Exception as exc:
            if not is_time_limit(exc):
                raise
            self._end_badly(place, row[0], item, exc)  # as if the task had not come to its end

    def _end_badly(self, place: int, run_id: str, item: Cancellable, exc: BaseException) -> None:
        if is_cancellation(exc):
            if item.context.cancelled:
                self._session.add_cancelled(place)
                return
            exc = cancelled_itself(exc)
        if self._hooks.runs_again(exc):
            self.again = exc
            return
        self._fail(place, run_id, exc)

    def _fail(self, place: int, run_id: str, exc: BaseException, *, source: str = "task") -> None:
        self._session.add_error(place, run_id, exc, source=source)
        if self.failure is None:
            self.failure = exc
        if not isinstance(exc, Exception) or is_time_limit(exc):
            raise exc  # the process, or the time of the message, is at its end
