"""The RQ side: the job function is ``wove.worker.rq.run``; workers need nothing but the package."""

from __future__ import annotations

import hashlib
import hmac
import logging
from typing import Any

from wove.errors import is_time_limit
from wove.wire import PARKED
from wove.worker import offering
from wove.worker.execution import run as _run
from wove.worker.hooks import BackendHooks

logger = logging.getLogger("wove.worker")

# OpenSSL looks an algorithm up when it is first used. RQ's worker imports this module before it forks, so that its
# work horses need not.
hmac.digest(b"any", b"", "sha256")

#: Seconds that such an outcome, and the result of work that nobody waited for, are kept.
PARKED_SECONDS = 900
KEPT_SECONDS = 24 * 3600
#: Seconds after which Redis forgets that a callback server did not answer, if that is not noticed again.
OUTAGE_SECONDS = 900


class RqOutages:
    """Outages, as Redis knows them: a work horse lives for one job, and would wait for each of them anew."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def known_for(self, origin: str) -> float:
        """Note an outage; see :class:`wove.worker.offering.Outages`."""
        name = _outage_name(origin)
        try:
            seconds, micros = self._connection.time()
            now = seconds + micros / 1_000_000
            with self._connection.pipeline() as pipeline:
                pipeline.set(name, now, nx=True, ex=OUTAGE_SECONDS)
                pipeline.expire(name, OUTAGE_SECONDS)
                pipeline.get(name)
                since = float(pipeline.execute()[-1])
        except Exception as exc:
            if is_time_limit(exc):
                raise
            logger.info("whether others cannot reach %s either is not known: %s", origin, exc)
            return 0.0
        waited: float = now - since
        return max(0.0, waited)

    def over(self, origin: str) -> None:
        """Forget an outage."""
        try:
            self._connection.delete(_outage_name(origin))
        except Exception as exc:
            if is_time_limit(exc):
                raise
            logger.info("the end of the outage of %s was not noted: %s", origin, exc)


def _outage_name(origin: str) -> str:
    return f"wove:outage:{hashlib.sha256(origin.encode()).hexdigest()[:32]}"


class RqHooks(BackendHooks):
    """RQ retries what it was told to retry, and keeps outcomes with the job."""

    def __init__(self, job: Any) -> None:
        self._job = job
        offering.outages = RqOutages(job.connection)

    def runs_again(self, ending: Any) -> bool:
        """RQ's ``Retry``: of the job, for any exception, or returned by the task."""
        if isinstance(ending, BaseException):
            # The first releases of RQ 2 have only the count.
            return bool(getattr(self._job, "should_retry", self._job.retries_left))
        kind = type(ending)
        if kind.__name__ != "Retry" or not kind.__module__.startswith("rq."):
            return False
        if not hasattr(self._job, "number_of_retries"):
            return False  # a release to which that is a result like any other
        return bool((self._job.number_of_retries or 0) < ending.max)

    def park(self, outcome: bytes) -> None:
        """Keep a signed outcome in the job's own hash."""
        self._outlast(PARKED_SECONDS)
        self._job.connection.hset(self._job.key, PARKED, outcome)

    def keep(self, result: Any, failure: BaseException | None) -> None:
        """Let RQ keep the result as it keeps any job's; failures it keeps by itself."""
        self._outlast(KEPT_SECONDS)
        if failure is None:
            try:
                self._job.serializer.dumps(result)
            except Exception as exc:
                if is_time_limit(exc):
                    raise
                logger.warning("the result of job %s is kept as text: %s", self._job.id, exc)
                result = repr(result)[:10_000]
            self.passed = result

    def _outlast(self, seconds: int) -> None:
        if self._job.result_ttl is not None and 0 <= self._job.result_ttl < seconds:
            self._job.result_ttl = seconds


def run(payload: bytes | str) -> Any:
    """Execute a payload; its outcome goes to the submitter, not to the job's result.

    Returns:
        None; the result only of work that was detached or requeued when its submitter
        stopped, and a ``Retry`` that the user's function returned.

    Raises:
        BaseException: what the user's function raised, so that RQ counts the job as failed.
    """
    from rq import get_current_job

    job = get_current_job()
    if job is None:  # called by hand
        _run(payload)
        return None
    hooks = RqHooks(job)
    delete_at_once(job)
    _run(payload, backend=_describe(job), redelivered=_retries(job), hooks=hooks)
    return hooks.passed


def run_shared(payload: bytes | str) -> Any:
    """Execute a payload for all who share the job, see :mod:`wove.worker.rq_sharing`.

    Returns:
        As :func:`run`.

    Raises:
        PayloadRejectedError: the payload is not signed with this worker's secret; nothing ran.
        BaseException: what the user's function raised, so that RQ counts the job as failed.
    """
    from rq import get_current_job

    from wove.worker.rq_sharing import SharedJob

    job = get_current_job()
    if job is None:  # called by hand
        _run(payload)
        return None
    shared = SharedJob(job, payload, _describe(job))
    shared.execute(redelivered=_retries(job))
    return shared.passed


def delete_at_once(job: Any) -> None:
    """Let RQ delete a job that has ended well without looking for what cannot be there.

    For a job without a result (``result_ttl=0``) RQ asks Redis, over a second connection of the work horse, in which
    registries it may be: that costs more than all the rest. This one has just run, and its execution is
    removed beside it in any case.
    """
    cleanup = job.cleanup

    def briefly(ttl: Any = None, pipeline: Any = None, remove_from_queue: bool = True) -> None:
        special = getattr(job, "group_id", None) or getattr(job, "has_rate_limit", False) or _retries(job)
        if ttl != 0 or pipeline is None or remove_from_queue or special:
            cleanup(ttl, pipeline=pipeline, remove_from_queue=remove_from_queue)
            return
        pipeline.delete(job.key, job.dependents_key, job.dependencies_key)

    job.cleanup = briefly


def _describe(job: Any) -> dict[str, str]:
    return {"backend": "rq", "job": job.id, "rq_worker": getattr(job, "worker_name", None) or ""}


def _retries(job: Any) -> int:
    return int(getattr(job, "number_of_retries", 0) or 0)


def on_stopped(job: Any, connection: Any) -> None:
    """Report a job that was stopped on request; RQ calls this in the worker's parent process."""
    from wove.worker.parent import report_cancel

    if not job.args:
        return
    report_cancel(job.args[0], "rq")
    if job.func_name == f"{__name__}.{run_shared.__name__}":
        from wove.worker.rq_sharing import stopped

        for payload in stopped(job):
            report_cancel(payload, "rq")
