"""The RQ side: the job function is ``wove.worker.rq.run``; workers need nothing but the package."""

from __future__ import annotations

from typing import Any

from wove.worker.execution import run as _run


def run(payload: bytes | str) -> None:
    """Execute a payload; its outcome goes to the submitter, not to the job's result.

    Raises:
        BaseException: what the user's function raised, so that RQ counts the job as failed.
    """
    from rq import get_current_job

    job = get_current_job()
    retried = job is not None and bool(getattr(job, "number_of_retries", 0))
    backend = {"backend": "rq", "job": job.id if job is not None else ""}
    _run(payload, backend=backend, redelivered=retried)


def on_stopped(job: Any, connection: Any) -> None:
    """Report a job that was stopped on request; RQ calls this in the worker's parent process."""
    from wove.worker.parent import report_cancel

    if job.args:
        report_cancel(job.args[0], "rq")
