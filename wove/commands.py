"""The commands that an environment sends, built from its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wove.delivery import Run
    from wove.frames import Frame


def run_frame(
    run: Run,
    func: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    key: str | None = None,
) -> Frame:
    """Return the ``run_task`` frame of a run's first attempt; ``key`` is its idempotency key."""
    frame: Frame = {
        "type": frames.RUN_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "callable": func,
        "args": dict(keywords),
        "delivery": _delivery(run),
    }
    if positional:
        frame["positional"] = tuple(positional)
    if key is not None:
        frame["delivery"]["key"] = key
    return frame


def again_frame(frame: Frame, run: Run) -> Frame:
    """Return the frame by which a run is submitted again: of another attempt, or of the same once more."""
    delivery = _delivery(run)
    if run.attempt == frame["delivery"]["attempt"]:
        delivery["repeated"] = True
    return _in_place_of(frame, delivery)


def orphan_frame(frame: Frame, run: Run) -> Frame:
    """Return the frame of another attempt that nobody waits for."""
    return _in_place_of(frame, {**_delivery(run), "attempt": run.attempt + 1, "attended": False})


def _in_place_of(frame: Frame, delivery: dict[str, Any]) -> Frame:
    if "key" in frame["delivery"]:
        delivery["key"] = frame["delivery"]["key"]
    return {**frame, "delivery": delivery}


def cancel_frame(run: Run) -> Frame:
    """Return the ``cancel_task`` frame of a run."""
    return {
        "type": frames.CANCEL_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "delivery": _delivery(run),
    }


def _delivery(run: Run) -> dict[str, Any]:
    policy = run.policy
    return {
        "attempt": run.attempt,
        # Whether a failed delivery of this attempt is followed by another one.
        "again": run.repeats < policy.retries,
        "timeout": policy.timeout,
        "start_timeout": policy.start_timeout,
        # Work that is to run on when its submitter has gone.
        "keep": policy.keeps_work,
        "heartbeat_seconds": policy.heartbeat_seconds,
        "cancel_mode": policy.cancel_mode,
    }
