"""What is promised about a run, and the table that keeps track of every open one.

The table is a state machine without I/O and without a clock of its own: events go in,
at most one outcome per run comes out. Whoever drives it (:mod:`wove.dispatch`) awaits,
sends and sets timers.

States: queued -> submitted -> started -> closed, with cancelling between any of them and
closed. A result closes a run whatever its state; what comes after is counted and dropped.
"""

from __future__ import annotations

import difflib
import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple

from wove import frames
from wove.errors import ConfigurationError, DeliveryTimeoutError, ProtocolError, WorkerLostError
from wove.remote_errors import error_from_frame

#: Ids of closed runs that are remembered, to tell a late event from an unknown one.
TOMBSTONES = 4096

#: What keeps a worker from speaking of a run that its backend has accepted.
WHY_SILENT = (
    "no free worker on that queue, one with another WOVE_SECRET, or one that cannot reach the callback URL; "
    "`wove doctor` tells which"
)

_PREFIX = "delivery_"


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """The ``delivery_*`` settings of one run; times are in seconds."""

    timeout: float | None = None
    start_timeout: float | None = None
    heartbeat_seconds: float | None = None
    cancel_mode: str = "best_effort"
    cancel_timeout: float = 10.0
    idempotency_key: str | Callable[..., str] | None = None
    max_in_flight: int | None = None
    orphan_policy: str = "cancel"
    retries: int = 0

    @classmethod
    def resolve(cls, *layers: Mapping[str, Any] | None, **defaults: Any) -> DeliveryPolicy:
        """Merge settings, the first layer winning; keys without the prefix are ignored.

        Raises:
            ConfigurationError: a misspelt key or a value that cannot be; names both.
        """
        merged: dict[str, Any] = dict(defaults)
        for layer in reversed(layers):
            for key, value in (layer or {}).items():
                if isinstance(key, str) and key.startswith(_PREFIX):
                    _check_setting(key, value)
                    merged[key.removeprefix(_PREFIX)] = value
        return cls(**merged)


def _positive(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < float("inf"))  # type: ignore[operator]


def _count(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "timeout": (_positive, "a number of seconds above 0, or None"),
    "start_timeout": (_positive, "a number of seconds above 0, or None"),
    "heartbeat_seconds": (_positive, "a number of seconds above 0, or None"),
    "cancel_mode": (lambda v: v in ("best_effort", "require_ack"), '"best_effort" or "require_ack"'),
    "cancel_timeout": (lambda v: v is not None and _positive(v), "a number of seconds above 0"),
    # The next four hold only what this version carries; the messages say so.
    "idempotency_key": (lambda v: v is None, "None in this version of Wove, which does not share runs"),
    "max_in_flight": (_count, "a whole number from 1, or None"),
    "orphan_policy": (
        lambda v: v in ("cancel", "fail", "detach"),
        '"cancel", "fail" or "detach" ("requeue" is not part of this version of Wove)',
    ),
    "retries": (lambda v: type(v) is int and v == 0, "0 in this version of Wove, which does not resubmit"),
}

SETTINGS = tuple(_PREFIX + item.name for item in fields(DeliveryPolicy))


def _check_setting(key: str, value: object) -> None:
    check = _CHECKS.get(key.removeprefix(_PREFIX))
    if check is None:
        raise ConfigurationError(f"unknown delivery setting {key!r}{nearest(key, SETTINGS)}")
    accepts, wanted = check
    if not accepts(value):
        raise ConfigurationError(f"{key} is {wanted}; got {value!r}")


def nearest(name: str, known: Any) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to ``name``, or all of them."""
    names = sorted(str(item) for item in known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


class RunState(StrEnum):
    """Where an open run is."""

    QUEUED = "queued"
    SUBMITTED = "submitted"
    STARTED = "started"
    CANCELLING = "cancelling"


@dataclass(slots=True)
class Run:
    """One call, while it is open. Times are those of the table's clock."""

    run_id: str
    task_id: str
    policy: DeliveryPolicy
    opened_at: float
    state: RunState = RunState.QUEUED
    attempt: int = 1
    submitted_at: float | None = None
    started_at: float | None = None
    last_seen: float | None = None
    cancel_by: float | None = None
    worker: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exactly one per run.

    ``kind`` is ``result``, ``error``, ``cancelled`` or ``timeout``; ``cancel_work`` says
    that the work may still be going on and is to be stopped.
    """

    run: Run
    kind: str
    value: Any = None
    exception: BaseException | None = None
    cancel_work: bool = False


class Applied(NamedTuple):
    """What became of an event: whether its run took it, and the outcome if it was that."""

    taken: bool
    outcome: Outcome | None = None


_DROPPED = Applied(taken=False)


class RunTable:
    """Every open run of one environment.

    Args:
        environment: its name, for messages.
        clock: returns monotonic seconds.
    """

    def __init__(self, environment: str, clock: Callable[[], float]) -> None:
        self._environment = environment
        self._clock = clock
        self._open: dict[str, Run] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []
        #: What was counted and dropped: ``late``, ``stale``, ``unknown_run``, ``unknown_type``, ``malformed``.
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._open

    def open_runs(self) -> list[Run]:
        """Return the open runs, oldest first."""
        return list(self._open.values())

    def open(self, run_id: str, task_id: str, policy: DeliveryPolicy) -> Run:
        """Start to keep track of a run: its clocks run from now."""
        run = Run(run_id, task_id, policy, self._clock())
        self._open[run_id] = run
        self._watch(run)
        return run

    def submitted(self, run_id: str) -> None:
        """The backend has accepted the run."""
        run = self._open.get(run_id)
        if run is not None and run.submitted_at is None:
            run.submitted_at = self._clock()
            if run.state is RunState.QUEUED:
                run.state = RunState.SUBMITTED

    def fail(self, run_id: str, exception: BaseException, *, cancel_work: bool = False) -> Outcome | None:
        """End a run with an error that arose on this side."""
        return self._close(run_id, "error", exception=exception, cancel_work=cancel_work)

    def cancel(self, run_id: str) -> Outcome | None:
        """The waiter has gone.

        Returns:
            The outcome under ``best_effort``; None under ``require_ack``, where the run
            stays open until the acknowledgement, another outcome, or ``cancel_timeout``.
        """
        run = self._open.get(run_id)
        if run is None:
            return None
        if run.policy.cancel_mode == "best_effort":
            return self._close(run_id, "cancelled", cancel_work=True)
        if run.state is not RunState.CANCELLING:
            run.state = RunState.CANCELLING
            run.cancel_by = self._clock() + run.policy.cancel_timeout
            self._watch(run)
        return None

    def apply(self, frame: Mapping[str, Any]) -> Applied:
        """Take an event in.

        Returns:
            Whether the event was taken, and the outcome when it ends its run. Malformed
            and unknown events, and those of closed runs, are counted in :attr:`dropped`
            and change nothing.
        """
        try:
            known = frames.check_event(frame)
        except ProtocolError:
            self.dropped["malformed"] += 1
            return _DROPPED
        run = self._open.get(frame["run_id"])
        if run is None:
            self.dropped["late" if frame["run_id"] in self._closed else "unknown_run"] += 1
            return _DROPPED
        if not known:
            self.dropped["unknown_type"] += 1
            return _DROPPED
        self._sign_of_life(run, frame)
        outcome = self._terminal(run, frame) if frame["type"] in frames.TERMINAL else None
        return Applied(taken=True, outcome=outcome)

    def _sign_of_life(self, run: Run, frame: Mapping[str, Any]) -> None:
        run.last_seen = max(run.last_seen or run.opened_at, self._arrival(frame))
        run.attempt = max(run.attempt, frame["attempt"])
        # The task's own process, not the parent that reports its end.
        if isinstance(frame.get("worker"), Mapping) and (
            not run.worker or frame["type"] not in frames.TERMINAL
        ):
            run.worker = frame["worker"]
        if run.started_at is None:
            # An event of any type says that the work has begun, in whatever order they come.
            run.started_at = run.last_seen
            if run.state is not RunState.CANCELLING:
                run.state = RunState.STARTED
            self._watch(run)

    def _arrival(self, frame: Mapping[str, Any]) -> float:
        """Return when the event arrived, which may be a while ago: the loop may have been busy since."""
        now = self._clock()
        arrived = frame.get("received_at")
        return arrived if type(arrived) is float and arrived < now else now

    def _terminal(self, run: Run, frame: Mapping[str, Any]) -> Outcome | None:
        kind = frame["type"]
        if kind == frames.TASK_RESULT:
            return self._close(run.run_id, "result", value=frame["result"])
        if frame["attempt"] < run.attempt:
            # A newer attempt is at work; its outcome counts.
            self.dropped["stale"] += 1
            return None
        if kind == frames.TASK_ERROR:
            exception = error_from_frame(frame, where=self._where(run, frame))
            return self._close(run.run_id, "error", exception=exception)
        return self._close(run.run_id, "cancelled")

    def _where(self, run: Run, frame: Mapping[str, Any]) -> str:
        worker = run.worker
        if not worker:
            return ""
        text = f"in run {run.run_id} of {run.task_id}, environment {self._environment!r}"
        text += f", on worker {worker.get('host')} pid {worker.get('pid')}"
        if worker.get("job"):
            text += f", {worker.get('backend')} job {worker['job']}"
        return f"{text}, attempt {frame['attempt']}"

    def expire(self) -> list[Outcome]:
        """Close every run whose deadline has passed and return their outcomes."""
        now = self._clock()
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, run_id = heapq.heappop(self._deadlines)
            run = self._open.get(run_id)
            if run is None:
                continue
            due, reason = self._due(run)
            if due is None or due > now:
                self._watch(run)
                continue
            outcome = self._expired(run, reason, now)
            if outcome is not None:
                ended.append(outcome)
        return ended

    def next_deadline(self) -> float | None:
        """Return when :meth:`expire` has to be called next, by the table's clock."""
        while self._deadlines and self._deadlines[0][1] not in self._open:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _due(self, run: Run) -> tuple[float | None, str]:
        policy = run.policy
        candidates = []
        if run.cancel_by is not None:
            candidates.append((run.cancel_by, "cancel"))
        if policy.timeout is not None:
            candidates.append((run.opened_at + policy.timeout, "timeout"))
        if run.started_at is None and policy.start_timeout is not None:
            candidates.append((run.opened_at + policy.start_timeout, "start"))
        if run.last_seen is not None and policy.heartbeat_seconds is not None:
            candidates.append((run.last_seen + policy.heartbeat_seconds, "heartbeat"))
        return min(candidates) if candidates else (None, "")

    def _watch(self, run: Run) -> None:
        due, _ = self._due(run)
        if due is None:
            return
        heapq.heappush(self._deadlines, (due, run.run_id))
        if len(self._deadlines) > 64 + 4 * len(self._open):
            # Mostly entries of runs that have ended: kept until their time they would pile up.
            live = {run_id: self._due(open_run)[0] for run_id, open_run in self._open.items()}
            self._deadlines = [(when, run_id) for run_id, when in live.items() if when is not None]
            heapq.heapify(self._deadlines)

    def _expired(self, run: Run, reason: str, now: float) -> Outcome | None:
        if reason == "cancel":
            return self._close(run.run_id, "timeout")
        text = f"run {run.run_id} of {run.task_id} in environment {self._environment!r}"
        if reason == "heartbeat":
            silence = now - (run.last_seen or now)
            exception: BaseException = WorkerLostError(
                {
                    "kind": WorkerLostError.__name__,
                    "message": f"{text}: no sign of life from its worker for {silence:.1f} s "
                    f"(delivery_heartbeat_seconds={run.policy.heartbeat_seconds:g})",
                    "traceback": "",
                    "retryable": True,
                    "source": "backend",
                }
            )
            if where := self._where(run, {"attempt": run.attempt}):
                exception.add_note(where)
            return self._close(run.run_id, "error", exception=exception, cancel_work=True)
        if reason == "start":
            state = (
                f"accepted by the backend, never started: {WHY_SILENT}"
                if run.submitted_at is not None
                else "not accepted by the backend yet: is the broker up?"
            )
            message = (
                f"{text} did not start within delivery_start_timeout={run.policy.start_timeout:g} s: {state}"
            )
        else:
            message = (
                f"{text} had no outcome within delivery_timeout={run.policy.timeout:g} s (state: {run.state})"
            )
            if run.state is RunState.SUBMITTED:
                message += f": {WHY_SILENT}"
        return self._close(run.run_id, "timeout", exception=DeliveryTimeoutError(message), cancel_work=True)

    def _close(
        self,
        run_id: str,
        kind: str,
        *,
        value: Any = None,
        exception: BaseException | None = None,
        cancel_work: bool = False,
    ) -> Outcome | None:
        run = self._open.pop(run_id, None)
        if run is None:
            return None
        self._closed[run_id] = None
        if len(self._closed) > TOMBSTONES:
            self._closed.popitem(last=False)
        return Outcome(run, kind, value, exception, cancel_work)
