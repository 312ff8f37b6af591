"""What every worker does with a call, whichever way it came: load it, and report how it failed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError, PayloadRejectedError, WoveError, is_cancellation, is_time_limit
from wove.refusals import count_refusal
from wove.worker.fetching import FetchFailed, NotWanted
from wove.worker.hooks import keep

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    from wove.worker.context import RunContext
    from wove.worker.hooks import BackendHooks
    from wove.worker.session import Session

    T = TypeVar("T")

    class Job(Protocol):
        """What is to be called; an :class:`Assignment` is one."""

        task_id: str

        def load(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
            """Return the callable, its positional and its keyword arguments."""
            ...

    class Execution(Protocol):
        """One execution and where its outcome goes; a :class:`Session` is one."""

        context: RunContext
        worker: dict[str, Any]

        @property
        def assignment(self) -> Job:
            """What is to be called."""
            ...

        def fail(self, exc: BaseException, *, source: str = "task") -> None:
            """Deliver an error."""
            ...

        def acknowledge_cancel(self) -> None:
            """Deliver that the task was cancelled."""
            ...

        def lost(self, message: str) -> None:
            """Deliver that the delivery failed, and not the task."""
            ...


logger = logging.getLogger("wove.worker")


class TaskCancelledItself(RuntimeError):
    """An ``async`` task raised CancelledError although nobody had cancelled it."""


class _Call:
    """The user's function with its arguments."""

    __slots__ = ("_args", "_kwargs", "func")

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> Any:
        return self.func(*self._args, **self._kwargs)


def load_call(session: Execution, hooks: BackendHooks | None = None) -> _Call | None:
    """Return the call, or None for a run that is not wanted any more."""
    return load(session, lambda: _Call(*session.assignment.load()), hooks)


def load(session: Execution, loader: Callable[[], T], hooks: BackendHooks | None) -> T | None:
    """Return what ``loader`` returns, or None when nothing is to be executed; then that was reported.

    Raises:
        BaseException: what it raised, after that was reported.
    """
    try:
        return loader()
    except NotWanted:
        session.acknowledge_cancel()
        return None
    except FetchFailed as exc:
        # The delivery failed, and not the task: it may be made again.
        session.lost(str(exc))
        return None
    except BaseException as exc:
        explain_failed_load(session, exc)
        source = source_of(exc)
        if hooks is not None:
            hooks.ends(None, exc, source=source)
        session.fail(exc, source=source)
        raise


def source_of(exc: BaseException) -> str:
    """Tell where the failure to load a call, or to encode what it returned, arose: the time is the task's own."""
    return "task" if is_time_limit(exc) else "worker"


def explain_failed_load(session: Execution, exc: BaseException) -> None:
    """Note the refusal of a payload; tell with a failure to load a call what mends it."""
    worker, task_id = session.worker, session.assignment.task_id
    if isinstance(exc, PayloadRejectedError):
        note_refusal(exc, "payload of task %s rejected: %s", task_id, exc)
        return
    if is_time_limit(exc):
        return
    exc.add_note(
        f"the worker on {worker['host']} (pid {worker['pid']}) could not load {task_id} "
        "or its arguments: install the code there that the submitter has (or set PYTHONPATH), or send it by value "
        "with cloudpickle.register_pickle_by_value(module)"
    )


def note_refusal(exc: WoveError, message: str, *args: object) -> None:
    """Count the refusal of a payload, and log it; the record has its reason as ``wove_refusal``."""
    if isinstance(exc, PayloadRejectedError):
        reason = exc.reason
    else:
        reason = "settings" if isinstance(exc, ConfigurationError) else "malformed"
    count_refusal(f"payload:{reason}")
    logger.error(message, *args, extra={"wove_refusal": reason})


def has_leave(session: Session, hooks: BackendHooks, *, redelivered: bool | int) -> bool:
    """Tell whether a run, or a batch, may start.

    Raises:
        Exception: the backend's time limit has struck meanwhile, which is the run's error then.
    """
    try:
        return session.may_start(redelivered=redelivered, unseen=hooks.unseen)
    except Exception as exc:
        struck_early(session, exc, hooks, redelivered=redelivered)
        raise


def struck_early(session: Session, exc: Exception, hooks: BackendHooks, *, redelivered: bool | int) -> None:
    """Deliver a time limit that has struck before the run had leave to start, and raise it; pass over anything else."""
    # Of what is delivered again, another execution may be under way: that is to end the run.
    if is_time_limit(exc) and not redelivered:
        end_in_failure(session, exc, hooks)


def end_in_failure(session: Session, exc: BaseException, hooks: BackendHooks) -> None:
    """Deliver the failure and raise it, or say that the backend will run the payload again."""
    wanted = not (session.context.cancelled and is_cancellation(exc))
    if wanted and hooks.runs_again(exc):
        session.retried(exc)
        raise exc
    try:
        report_failure(session, exc, hooks)
    except BaseException as reported:
        keep(session, hooks, failure=reported)
        raise


def report_failure(session: Execution, exc: BaseException, hooks: BackendHooks | None = None) -> None:
    """Deliver the failure, then raise it, unless it was the cancellation that was asked for."""
    if is_cancellation(exc):
        if session.context.cancelled:
            session.acknowledge_cancel()
            return
        exc = cancelled_itself(exc)
    if hooks is not None:
        hooks.ends(None, exc)
    session.fail(exc)
    raise exc


def cancelled_itself(exc: BaseException) -> TaskCancelledItself:
    """Return what stands for a CancelledError that nobody has asked for."""
    failure = TaskCancelledItself("the task raised CancelledError although nobody had cancelled it")
    failure.__cause__ = exc
    return failure
