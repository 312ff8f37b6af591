"""Runs a payload: verify, ask, execute, report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError, PayloadRejectedError, WoveError
from wove.refusals import count_refusal
from wove.worker.assignment import Assignment
from wove.worker.context import bind
from wove.worker.courier import courier_for
from wove.worker.fetching import FetchFailed, NotWanted
from wove.worker.hooks import BackendHooks
from wove.worker.pace import measured
from wove.worker.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from wove.worker.context import Cancellable, RunContext

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


def run(
    payload: bytes | str,
    *,
    backend: Mapping[str, Any] | None = None,
    redelivered: bool | int = False,
    hooks: BackendHooks | None = None,
) -> bool:
    """Execute a payload and deliver its outcome to the submitter.

    For backends that call a plain function. Synchronous callables run in the calling
    thread, coroutines on an event loop of their own.

    Args:
        payload: what the submitter's adapter was given: bytes, or base64 text.
        backend: ``{"backend": name, "job": id}``, shown in errors.
        redelivered: whether the backend says that it delivers the payload again, or how often it
            has run it before.
        hooks: what the backend does about failures and about outcomes that nobody takes.

    Returns:
        True when the function ran to its end; False when the run was cancelled, before
        it started or while it ran, or is in the hands of another worker.

    Raises:
        PayloadRejectedError: the payload is not signed with this worker's secret, or is one that the worker's
            settings do not admit; nothing ran.
        BaseException: what the user's function raised, after it was reported, so that
            the backend counts the task as failed too.
    """
    hooks = hooks or BackendHooks()
    session = _open(payload, backend)
    if session.assignment.batch is not None:
        # Loaded by those who need it: RQ workers pay for imports once per job.
        from wove.worker.batch import run_batch

        return run_batch(session.assignment, backend, hooks, redelivered=redelivered)
    if not session.may_start(redelivered=redelivered, unseen=hooks.unseen):
        logger.info("run %s is not wanted (any more): skipped", session.assignment.run_id)
        hooks.refused(session)
        return False
    hooks.begins(session)
    # Until the outcome is delivered: loading and encoding may take long as well.
    with courier_for(session.assignment.origin).caring_for(session):
        call = load_call(session, hooks)
        if call is None:
            keep(session, hooks)
            return False
        try:
            with bind(session.context), measured(session.assignment.function):
                result = call()
                if hasattr(result, "__await__"):
                    result = drive(result, session)
        except BaseException as exc:
            _report_failure(session, exc, hooks)
            return False
        _report_result(session, result, hooks)
        return True


async def arun(
    payload: bytes | str,
    *,
    backend: Mapping[str, Any] | None = None,
    redelivered: bool | int = False,
    hooks: BackendHooks | None = None,
) -> bool:
    """Execute a payload from a running event loop; otherwise as :func:`run`.

    Coroutines run on this loop, other callables in a thread.
    """
    import asyncio
    import contextvars

    hooks = hooks or BackendHooks()
    session = await _in_thread(_open, payload, backend)
    if session.assignment.batch is not None:
        from wove.worker.batch import run_batch

        return bool(
            await _in_thread(lambda: run_batch(session.assignment, backend, hooks, redelivered=redelivered))
        )
    if not await _in_thread(lambda: session.may_start(redelivered=redelivered, unseen=hooks.unseen)):
        logger.info("run %s is not wanted (any more): skipped", session.assignment.run_id)
        hooks.refused(session)
        return False
    hooks.begins(session)
    with courier_for(session.assignment.origin).caring_for(session):
        call = await _in_thread(load_call, session, hooks)
        if call is None:
            await _in_thread(keep, session, hooks)
            return False
        try:
            with bind(session.context), measured(session.assignment.function):
                if asyncio.iscoroutinefunction(call.func):
                    result = await supervise(call(), session)
                else:
                    scope = contextvars.copy_context()
                    result = await _in_thread(scope.run, call)
                    if hasattr(result, "__await__"):
                        result = await supervise(result, session)
        except BaseException as exc:
            host = asyncio.current_task()
            if host is not None and host.cancelling() and not session.context.cancelled:
                # Not the task but the worker's own coroutine was cancelled: it shuts down.
                await asyncio.shield(_in_thread(session.lost, "the worker was shut down"))
                raise
            await _in_thread(_report_failure, session, exc, hooks)
            return False
        await _in_thread(_report_result, session, result, hooks)
        return True


async def _in_thread(func: Callable[..., Any], *args: Any) -> Any:
    """Run ``func`` in a thread; whatever it raises comes back, StopIteration included."""
    import asyncio

    def capture() -> tuple[Any, BaseException | None]:
        try:
            return func(*args), None
        except BaseException as exc:
            return None, exc

    result, exc = await asyncio.to_thread(capture)
    if isinstance(exc, StopIteration):
        raise RuntimeError("the task raised StopIteration") from exc
    if exc is not None:
        raise exc
    return result


def _open(payload: bytes | str, backend: Mapping[str, Any] | None) -> Session:
    try:
        assignment = Assignment(payload)
    except WoveError as exc:
        # Nobody is told but this log and the backend: an answer could not be signed, or would go astray.
        note_refusal(exc, "payload rejected, its submitter cannot be told: %s", exc)
        raise
    session = Session(assignment, backend)
    try:
        assignment.check()
    except PayloadRejectedError as exc:
        note_refusal(exc, "payload of run %s rejected: %s", assignment.run_id, exc)
        session.refuse(exc)
        raise
    return session


def note_refusal(exc: WoveError, message: str, *args: object) -> None:
    """Count the refusal of a payload, and log it; the record has its reason as ``wove_refusal``."""
    if isinstance(exc, PayloadRejectedError):
        reason = exc.reason
    else:
        reason = "settings" if isinstance(exc, ConfigurationError) else "malformed"
    count_refusal(f"payload:{reason}")
    logger.error(message, *args, extra={"wove_refusal": reason})


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
    try:
        return _Call(*session.assignment.load())
    except NotWanted:
        session.acknowledge_cancel()
        return None
    except FetchFailed as exc:
        # The delivery failed, and not the task: it may be made again.
        session.lost(str(exc))
        return None
    except PayloadRejectedError as exc:
        note_refusal(exc, "payload of task %s rejected: %s", session.assignment.task_id, exc)
        if hooks is not None:
            hooks.ends(None, exc, source="worker")
        session.fail(exc, source="worker")
        raise
    except BaseException as exc:
        exc.add_note(cannot_load(session.worker, session.assignment.task_id))
        if hooks is not None:
            hooks.ends(None, exc, source="worker")
        session.fail(exc, source="worker")
        raise


def cannot_load(worker: Mapping[str, Any], task_id: str) -> str:
    """Say what mends a call that its worker cannot load."""
    return (
        f"the worker on {worker['host']} (pid {worker['pid']}) could not load {task_id} "
        "or its arguments: install the code there that the submitter has (or set PYTHONPATH), or send it by value "
        "with cloudpickle.register_pickle_by_value(module)"
    )


def _report_result(session: Session, result: Any, hooks: BackendHooks) -> None:
    """Deliver the result, or say that the backend will run the payload again; keep it if nobody takes it."""
    if hooks.runs_again(result):
        session.retried(f"the task returned {type(result).__name__}")
        hooks.passed = result
        return
    hooks.ends(result, None)
    try:
        session.succeed(result)
    finally:
        keep(session, hooks, result=result)


def keep(
    session: Session, hooks: BackendHooks, *, result: Any = None, failure: BaseException | None = None
) -> None:
    """Let the backend keep an outcome that nobody took."""
    try:
        if session.parked is not None:
            hooks.park(session.parked)
        if session.unclaimed:
            hooks.keep(result, failure)
    except Exception:
        logger.exception("the outcome of run %s was not kept by the backend", session.assignment.run_id)


def _report_failure(session: Session, exc: BaseException, hooks: BackendHooks) -> None:
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
        failure = TaskCancelledItself("the task raised CancelledError although nobody had cancelled it")
        failure.__cause__ = exc
        exc = failure
    if hooks is not None:
        hooks.ends(None, exc)
    session.fail(exc)
    raise exc


def is_cancellation(exc: BaseException) -> bool:
    """Tell whether it is asyncio's CancelledError."""
    import sys

    # Only a process that has loaded asyncio can have raised its CancelledError.
    module = sys.modules.get("asyncio")
    return module is not None and isinstance(exc, module.CancelledError)


def drive(awaitable: Any, session: Cancellable) -> Any:
    """Run a coroutine to its end on an event loop of its own."""
    import asyncio
    import contextvars
    import threading

    def on_own_loop() -> Any:
        with asyncio.Runner() as runner:
            return runner.run(supervise(awaitable, session))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return on_own_loop()
    # This thread is inside another loop: the task's loop gets a thread to itself.
    outcome: list[Any] = []
    scope = contextvars.copy_context()

    def capture() -> None:
        try:
            outcome.append((scope.run(on_own_loop), None))
        except BaseException as exc:
            outcome.append((None, exc))

    thread = threading.Thread(target=capture, name="wove-task", daemon=True)
    thread.start()
    thread.join()
    result, exc = outcome[0]
    if exc is not None:
        raise exc
    return result


async def supervise(awaitable: Any, session: Cancellable) -> Any:
    """Await in a task that the courier can cancel."""
    import asyncio

    async def body() -> Any:
        return await awaitable

    loop = asyncio.get_running_loop()
    task = loop.create_task(body())

    def cancel() -> None:
        try:
            loop.call_soon_threadsafe(task.cancel)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    session.on_cancel = cancel
    if session.context.cancelled:  # it came between the start and this line
        task.cancel()
    try:
        return await task
    finally:
        session.on_cancel = None
