"""The commands that an environment sends, built from its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wove.frames import Frame
    from wove.policy import DeliveryPolicy
    from wove.run_state import Run
    from wove.shared_parts import SharedCallable


def run_frame(
    run: Run,
    func: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    key: str | None = None,
    said: dict[str, Any] | None = None,
    shared: SharedCallable | None = None,
) -> Frame:
    """Return the ``run_task`` frame of a run's first attempt.

    Args:
        run: the run.
        func: what is called.
        positional: with what.
        keywords: with what by name.
        key: its idempotency key.
        said: what is said of its delivery, shared by all runs that are alike; see :func:`delivery`.
        shared: ``func`` as all the runs of a ``map`` share it.
    """
    frame: Frame = {
        "type": frames.RUN_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "callable": func,
        "args": dict(keywords),
        "delivery": _delivery_of(run) if said is None else said,
    }
    if positional:
        frame["positional"] = tuple(positional)
    if key is not None:
        frame["delivery"] = {**frame["delivery"], "key": key}
    if shared is not None:
        frame["shared"] = shared
    return frame


def again_frame(frame: Frame, run: Run) -> Frame:
    """Return the frame by which a run is submitted again: of another attempt, or of the same once more."""
    said = _delivery_of(run)
    if run.attempt == frame["delivery"]["attempt"]:
        said["repeated"] = True
    return _in_place_of(frame, said)


def orphan_frame(frame: Frame, run: Run) -> Frame:
    """Return the frame of another attempt that nobody waits for."""
    return _in_place_of(frame, {**_delivery_of(run), "attempt": run.attempt + 1, "attended": False})


def _in_place_of(frame: Frame, said: dict[str, Any]) -> Frame:
    if "key" in frame["delivery"]:
        said["key"] = frame["delivery"]["key"]
    return {**frame, "delivery": said}


def cancel_frame(run: Run) -> Frame:
    """Return the ``cancel_task`` frame of a run."""
    return {
        "type": frames.CANCEL_TASK,
        "run_id": run.run_id,
        "task_id": run.task_id,
        "delivery": _delivery_of(run),
    }


def delivery(
    policy: DeliveryPolicy, attempt: int, repeats: int = 0, *, mapped: bool = False
) -> dict[str, Any]:
    """Return what a frame says of its delivery.

    Args:
        policy: the run's settings.
        attempt: which attempt it is.
        repeats: how often it was submitted again.
        mapped: whether it is one of the many runs of a ``map``.
    """
    return {
        "attempt": attempt,
        # Whether a failed delivery of this attempt is followed by another one.
        "again": repeats < policy.retries,
        "timeout": policy.timeout,
        "start_timeout": policy.start_timeout,
        # Work that is to run on when its submitter has gone.
        "keep": policy.keeps_work,
        "heartbeat_seconds": policy.heartbeat_seconds,
        "cancel_mode": policy.cancel_mode,
        "mapped": mapped,
    }


def _delivery_of(run: Run) -> dict[str, Any]:
    return delivery(run.policy, run.attempt, run.repeats)
