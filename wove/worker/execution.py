"""Runs a payload: verify, ask, execute, report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wove.errors import PayloadRejectedError, WoveError, is_time_limit
from wove.worker.assignment import Assignment
from wove.worker.calls import end_in_failure, has_leave, load_call, note_refusal, struck_early
from wove.worker.context import bind
from wove.worker.courier import courier_for
from wove.worker.hooks import BackendHooks, keep
from wove.worker.pace import measured
from wove.worker.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger("wove.worker")


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
    session = _open(payload, backend, hooks, redelivered)
    if session.assignment.batch is not None:
        # Loaded by those who need it: RQ workers pay for imports once per job.
        from wove.worker.batch import run_batch

        return run_batch(session.assignment, backend, hooks, redelivered=redelivered)
    if not has_leave(session, hooks, redelivered=redelivered):
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
                    from wove.worker.coroutines import drive

                    result = drive(result, session)
        except BaseException as exc:
            end_in_failure(session, exc, hooks)
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

    from wove.worker.coroutines import supervise

    hooks = hooks or BackendHooks()
    session = await _in_thread(_open, payload, backend, hooks, redelivered)
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
            await _in_thread(end_in_failure, session, exc, hooks)
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


def _open(
    payload: bytes | str, backend: Mapping[str, Any] | None, hooks: BackendHooks, redelivered: bool | int
) -> Session:
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
    except Exception as exc:
        struck_early(session, exc, hooks, redelivered=redelivered)
        raise
    return session


def _report_result(session: Session, result: Any, hooks: BackendHooks) -> None:
    """Deliver the result, or say that the backend will run the payload again; keep it if nobody takes it."""
    if hooks.runs_again(result):
        session.retried(f"the task returned {type(result).__name__}")
        hooks.passed = result
        return
    try:
        deliver = session.encoded(result)
    except Exception as exc:
        # A time limit: as if the task had not come to its end.
        end_in_failure(session, exc, hooks)
        raise
    hooks.ends(result, None)
    try:
        deliver()
    except Exception as exc:
        if not is_time_limit(exc):
            raise
        if session.parked is None:
            session.fail(exc)  # the result has not been offered yet, or has been taken: then this is not
            raise
        # It has done its work: nobody should do it once more because its outcome was delivered too slowly.
        logger.warning("run %s: %s struck while its outcome was offered", session.assignment.run_id, exc)
    finally:
        keep(session, hooks, result=result)
