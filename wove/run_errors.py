"""What the errors of a run say: which run, on which worker, in which attempt, and how earlier ones ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wove.errors import WorkerLostError
from wove.remote_errors import error_from_frame
from wove.run_state import RunState

if TYPE_CHECKING:
    from wove.run_state import Run

#: What keeps a worker from speaking of a run that its backend has accepted.
WHY_SILENT = (
    "no free worker on that queue, one that was started without Wove (celery worker -I wove.worker.celery), one with "
    "another WOVE_SECRET, or one that cannot reach the callback URL; `wove doctor`, given the broker's URL, tells which"
)


def is_loss(error: Any) -> bool:
    """Tell whether an error is not the task's own, but the end of whoever ran it."""
    return (
        isinstance(error, Mapping)
        and error.get("kind") == WorkerLostError.__name__
        and error.get("source") == "backend"
    )


def name_of(environment: str, run: Run) -> str:
    """Name a run."""
    return f"run {run.run_id} of {run.task_id} in environment {environment!r}"


def where(environment: str, run: Run, attempt: int) -> str:
    """Say where a run was executed; nothing when that is not known."""
    worker = run.worker
    if not worker:
        return ""
    text = f"in run {run.run_id} of {run.task_id}, environment {environment!r}"
    text += f", on worker {worker.get('host')}" + (f" pid {worker['pid']}" if "pid" in worker else "")
    if worker.get("job"):
        text += f", {worker.get('backend')} job {worker['job']}"
    return f"{text}, attempt {attempt}"


def lost_error(
    environment: str, run: Run, word: str, now: float, error: Mapping[str, Any] | None = None
) -> Exception:
    """Build the error of a run whose worker died.

    Args:
        environment: the environment's name.
        run: the run.
        word: how it is known.
        now: by the run table's clock, in seconds.
        error: the error that said so, for its traceback.
    """
    worker = run.worker
    who = "its worker"
    if worker:
        who += f" on {worker.get('host')}" + (f" (pid {worker['pid']})" if "pid" in worker else "")
    seen = ""
    if run.last_seen is not None:
        seen = f", {max(0.0, now - run.last_seen):.1f} s after its last sign of life"
    payload = {
        "traceback": "",
        **(error or {}),
        "kind": WorkerLostError.__name__,
        "message": f"{name_of(environment, run)}: {who} was lost in attempt {run.attempt}{seen}: {word}",
        "retryable": True,
        "source": "backend",
        "attempt": run.attempt,
        "worker": dict(worker),
    }
    return error_from_frame({"error": payload}, where=where(environment, run, run.attempt))


def overdue(run: Run, reason: str) -> str:
    """Say what a run has not done in time: ``start``, or come to its end."""
    if reason == "start":
        state = (
            f"accepted by the backend, never started: {WHY_SILENT}"
            if run.submitted_at is not None
            else "not accepted by the backend yet: is the broker up?"
        )
        return f"did not start within delivery_start_timeout={run.policy.start_timeout:g} s: {state}"
    text = f"had no outcome within delivery_timeout={run.policy.timeout:g} s (state: {run.state})"
    if run.state is RunState.SUBMITTED and not run.ever_started:
        text += f": {WHY_SILENT}"
    return text


def add_history(exception: BaseException, run: Run) -> None:
    """Say in the error how earlier executions ended, where there were any."""
    payload = getattr(exception, "payload", None)
    if isinstance(exception, WorkerLostError) and isinstance(payload, dict):
        payload["attempts"] = [dict(entry) for entry in run.history]
    count = len(run.history)
    if not count or (count == 1 and run.attempt == 1):
        return
    lines = [f"{count} execution{'s' if count > 1 else ''} came to nothing:"]
    for entry in run.history:
        place = f" on {entry['host']}" if "host" in entry else ""
        place += f" (pid {entry['pid']})" if "pid" in entry else ""
        lines.append(f"  attempt {entry['attempt']}{place}, after {entry['seconds']:g} s: {entry['reason']}")
    exception.add_note("\n".join(lines))
