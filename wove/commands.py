"""The commands that an environment sends, built from its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wove.delivery import Run
    from wove.frames import Frame
    from wove.policy import DeliveryPolicy
    from wove.shared_parts import SharedCallable


def run_frame(
    run: Run,
    func: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    key: str | None = None,
    shared: SharedCallable | None = None,
) -> Frame:
    """Return the ``run_task`` frame of a run's first attempt.

    Args:
        run: the run.
        func: what is called.
        positional: with what.
        keywords: with what by name.
        key: its idempotency key.
        shared: ``func`` as all the runs of a ``map`` share it.
    """
    frame: Frame = {
        "type": frames.RUN_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "callable": func,
        "args": dict(keywords),
        "delivery": _delivery(run.policy, run.attempt),
    }
    if positional:
        frame["positional"] = tuple(positional)
    if key is not None:
        frame["delivery"]["key"] = key
    if shared is not None:
        frame["shared"] = shared
    return frame


def again_frame(frame: Frame, policy: DeliveryPolicy, attempt: int, *, attended: bool = True) -> Frame:
    """Return the frame of another attempt; ``attended`` tells whether anybody waits for it."""
    delivery = _delivery(policy, attempt)
    if not attended:
        delivery["attended"] = False
    if "key" in frame["delivery"]:
        delivery["key"] = frame["delivery"]["key"]
    return {**frame, "delivery": delivery}


def cancel_frame(run: Run) -> Frame:
    """Return the ``cancel_task`` frame of a run."""
    return {
        "type": frames.CANCEL_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "delivery": _delivery(run.policy, run.attempt),
    }


def _delivery(policy: DeliveryPolicy, attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        # Whether a failed delivery of this attempt is followed by another one.
        "again": attempt <= policy.retries,
        "timeout": policy.timeout,
        "start_timeout": policy.start_timeout,
        # Work that is to run on when its submitter has gone.
        "keep": policy.keeps_work,
        "heartbeat_seconds": policy.heartbeat_seconds,
        "cancel_mode": policy.cancel_mode,
    }
