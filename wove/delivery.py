"""The table that keeps track of every open run of an environment.

The table is a state machine without I/O and without a clock of its own: events go in,
at most one outcome per run comes out. Whoever drives it (:mod:`wove.dispatch`) awaits,
sends and sets timers.

States: queued -> submitted -> started -> closed; from started to lost, when its worker died
and the run is to be submitted again, and from there to queued; with cancelling between any of
them and closed. A result closes a run whatever its state; what comes after is counted and dropped.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.deadlines import Deadlines
from wove.errors import DeliveryTimeoutError, ProtocolError, safe_text
from wove.remote_errors import error_from_frame
from wove.run_errors import add_history, is_loss, lost_error, name_of, overdue, where
from wove.run_state import Applied, Outcome, Resubmission, Run, RunState

if TYPE_CHECKING:
    from wove.policy import DeliveryPolicy

#: Ids of closed runs that are remembered, to tell a late event from an unknown one.
TOMBSTONES = 4096
#: Executions of one run whose numbering is followed: each redelivery makes one more.
MAX_EXECUTIONS = 64
#: Ends of earlier attempts that are remembered for the error of the last one.
MAX_HISTORY = 20

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
        self._deadlines = Deadlines(self._open)
        #: What was counted and dropped: ``late``, ``stale``, ``duplicate``, ``unknown_run``,
        #: ``unknown_type``, ``malformed``.
        self.dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._open

    def open_runs(self) -> list[Run]:
        """Return the open runs, oldest first."""
        return list(self._open.values())

    # --- what this side does ------------------------------------------------

    def open(self, run_id: str, task_id: str, policy: DeliveryPolicy) -> Run:
        """Start to keep track of a run: its clocks run from now."""
        now = self._clock()
        run = Run(run_id, task_id, policy, now, attempt_at=now)
        self._open[run_id] = run
        self._deadlines.watch(run)
        return run

    def submitted(self, run_id: str, attempt: int = 1) -> None:
        """The backend has accepted that attempt of the run."""
        run = self._open.get(run_id)
        if run is None or run.state is RunState.LOST:
            return
        if run.attempt == attempt and run.submitted_at is None:
            run.submitted_at = self._clock()
            run.doubtful = False
            if run.state is RunState.QUEUED:
                run.state = RunState.SUBMITTED

    def resubmit(self, run_id: str) -> Run | None:
        """A lost run is submitted again now: its next attempt begins; of a doubtful one the same again.

        Returns:
            The run; None when it has ended, is being cancelled, or has been heard of.
        """
        run = self._open.get(run_id)
        if run is None:
            return None
        if run.state is RunState.LOST:
            run.state = RunState.QUEUED
            run.submitted_at = None
            run.attempt += 1
            run.attempt_at = self._clock()
            self._deadlines.watch(run)
        elif not run.doubtful or run.state is not RunState.QUEUED:
            return None
        run.doubtful = False
        run.repeats += 1
        return run

    def fail(self, run_id: str, exception: BaseException, *, cancel_work: bool = False) -> Outcome | None:
        """End a run with an error that arose on this side."""
        return self._close(run_id, "error", exception=exception, cancel_work=cancel_work)

    def refuse(
        self,
        run_id: str,
        exception: BaseException,
        attempt: int = 1,
        *,
        final: bool = False,
        doubtful: bool = False,
    ) -> Outcome | Resubmission | None:
        """The backend did not accept that attempt of the run.

        It may be submitted again, unless that is ``final``: what cannot be sent will not be
        sent the next time. A worker's word counts for more than a lost answer of the backend:
        a run that has started was accepted. Where it is ``doubtful`` whether the backend has it,
        the same attempt is to be submitted once more: a worker may be about to take the first.
        """
        run = self._open.get(run_id)
        if run is None or run.attempt != attempt or run.state is RunState.LOST or run.started_at is not None:
            return None
        if final:
            return self._close(run_id, "error", exception=exception)
        reason = safe_text(exception, 500)
        if doubtful and self._may_repeat(run):
            self._remember(run, reason)
            run.doubtful = True
            return Resubmission(run, reason)
        return self._lose(run, reason, lambda: exception, cancel_work=False)

    def cancel(self, run_id: str) -> Outcome | None:
        """The waiter has gone.

        Returns:
            The outcome under ``best_effort``; None under ``require_ack``, where the run
            stays open until the acknowledgement, another outcome, or ``cancel_timeout``.
        """
        run = self._open.get(run_id)
        if run is None:
            return None
        if run.policy.cancel_mode == "best_effort" or run.state is RunState.LOST:
            # A lost run is in nobody's hands: there is nobody to acknowledge it.
            return self._close(run_id, "cancelled", cancel_work=True)
        if run.state is not RunState.CANCELLING:
            run.state = RunState.CANCELLING
            run.cancel_by = self._clock() + run.policy.cancel_timeout
            self._deadlines.watch(run)
        return None

    # --- what comes back ------------------------------------------------------

    def apply(self, frame: Mapping[str, Any]) -> Applied:
        """Take an event in.

        Returns:
            Whether the event was taken, and what follows: the outcome when it ends its
            run, a resubmission when the run's worker was lost and it has retries left.
            Malformed and unknown events, and those of closed runs and earlier attempts,
            are counted in :attr:`dropped` and change nothing.
        """
        if frames.is_whole_result(frame):
            # By far the most frequent: whatever else was known of the run does not matter any more.
            run = self._open.get(frame["run_id"])
            if run is not None:
                run.attempt = max(run.attempt, frame["attempt"])
                return Applied(True, self._close(run.run_id, "result", value=frame["result"]))
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
        if self._outdated(run, frame):
            return _DROPPED
        return self._taken(run, frame)

    def _outdated(self, run: Run, frame: Mapping[str, Any]) -> bool:
        """Tell whether a newer attempt, or a newer event, has overtaken this one."""
        kind = frame["type"]
        if kind == frames.TASK_RESULT:
            return False  # of whichever attempt: the work is done
        # Between a loss and the next attempt the task's own word still counts: it was not lost.
        own_end = kind in frames.TERMINAL and not is_loss(frame.get("error"))
        if frame["attempt"] < run.attempt or (run.state is RunState.LOST and not own_end):
            self.dropped["stale"] += 1
            return True
        execution = frame.get("execution")
        if kind in frames.TERMINAL or type(execution) is not str:
            return False
        if frame["seq"] <= run.seqs.get(execution, 0):
            self.dropped["duplicate"] += 1
            return True
        if execution in run.seqs or len(run.seqs) < MAX_EXECUTIONS:
            run.seqs = {**run.seqs, execution: frame["seq"]}
        return False

    def _taken(self, run: Run, frame: Mapping[str, Any]) -> Applied:
        kind = frame["type"]
        if kind == frames.TASK_RETRY:
            self._requeued(run, frame)
            return Applied(taken=True)
        if run.state is not RunState.LOST:
            self._sign_of_life(run, frame)
        if kind not in frames.TERMINAL:
            return Applied(taken=True)
        if kind == frames.TASK_RESULT:
            return Applied(True, self._close(run.run_id, "result", value=frame["result"]))
        if kind == frames.TASK_CANCELLED:
            return Applied(True, self._close(run.run_id, "cancelled"))
        if is_loss(frame["error"]):
            reason = safe_text(frame["error"].get("message", ""), 2_000)
            step = self._lose(run, reason, lambda: self._lost_error(run, reason, frame["error"]))
            return Applied(True, again=step) if isinstance(step, Resubmission) else Applied(True, step)
        exception = error_from_frame(frame, where=where(self._environment, run, frame["attempt"]))
        add_history(exception, run)
        return Applied(True, self._close(run.run_id, "error", exception=exception))

    def _sign_of_life(self, run: Run, frame: Mapping[str, Any]) -> None:
        run.attempt = max(run.attempt, frame["attempt"])
        worker = frame.get("worker")
        if frame["type"] in frames.TERMINAL and is_loss(frame.get("error")):
            # The word of somebody else: of the parent, whose process is not the one that died.
            if isinstance(worker, Mapping) and not run.worker:
                run.worker = {key: value for key, value in worker.items() if key != "pid"}
            return
        if isinstance(worker, Mapping):
            run.worker = worker
        run.last_seen = max(run.last_seen or run.opened_at, self._arrival(frame))
        if run.started_at is None:
            # An event of any type says that the work has begun, in whatever order they come.
            run.started_at = run.last_seen
            run.ever_started = True
            if run.state is not RunState.CANCELLING:
                run.state = RunState.STARTED
            if frame["type"] not in frames.TERMINAL:  # else it has no deadline any more
                self._deadlines.watch(run)

    def _requeued(self, run: Run, frame: Mapping[str, Any]) -> None:
        """The backend itself will run the payload again: nothing is heard of it until then."""
        error = frame.get("error")
        reason = error.get("message") if isinstance(error, Mapping) else frame.get("message")
        self._remember(run, f"retried by the backend: {safe_text(reason or 'no reason given', 500)}")
        run.ever_started = True
        run.started_at = run.last_seen = None
        run.worker = {}
        if run.state is not RunState.CANCELLING:
            run.state = RunState.SUBMITTED

    def _arrival(self, frame: Mapping[str, Any]) -> float:
        """Return when the event arrived, which may be a while ago: the loop may have been busy since."""
        now = self._clock()
        arrived = frame.get("received_at")
        return arrived if type(arrived) is float and arrived < now else now

    # --- losing a delivery -----------------------------------------------------

    def _lose(
        self, run: Run, reason: str, error: Callable[[], BaseException], *, cancel_work: bool = True
    ) -> Outcome | Resubmission | None:
        """The current attempt came to nothing: try again, or end the run."""
        self._remember(run, reason)
        if not self._may_repeat(run):
            exception = error()
            add_history(exception, run)
            return self._close(run.run_id, "error", exception=exception, cancel_work=cancel_work)
        run.state = RunState.LOST
        run.submitted_at = run.started_at = run.last_seen = None
        run.worker = {}
        return Resubmission(run, reason)

    def _may_repeat(self, run: Run) -> bool:
        return run.repeats < run.policy.retries and run.state is not RunState.CANCELLING

    def _remember(self, run: Run, reason: str) -> None:
        since = run.started_at if run.started_at is not None else run.attempt_at
        entry: dict[str, Any] = {
            "attempt": run.attempt,
            "reason": reason,
            "seconds": round(max(0.0, self._clock() - since), 3),
        }
        entry.update({key: run.worker[key] for key in ("host", "pid") if key in run.worker})
        history = [*run.history, entry]
        if len(history) > MAX_HISTORY:
            del history[1]
        run.history = history

    def _lost_error(self, run: Run, word: str, error: Mapping[str, Any] | None = None) -> Exception:
        return lost_error(self._environment, run, word, self._clock(), error)

    # --- clocks ------------------------------------------------------------------

    def expire(self) -> list[Outcome | Resubmission]:
        """Act on every deadline that has passed and return what follows."""
        now = self._clock()
        ended: list[Outcome | Resubmission] = []
        while (passed := self._deadlines.take(now)) is not None:
            run, reason = passed
            step = self._expired(run, reason, now)
            if step is not None:
                ended.append(step)
            if isinstance(step, Resubmission):
                self._deadlines.watch(run)
        return ended

    def next_deadline(self) -> float | None:
        """Return when :meth:`expire` has to be called next, by the table's clock."""
        return self._deadlines.next()

    def _expired(self, run: Run, reason: str, now: float) -> Outcome | Resubmission | None:
        if reason == "cancel":
            return self._close(run.run_id, "timeout")
        if reason == "heartbeat":
            word = (
                f"no sign of life from it for {now - (run.last_seen or now):.1f} s "
                f"(delivery_heartbeat_seconds={run.policy.heartbeat_seconds:g})"
            )
            return self._lose(run, word, lambda: self._lost_error(run, word))
        exception = DeliveryTimeoutError(f"{name_of(self._environment, run)} {overdue(run, reason)}")
        add_history(exception, run)
        return self._close(run.run_id, "timeout", exception=exception, cancel_work=True)

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
