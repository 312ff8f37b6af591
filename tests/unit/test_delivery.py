"""The promises about a run, and the table that keeps them; its clock stands still unless told."""

from __future__ import annotations

import fnmatch
import random
import secrets
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from wove_tests.clock import Clock

from wove import frames
from wove.delivery import MAX_EXECUTIONS, MAX_HISTORY, TOMBSTONES, RunTable
from wove.errors import DeliveryTimeoutError, EnvironmentExecutionError, SubmitError, WorkerLostError, lost
from wove.policy import DeliveryPolicy
from wove.run_state import Outcome, Resubmission, RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.run_state import Run

RUN = "a" * 32
WORKER = {"host": "w1", "pid": 7, "backend": "celery", "job": "j1"}


def event(kind: str, run_id: str = RUN, attempt: int = 1, seq: int = 1, **fields: Any) -> frames.Frame:
    """Build an event with whatever its type demands."""
    needed: dict[str, Any] = {}
    if kind == frames.TASK_RESULT:
        needed = {"result": 42}
    elif kind in (frames.TASK_ERROR, frames.TASK_RETRY):
        needed = {"error": {"kind": "Boom", "message": "it broke", "source": "task"}}
    return frames.event(kind, run_id, "app.task", attempt, seq, **{**needed, **fields})


@pytest.fixture
def clock() -> Clock:
    """The table's clock."""
    return Clock()


@pytest.fixture
def table(clock: Clock) -> RunTable:
    """An empty table."""
    return RunTable("reports", clock)


def loss(
    word: str = "signal 9 (SIGKILL)", run_id: str = RUN, attempt: int = 1, **fields: Any
) -> frames.Frame:
    """Build the backend's word that a run's worker is gone."""
    return event(frames.TASK_ERROR, run_id, attempt, error=lost(word), **fields)


def opened(table: RunTable, run_id: str = RUN, **policy: Any) -> Run:
    """Open and submit a run."""
    run = table.open(run_id, "app.task", DeliveryPolicy(**policy))
    table.submitted(run_id)
    return run


def outcome_of(table: RunTable, frame: Any) -> Outcome | None:
    """Apply an event and return the outcome, if it was one."""
    return table.apply(frame).outcome


def ended(outcome: Outcome | Resubmission | None) -> Outcome:
    """Return what has to be an outcome."""
    assert isinstance(outcome, Outcome)
    return outcome


def lost_error(outcome: Outcome | Resubmission | None) -> WorkerLostError:
    """Return the error of what has to be the end of a run whose worker is gone."""
    exception = ended(outcome).exception
    assert isinstance(exception, WorkerLostError)
    return exception


class TestOutcomes:
    """An event that ends a run yields its outcome, once."""

    def test_a_result(self, table: RunTable) -> None:
        opened(table)
        outcome = outcome_of(table, event("task_result", result=[1]))
        assert outcome is not None
        assert (outcome.kind, outcome.value, outcome.run.run_id) == ("result", [1], RUN)
        assert not outcome.cancel_work
        assert len(table) == 0

    def test_an_error_is_an_exception_that_says_where(self, table: RunTable) -> None:
        opened(table, retries=1)
        table.apply(loss())
        table.resubmit(RUN)
        table.apply(event("task_started", attempt=2, worker=WORKER))
        outcome = outcome_of(table, event("task_error", attempt=2))
        assert outcome is not None
        assert outcome.kind == "error"
        assert type(outcome.exception) is EnvironmentExecutionError
        where, history = outcome.exception.__notes__
        assert where == (
            f"in run {RUN} of app.task, environment 'reports', on worker w1 pid 7, celery job j1, attempt 2"
        )
        assert history == "1 execution came to nothing:\n  attempt 1, after 0 s: signal 9 (SIGKILL)"

    def test_an_error_of_the_first_attempt_says_where_and_no_more(self, table: RunTable) -> None:
        opened(table)
        table.apply(event("task_started", worker=WORKER))
        outcome = outcome_of(table, event("task_error"))
        assert outcome is not None
        assert outcome.exception is not None
        (note,) = outcome.exception.__notes__
        assert note.endswith("attempt 1")

    def test_a_cancellation_on_the_other_side(self, table: RunTable) -> None:
        opened(table)
        outcome = outcome_of(table, event("task_cancelled"))
        assert outcome is not None
        assert (outcome.kind, outcome.exception) == ("cancelled", None)

    def test_a_failure_on_this_side(self, table: RunTable) -> None:
        opened(table)
        error = OSError("no broker")
        outcome = table.fail(RUN, error)
        assert outcome is not None
        assert (outcome.kind, outcome.exception, outcome.cancel_work) == ("error", error, False)
        assert table.fail(RUN, error) is None

    @pytest.mark.parametrize("kind", sorted(frames.TERMINAL))
    @pytest.mark.parametrize(
        "earlier", [[], ["task_started"], ["progress", "heartbeat", "task_started"]], ids=str
    )
    def test_a_run_ends_in_whatever_order_its_events_come(
        self, table: RunTable, kind: str, earlier: list[str]
    ) -> None:
        table.open(RUN, "app.task", DeliveryPolicy())  # not even submitted yet
        for number, name in enumerate(earlier, start=1):
            assert outcome_of(table, event(name, seq=number)) is None
        assert isinstance(outcome_of(table, event(kind, seq=9)), Outcome)
        assert RUN not in table

    def test_a_second_outcome_is_counted_and_dropped(self, table: RunTable) -> None:
        opened(table)
        assert outcome_of(table, event("task_result")) is not None
        for kind in sorted(frames.EVENTS):
            assert outcome_of(table, event(kind)) is None
        assert table.cancel(RUN) is None
        assert table.fail(RUN, ValueError()) is None
        assert table.dropped == {"late": len(frames.EVENTS)}

    def test_a_stale_error_does_not_end_a_run_that_a_newer_attempt_works_on(self, table: RunTable) -> None:
        # Fault matrix, row 36: the first RESULT is taken, whichever attempt it is of.
        opened(table)
        table.apply(event("task_started", attempt=1))
        table.apply(event("task_started", attempt=2))
        assert outcome_of(table, event("task_error", attempt=1, seq=2)) is None
        assert outcome_of(table, event("task_cancelled", attempt=1, seq=2)) is None
        assert RUN in table
        assert outcome_of(table, event("task_result", attempt=1, seq=2)) is not None

    def test_an_exception_that_lets_nothing_be_set_on_it_ends_its_run(self, table: RunTable) -> None:
        @dataclass(frozen=True)
        class Frozen(Exception):
            code: int

        opened(table)
        outcome = outcome_of(table, event("task_error", exception=Frozen(7), worker=WORKER))
        assert outcome is not None
        assert outcome.kind == "error"


class TestTaken:
    """Whoever applies an event learns whether its run took it."""

    @pytest.mark.parametrize("kind", sorted(frames.EVENTS))
    def test_an_event_of_an_open_run_is_taken(self, table: RunTable, kind: str) -> None:
        opened(table)
        assert table.apply(event(kind)).taken
        assert table.dropped == {}

    def test_what_is_dropped_is_not_taken(self, table: RunTable) -> None:
        opened(table)
        for frame in (None, event("task_paused"), event("log", "b" * 32), event("progress", fraction=5)):
            assert table.apply(frame) == (False, None, None)
        table.fail(RUN, ValueError())
        assert table.apply(event("log")) == (False, None, None)


class TestDropped:
    """What harms nobody is counted."""

    def test_an_unknown_run(self, table: RunTable) -> None:
        assert outcome_of(table, event("task_result")) is None
        assert table.dropped == {"unknown_run": 1}

    def test_an_unknown_type_of_a_newer_peer(self, table: RunTable) -> None:
        opened(table)
        assert outcome_of(table, event("task_paused")) is None
        assert table.dropped == {"unknown_type": 1}
        assert RUN in table

    @pytest.mark.parametrize(
        "frame",
        [
            None,
            [],
            {},
            {"type": "heartbeat", "run_id": ["x"]},
            {"type": "task_result", "run_id": RUN, "attempt": 1, "seq": 1},
            {**event("task_result"), "seq": 0},
            {**event("task_error"), "error": "x"},
            {**event("task_retry"), "error": None},
        ],
        ids=str,
    )
    def test_a_malformed_event(self, table: RunTable, frame: Any) -> None:
        opened(table)
        assert outcome_of(table, frame) is None
        assert table.dropped == {"malformed": 1}
        assert RUN in table

    def test_closed_runs_are_remembered_for_a_while_and_not_for_ever(self, table: RunTable) -> None:
        first, *others = (secrets.token_hex(16) for _ in range(TOMBSTONES + 1))
        for run_id in (first, *others):
            opened(table, run_id)
            table.fail(run_id, ValueError())
        table.apply(event("heartbeat", others[0]))
        table.apply(event("heartbeat", first))
        assert table.dropped == {"late": 1, "unknown_run": 1}


class TestStates:
    """Where an open run is."""

    def state(self, table: RunTable) -> RunState:
        """Return the state of the one open run."""
        (run,) = table.open_runs()
        return run.state

    def test_from_queued_to_started(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy())
        assert self.state(table) == "queued"
        table.submitted(RUN)
        assert self.state(table) == "submitted"
        table.apply(event("task_started"))
        assert self.state(table) == "started"

    def test_a_fast_worker_is_ahead_of_the_brokers_answer(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy())
        table.apply(event("heartbeat"))
        table.submitted(RUN)
        assert self.state(table) == "started"

    def test_the_word_of_an_earlier_submission_is_not_that_of_the_current_one(self, table: RunTable) -> None:
        run = table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        table.refuse(RUN, SubmitError("the broker is down"))
        table.resubmit(RUN)
        table.submitted(RUN, 1)
        assert (self.state(table), run.submitted_at) == ("queued", None)
        table.submitted(RUN, 2)
        assert (self.state(table), run.submitted_at) == ("submitted", 1000)

    def test_a_run_that_is_being_cancelled_stays_so(self, table: RunTable) -> None:
        opened(table, cancel_mode="require_ack")
        table.cancel(RUN)
        table.apply(event("task_started"))
        assert self.state(table) == "cancelling"

    def test_open_runs_are_listed_oldest_first(self, table: RunTable) -> None:
        ids = [secrets.token_hex(16) for _ in range(5)]
        for run_id in ids:
            opened(table, run_id)
        table.fail(ids[2], ValueError())
        assert [run.run_id for run in table.open_runs()] == [ids[0], ids[1], ids[3], ids[4]]

    def test_submitting_a_closed_run_is_harmless(self, table: RunTable) -> None:
        opened(table)
        table.fail(RUN, ValueError())
        table.submitted(RUN)
        assert len(table) == 0


class TestCancel:
    """The waiter has gone."""

    def test_best_effort_ends_the_run_at_once_and_stops_the_work(self, table: RunTable) -> None:
        opened(table)
        outcome = table.cancel(RUN)
        assert outcome is not None
        assert (outcome.kind, outcome.cancel_work) == ("cancelled", True)
        assert outcome_of(table, event("task_result")) is None

    def test_require_ack_waits_for_the_acknowledgement(self, table: RunTable) -> None:
        opened(table, cancel_mode="require_ack")
        assert table.cancel(RUN) is None
        outcome = outcome_of(table, event("task_cancelled"))
        assert outcome is not None
        assert outcome.kind == "cancelled"

    def test_a_result_that_is_already_under_way_wins(self, table: RunTable) -> None:
        opened(table, cancel_mode="require_ack")
        table.cancel(RUN)
        outcome = outcome_of(table, event("task_result"))
        assert outcome is not None
        assert outcome.kind == "result"

    def test_the_wait_for_the_acknowledgement_ends(self, table: RunTable, clock: Clock) -> None:
        opened(table, cancel_mode="require_ack", cancel_timeout=3)
        table.cancel(RUN)
        clock.now += 2
        table.cancel(RUN)  # again: no new wait
        assert table.next_deadline() == 1003
        assert table.expire() == []
        clock.now += 1
        outcome = ended(*table.expire())
        assert (outcome.kind, outcome.exception) == ("timeout", None)
        assert len(table) == 0

    def test_an_unknown_run_is_no_ones(self, table: RunTable) -> None:
        assert table.cancel(RUN) is None


class TestDeadlines:
    """Every clock is the submitter's, and starts when the run is opened."""

    def test_no_outcome_in_time(self, table: RunTable, clock: Clock) -> None:
        opened(table, timeout=5)
        table.apply(event("task_started"))
        assert table.next_deadline() == 1005
        clock.now += 4.9
        assert table.expire() == []
        clock.now = 1005
        outcome = ended(*table.expire())
        assert (outcome.kind, outcome.cancel_work) == ("timeout", True)
        assert isinstance(outcome.exception, DeliveryTimeoutError)
        assert str(outcome.exception) == (
            f"run {RUN} of app.task in environment 'reports' had no outcome within delivery_timeout=5 s "
            "(state: started)"
        )

    def test_heartbeats_do_not_put_the_timeout_off(self, table: RunTable, clock: Clock) -> None:
        opened(table, timeout=5, heartbeat_seconds=2)
        for number in range(5):
            table.apply(event("heartbeat", seq=number + 1))
            assert table.expire() == []
            clock.now += 1
        assert ended(*table.expire()).kind == "timeout"

    def test_a_run_that_does_not_start_in_time_although_it_was_accepted(
        self, table: RunTable, clock: Clock
    ) -> None:
        opened(table, start_timeout=5)
        clock.now += 5
        outcome = ended(*table.expire())
        assert isinstance(outcome.exception, DeliveryTimeoutError)
        assert "delivery_start_timeout=5 s: accepted by the backend, never started" in str(outcome.exception)
        assert outcome.cancel_work

    def test_a_run_that_the_backend_does_not_accept_in_time(self, table: RunTable, clock: Clock) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(start_timeout=5))
        clock.now += 5
        outcome = ended(*table.expire())
        assert "not accepted by the backend yet: is the broker up?" in str(outcome.exception)

    @pytest.mark.parametrize("kind", ["task_started", "heartbeat", "progress", "log"])
    def test_any_sign_of_life_is_a_start(self, table: RunTable, clock: Clock, kind: str) -> None:
        opened(table, start_timeout=5)
        clock.now += 4
        table.apply(event(kind))
        clock.now += 100
        assert table.expire() == []
        assert RUN in table

    def test_silence_after_the_start_is_a_lost_worker(self, table: RunTable, clock: Clock) -> None:
        opened(table, heartbeat_seconds=2)
        table.apply(event("task_started", worker=WORKER))
        clock.now += 1.5
        table.apply(event("heartbeat", seq=2))
        clock.now += 1.9
        assert table.expire() == []
        clock.now += 0.5
        outcome = ended(*table.expire())
        assert (outcome.kind, outcome.cancel_work) == ("error", True)
        error = lost_error(outcome)
        assert "its worker on w1 (pid 7) was lost in attempt 1" in str(error)
        assert "no sign of life from it for 2.4 s (delivery_heartbeat_seconds=2)" in str(error)
        assert error.payload["retryable"] is True
        assert "on worker w1 pid 7" in error.__notes__[0]

    def test_a_heartbeat_counts_from_when_it_arrived(self, table: RunTable, clock: Clock) -> None:
        opened(table, heartbeat_seconds=2)
        table.apply(event("task_started"))
        clock.now += 2.5
        table.apply(event("heartbeat", seq=2, received_at=1001.5))  # read late by a busy loop
        assert table.expire() == []
        table.apply(event("heartbeat", seq=3, received_at=1000.5))
        clock.now = 1003.4
        assert table.expire() == []
        clock.now = 1003.5
        assert len(table.expire()) == 1

    @pytest.mark.parametrize(
        "arrived", ["soon", b"", [], {}, True, float("nan"), float("inf"), 1e12, -1e12, None]
    )
    def test_a_peer_that_claims_when_it_arrived_is_not_believed(
        self, table: RunTable, clock: Clock, arrived: Any
    ) -> None:
        opened(table, heartbeat_seconds=2)
        table.apply(event("task_started", received_at=arrived))
        clock.now += 2.5
        assert len(table.expire()) == 1

    def test_silence_in_the_queue_is_none(self, table: RunTable, clock: Clock) -> None:
        opened(table, heartbeat_seconds=2)
        clock.now += 1000
        assert table.expire() == []
        assert table.next_deadline() is None

    def test_the_earliest_deadline_ends_the_run(self, table: RunTable, clock: Clock) -> None:
        opened(table, timeout=30, start_timeout=10, heartbeat_seconds=2)
        assert table.next_deadline() == 1010
        table.apply(event("task_started"))
        assert table.next_deadline() == 1002
        clock.now += 3
        outcome = ended(*table.expire())
        assert isinstance(outcome.exception, WorkerLostError)

    def test_many_runs_expire_together_and_each_by_its_own_deadline(
        self, table: RunTable, clock: Clock
    ) -> None:
        ids = [secrets.token_hex(16) for _ in range(100)]
        for number, run_id in enumerate(ids):
            opened(table, run_id, timeout=1 + number)
        clock.now += 50
        assert {outcome.run.run_id for outcome in table.expire()} == set(ids[:50])
        assert table.next_deadline() == 1051
        clock.now += 50
        assert {outcome.run.run_id for outcome in table.expire()} == set(ids[50:])
        assert table.next_deadline() is None

    def test_a_run_without_deadlines_has_none(self, table: RunTable) -> None:
        opened(table)
        assert table.next_deadline() is None

    def test_the_deadline_of_a_closed_run_wakes_nobody(self, table: RunTable, clock: Clock) -> None:
        opened(table, timeout=5)
        table.apply(event("task_result"))
        assert table.next_deadline() is None
        clock.now += 5
        assert table.expire() == []

    def test_deadlines_of_ended_runs_do_not_pile_up(self, table: RunTable) -> None:
        def end_many() -> int:
            for _ in range(TOMBSTONES):
                run_id = secrets.token_hex(16)
                opened(table, run_id, timeout=3600)
                table.fail(run_id, ValueError())
            return tracemalloc.get_traced_memory()[0]

        opened(table, timeout=60)  # it is open for long, and its deadline comes first
        tracemalloc.start()
        try:
            first, second = end_many(), end_many()
        finally:
            tracemalloc.stop()
        assert second - first < 200_000
        assert table.next_deadline() == 1060  # that of the run which is still open is not lost


class TestLostDeliveries:
    """A delivery that failed is tried again as often as the policy says, and then told in full."""

    def test_without_retries_the_first_loss_is_the_end(self, table: RunTable) -> None:
        opened(table)
        outcome = ended(outcome_of(table, loss()))
        assert (outcome.kind, outcome.cancel_work) == ("error", True)
        assert lost_error(outcome).attempts == [
            {"attempt": 1, "reason": "signal 9 (SIGKILL)", "seconds": 0.0}
        ]
        assert len(table) == 0

    def test_the_error_says_who_when_and_in_whose_word(self, table: RunTable, clock: Clock) -> None:
        opened(table)
        table.apply(event("task_started", worker=WORKER))
        clock.advance(3)
        table.apply(event("heartbeat", seq=2))
        clock.advance(1.25)
        # Reported by the parent process of the one that died.
        error = lost_error(outcome_of(table, loss(worker={"host": "w1", "pid": 1})))
        assert str(error) == (
            f"run {RUN} of app.task in environment 'reports': its worker on w1 (pid 7) was lost in attempt 1, "
            "1.2 s after its last sign of life: signal 9 (SIGKILL)"
        )
        assert error.__notes__ == [
            f"in run {RUN} of app.task, environment 'reports', on worker w1 pid 7, celery job j1, attempt 1"
        ]
        assert error.payload["worker"] == WORKER
        assert (error.payload["kind"], error.payload["source"]) == ("WorkerLostError", "backend")
        assert (error.payload["attempt"], error.payload["retryable"]) == (1, True)
        assert error.attempts == [
            {"attempt": 1, "reason": "signal 9 (SIGKILL)", "seconds": 4.25, "host": "w1", "pid": 7}
        ]

    def test_a_worker_that_never_spoke_is_not_named(self, table: RunTable, clock: Clock) -> None:
        opened(table)
        clock.advance(2)
        error = lost_error(outcome_of(table, loss("the job is gone")))
        assert str(error) == (
            f"run {RUN} of app.task in environment 'reports': its worker was lost in attempt 1: the job is gone"
        )
        assert error.attempts == [{"attempt": 1, "reason": "the job is gone", "seconds": 2.0}]

    def test_a_loss_is_no_sign_of_life(self, table: RunTable, clock: Clock) -> None:
        run = opened(table, retries=1, start_timeout=5)
        clock.advance(1)
        assert table.apply(loss(worker=WORKER)).again == Resubmission(run, "signal 9 (SIGKILL)")
        assert (run.started_at, run.last_seen, run.ever_started) == (None, None, False)

    def test_a_lost_run_is_submitted_again_as_another_attempt(self, table: RunTable, clock: Clock) -> None:
        run = opened(table, retries=1)
        table.apply(event("task_started", worker=WORKER))
        clock.advance(4)
        taken, outcome, again = table.apply(loss())
        assert (taken, outcome, again) == (True, None, Resubmission(run, "signal 9 (SIGKILL)"))
        assert (run.state, run.attempt, run.worker) == (RunState.LOST, 1, {})
        clock.advance(1)
        assert table.resubmit(RUN) is run
        assert (run.state, run.attempt, run.attempt_at) == (RunState.QUEUED, 2, 1005)
        table.submitted(RUN, 2)
        table.apply(event("task_started", attempt=2, worker={"host": "w2", "pid": 8}))
        assert run.state == "started"
        outcome = outcome_of(table, event("task_result", attempt=2, seq=2))
        assert ended(outcome).value == 42

    def test_a_task_that_kills_its_workers_stops_after_its_retries(
        self, table: RunTable, clock: Clock
    ) -> None:
        opened(table, retries=2)
        for attempt in (1, 2):
            worker = {"host": "w1", "pid": attempt}
            table.apply(event("task_started", attempt=attempt, worker=worker))
            clock.advance(2)
            assert table.apply(loss(f"signal {attempt}", attempt=attempt)).again is not None
            table.resubmit(RUN)
        clock.advance(1)
        error = lost_error(outcome_of(table, loss("the job is gone", attempt=3)))
        assert "was lost in attempt 3" in str(error)
        assert error.attempts == [
            {"attempt": 1, "reason": "signal 1", "seconds": 2.0, "host": "w1", "pid": 1},
            {"attempt": 2, "reason": "signal 2", "seconds": 2.0, "host": "w1", "pid": 2},
            {"attempt": 3, "reason": "the job is gone", "seconds": 1.0},
        ]
        assert error.__notes__ == [
            "3 executions came to nothing:\n"
            "  attempt 1 on w1 (pid 1), after 2 s: signal 1\n"
            "  attempt 2 on w1 (pid 2), after 2 s: signal 2\n"
            "  attempt 3, after 1 s: the job is gone"
        ]

    @pytest.mark.parametrize("kind", ["task_error", "task_cancelled"])
    def test_what_the_task_itself_comes_to_is_never_tried_again(self, table: RunTable, kind: str) -> None:
        opened(table, retries=5)
        table.apply(event("task_started"))
        taken, outcome, again = table.apply(event(kind, seq=2))
        assert (taken, again) == (True, None)
        assert outcome is not None

    @pytest.mark.parametrize("source", ["task", "worker", "executor", None])
    def test_only_the_backend_can_say_that_a_worker_was_lost(
        self, table: RunTable, source: str | None
    ) -> None:
        opened(table, retries=5)
        outcome = outcome_of(
            table, event("task_error", error={**lost("raised by the task"), "source": source})
        )
        assert ended(outcome).kind == "error"
        assert not isinstance(ended(outcome).exception, WorkerLostError)

    def test_silence_is_tried_again_too(self, table: RunTable, clock: Clock) -> None:
        run = opened(table, retries=1, heartbeat_seconds=2)
        table.apply(event("task_started"))
        clock.advance(2)
        (again,) = table.expire()
        assert isinstance(again, Resubmission)
        assert again.run is run
        assert again.reason == "no sign of life from it for 2.0 s (delivery_heartbeat_seconds=2)"
        clock.advance(100)
        assert table.expire() == []  # nobody is silent who was not asked to speak

    @pytest.mark.parametrize("end", ["task_result", "task_error", "task_cancelled"])
    def test_who_was_given_up_may_yet_bring_the_outcome_and_nothing_else(
        self, table: RunTable, end: str
    ) -> None:
        # Before it is submitted again: then its own word is newer than that of its death.
        opened(table, retries=1)
        table.apply(loss())
        kinds = sorted(frames.EVENTS - frames.TERMINAL)
        for number, kind in enumerate(kinds, start=2):
            assert table.apply(event(kind, seq=number)) == (False, None, None)
        assert table.apply(loss()) == (False, None, None)
        assert table.dropped == {"stale": len(kinds) + 1}
        assert ended(outcome_of(table, event(end, seq=1))).kind == end.removeprefix("task_")

    def test_a_second_loss_of_an_earlier_attempt_costs_no_retry(self, table: RunTable) -> None:
        run = opened(table, retries=1)
        table.apply(loss())
        table.resubmit(RUN)
        assert table.apply(loss("said by somebody else")) == (False, None, None)
        assert (run.state, run.attempt, len(run.history)) == (RunState.QUEUED, 2, 1)

    def test_only_a_lost_run_is_submitted_again(self, table: RunTable) -> None:
        run = opened(table, retries=5)
        assert table.resubmit(RUN) is None
        table.apply(event("task_started"))
        assert table.resubmit(RUN) is None
        table.apply(loss())
        assert table.resubmit(RUN) is run
        assert table.resubmit(RUN) is None
        assert run.attempt == 2
        table.fail(RUN, ValueError())
        assert table.resubmit(RUN) is None

    def test_the_history_of_a_run_has_its_bounds(self, table: RunTable) -> None:
        run = opened(table, retries=3 * MAX_HISTORY)
        for attempt in range(1, 2 * MAX_HISTORY + 1):
            table.apply(loss(f"loss {attempt}", attempt=attempt))
            table.resubmit(RUN)
        reasons = [entry["reason"] for entry in run.history]
        assert len(reasons) == MAX_HISTORY
        assert reasons[0] == "loss 1"  # the first and the last tell the most
        assert reasons[-1] == f"loss {2 * MAX_HISTORY}"

    def test_a_long_word_of_the_backend_is_cut(self, table: RunTable) -> None:
        opened(table)
        assert len(str(lost_error(outcome_of(table, loss("x" * 100_000))))) < 3_000


class TestRefusals:
    """The backend did not accept a run."""

    def test_without_retries_the_refusal_itself_is_the_outcome(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy())
        error = SubmitError("the broker is down")
        outcome = ended(table.refuse(RUN, error))
        assert (outcome.kind, outcome.exception, outcome.cancel_work) == ("error", error, False)
        assert not hasattr(error, "__notes__")

    def test_a_refused_run_is_submitted_again(self, table: RunTable) -> None:
        run = table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        assert table.refuse(RUN, SubmitError("the broker is down")) == Resubmission(run, "the broker is down")
        assert run.state == "lost"
        table.resubmit(RUN)
        error = SubmitError("still down")
        assert table.refuse(RUN, SubmitError("the first one's answer, late"), 1) is None
        assert ended(table.refuse(RUN, error, 2)).exception is error
        (note,) = error.__notes__
        assert note == (
            "2 executions came to nothing:\n"
            "  attempt 1, after 0 s: the broker is down\n"
            "  attempt 2, after 0 s: still down"
        )

    def test_what_the_backend_may_have_is_submitted_again_as_it_was(
        self, table: RunTable, clock: Clock
    ) -> None:
        run = table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        error = SubmitError("its answer was lost", maybe_accepted=True)
        assert table.refuse(RUN, error, doubtful=True) == Resubmission(run, "its answer was lost")
        assert (run.state, run.attempt) == ("queued", 1)
        assert table.resubmit(RUN) is run
        assert table.resubmit(RUN) is None
        assert (run.state, run.attempt) == ("queued", 1)
        assert ended(table.refuse(RUN, error, doubtful=True)).exception is error
        (note,) = error.__notes__
        assert note.count("attempt 1, after 0 s: its answer was lost") == 2

    @pytest.mark.parametrize("kind", ["task_started", "task_retry"])
    def test_nor_is_it_when_a_worker_has_spoken_of_it_meanwhile(self, table: RunTable, kind: str) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        table.refuse(RUN, SubmitError("its answer was lost"), doubtful=True)
        table.apply(event(kind))
        assert table.resubmit(RUN) is None
        assert outcome_of(table, event("task_result", seq=2)).value == 42

    def test_a_worker_that_dies_meanwhile_is_a_loss(self, table: RunTable) -> None:
        run = table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        table.refuse(RUN, SubmitError("its answer was lost"), doubtful=True)
        table.apply(event("task_started"))
        assert table.apply(loss()).again is not None
        assert table.resubmit(RUN) is run
        assert run.attempt == 2
        lost_error(outcome_of(table, loss(attempt=2)))

    def test_a_worker_has_it_whatever_the_backend_says(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(retries=1))
        table.apply(event("task_started"))
        assert table.refuse(RUN, SubmitError("its answer was lost", maybe_accepted=True)) is None
        outcome = outcome_of(table, event("task_result", seq=2))
        assert outcome is not None
        assert outcome.kind == "result"

    def test_what_cannot_be_sent_is_not_sent_again(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(retries=3))
        error = TypeError("an argument")
        assert ended(table.refuse(RUN, error, final=True)).exception is error

    def test_a_run_that_has_ended_can_not_be_refused(self, table: RunTable) -> None:
        opened(table)
        table.apply(event("task_result"))
        assert table.refuse(RUN, SubmitError("too late")) is None


class TestRetriesOfTheBackend:
    """A backend may run a payload again by itself: that ends nothing and is no attempt of ours."""

    def test_it_waits_in_the_queue_again_and_silence_there_is_none(
        self, table: RunTable, clock: Clock
    ) -> None:
        run = opened(table, heartbeat_seconds=2, start_timeout=5)
        table.apply(event("task_started", worker=WORKER))
        assert table.apply(event("task_retry", seq=2)) == (True, None, None)
        assert (run.state, run.attempt) == (RunState.SUBMITTED, 1)
        assert (run.started_at, run.last_seen, run.worker) == (None, None, {})
        clock.advance(1000)
        assert table.expire() == []
        assert table.next_deadline() is None
        table.apply(event("task_started", seq=1, execution="second"))
        assert run.state == "started"
        clock.advance(2)
        lost_error(*table.expire())

    def test_its_executions_are_told_in_the_error_and_are_no_attempts(
        self, table: RunTable, clock: Clock
    ) -> None:
        opened(table)
        for number in range(3):
            execution = f"execution {number}"
            table.apply(event("task_started", worker=WORKER, execution=execution))
            clock.advance(1)
            table.apply(event("task_retry", seq=2, execution=execution))
        error = lost_error(outcome_of(table, loss()))
        reasons = [(entry["attempt"], entry["reason"], entry.get("pid")) for entry in error.attempts]
        assert reasons == [*[(1, "retried by the backend: it broke", 7)] * 3, (1, "signal 9 (SIGKILL)", None)]
        (note,) = error.__notes__
        assert note.startswith(
            "4 executions came to nothing:\n  attempt 1 on w1 (pid 7), after 1 s: retried by"
        )

    def test_the_last_execution_may_fail_for_good(self, table: RunTable) -> None:
        opened(table, retries=3)
        table.apply(event("task_retry"))
        outcome = ended(outcome_of(table, event("task_error", seq=2)))
        assert type(outcome.exception) is EnvironmentExecutionError

    def test_a_run_that_is_being_cancelled_stays_so(self, table: RunTable, clock: Clock) -> None:
        run = opened(table, cancel_mode="require_ack", cancel_timeout=3)
        table.apply(event("task_started"))
        table.cancel(RUN)
        table.apply(event("task_retry", seq=2))
        assert run.state == "cancelling"
        clock.advance(3)
        assert ended(*table.expire()).kind == "timeout"

    def test_a_retry_without_a_word_of_why(self, table: RunTable) -> None:
        run = opened(table)
        table.apply(event("task_retry", error={"kind": "Retry"}))
        assert run.history[0]["reason"] == "retried by the backend: no reason given"


class TestDuplicates:
    """Events are numbered by the execution that sends them."""

    def test_what_was_said_before_is_not_heard_again(self, table: RunTable, clock: Clock) -> None:
        run = opened(table)
        table.apply(event("progress", seq=3, execution="e1"))
        clock.advance(5)
        for seq in (3, 2, 1):
            assert not table.apply(event("progress", seq=seq, execution="e1")).taken
        assert table.dropped == {"duplicate": 3}
        assert run.last_seen == 1000
        assert table.apply(event("progress", seq=4, execution="e1")).taken

    def test_each_execution_has_numbers_of_its_own(self, table: RunTable) -> None:
        opened(table)
        assert table.apply(event("progress", seq=3, execution="e1")).taken
        assert table.apply(event("task_started", seq=1, execution="e2")).taken
        assert table.dropped == {}

    @pytest.mark.parametrize("execution", [{}, {"execution": None}, {"execution": 5}, {"execution": ["e"]}])
    def test_who_does_not_say_who_it_is_is_heard_every_time(
        self, table: RunTable, execution: dict[str, Any]
    ) -> None:
        opened(table)
        for _ in range(2):
            assert table.apply(event("progress", **execution)).taken

    @pytest.mark.parametrize("kind", sorted(frames.TERMINAL))
    def test_no_outcome_is_a_duplicate_of_news(self, table: RunTable, kind: str) -> None:
        opened(table)
        table.apply(event("progress", seq=9, execution="e1"))
        assert outcome_of(table, event(kind, seq=1, execution="e1")) is not None

    def test_a_duplicate_of_a_retry_does_not_take_the_next_execution_back(self, table: RunTable) -> None:
        run = opened(table)
        again = event("task_retry", seq=2, execution="e1")
        table.apply(again)
        table.apply(event("task_started", execution="e2"))
        assert not table.apply(dict(again)).taken
        assert (run.state, len(run.history)) == (RunState.STARTED, 1)

    def test_executions_beyond_the_bound_are_heard_and_not_remembered(self, table: RunTable) -> None:
        run = opened(table)
        for number in range(MAX_EXECUTIONS + 10):
            assert table.apply(event("heartbeat", execution=f"e{number}")).taken
        assert len(run.seqs) == MAX_EXECUTIONS
        assert table.apply(event("heartbeat", execution=f"e{MAX_EXECUTIONS + 5}")).taken
        assert not table.apply(event("heartbeat", execution="e1")).taken


class TestDeadlinesOfLostRuns:
    """The clocks of a run go on while it changes hands."""

    def test_the_timeout_covers_all_attempts(self, table: RunTable, clock: Clock) -> None:
        opened(table, retries=9, timeout=5)
        clock.advance(2)
        table.apply(loss())
        assert table.next_deadline() == 1005
        table.resubmit(RUN)
        clock.advance(3)
        outcome = ended(*table.expire())
        assert isinstance(outcome.exception, DeliveryTimeoutError)
        (note,) = outcome.exception.__notes__
        assert note.endswith("attempt 1, after 2 s: signal 9 (SIGKILL)")

    def test_silence_and_the_timeout_at_once(self, table: RunTable, clock: Clock) -> None:
        opened(table, retries=9, timeout=5, heartbeat_seconds=2)
        table.apply(event("task_started"))
        clock.advance(60)  # a loop that was busy for long
        again, outcome = table.expire()
        assert isinstance(again, Resubmission)
        assert isinstance(ended(outcome).exception, DeliveryTimeoutError)
        assert table.resubmit(RUN) is None

    def test_a_lost_run_keeps_its_timeout_when_old_deadlines_were_cleared_away(
        self, table: RunTable, clock: Clock
    ) -> None:
        opened(table, retries=1, timeout=30, heartbeat_seconds=2)
        table.apply(event("task_started"))
        for _ in range(200):
            run_id = secrets.token_hex(16)
            opened(table, run_id, timeout=3600)
            table.fail(run_id, ValueError())
        clock.advance(2)
        (again,) = table.expire()
        assert isinstance(again, Resubmission)
        assert table.next_deadline() == 1030

    def test_a_run_that_is_not_submitted_need_not_start(self, table: RunTable, clock: Clock) -> None:
        opened(table, retries=1, start_timeout=5)
        table.apply(loss())
        clock.advance(6)
        assert table.expire() == []
        table.resubmit(RUN)
        assert table.next_deadline() == 1005  # from the first submission
        assert isinstance(ended(*table.expire()).exception, DeliveryTimeoutError)

    @pytest.mark.parametrize("again", ["lost", "retried by the backend"])
    def test_a_run_that_has_started_once_has_started(self, table: RunTable, clock: Clock, again: str) -> None:
        opened(table, retries=1, start_timeout=5)
        table.apply(event("task_started"))
        if again == "lost":
            table.apply(loss())
            table.resubmit(RUN)
        else:
            table.apply(event("task_retry"))
        clock.advance(60)
        assert table.expire() == []
        assert RUN in table


class TestCancelOfLostRuns:
    """Nobody acknowledges the cancellation of what nobody has."""

    @pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
    def test_a_lost_run_ends_at_once(self, table: RunTable, mode: str) -> None:
        opened(table, retries=1, cancel_mode=mode)
        table.apply(loss())
        outcome = ended(table.cancel(RUN))
        assert (outcome.kind, outcome.cancel_work) == ("cancelled", True)
        assert table.resubmit(RUN) is None

    def test_a_run_that_is_being_cancelled_is_not_submitted_again(self, table: RunTable) -> None:
        opened(table, retries=9, cancel_mode="require_ack")
        table.cancel(RUN)
        taken, outcome, again = table.apply(loss())
        assert (taken, again) == (True, None)
        lost_error(outcome)

    def test_nor_is_one_whose_worker_falls_silent(self, table: RunTable, clock: Clock) -> None:
        opened(table, retries=9, cancel_mode="require_ack", heartbeat_seconds=2)
        table.apply(event("task_started"))
        table.cancel(RUN)
        clock.advance(2)
        lost_error(*table.expire())

    def test_nor_one_that_the_backend_refuses_meanwhile(self, table: RunTable) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(retries=9, cancel_mode="require_ack"))
        table.cancel(RUN)
        error = SubmitError("the broker is down")
        assert ended(table.refuse(RUN, error)).exception is error


@dataclass
class Model:
    """What the machine below knows of a run, by rules of its own."""

    policy: DeliveryPolicy
    opened_at: float
    attempt: int = 1
    #: How often it was handed to the backend.
    submissions: int = 1
    queued: bool = True
    #: The backend may have it, and may not.
    doubtful: bool = False
    started: bool = False
    ever_started: bool = False
    lost: bool = False
    last_seen: float | None = None
    cancelled_at: float | None = None
    seqs: dict[str, int] = field(default_factory=dict)
    outcomes: list[str] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return not self.outcomes

    @property
    def state(self) -> str:
        if self.lost:
            return "lost"
        if self.cancelled_at is not None:
            return "cancelling"
        return "started" if self.started else "queued" if self.queued else "submitted"

    @property
    def may_be_sent_again(self) -> bool:
        return self.submissions <= self.policy.retries and self.cancelled_at is None

    def dues(self) -> dict[str, float]:
        """Return the moments at which something has to have happened to the run, by what they are."""
        policy, dues = self.policy, {}
        if policy.timeout is not None:
            dues["timeout"] = self.opened_at + policy.timeout
        if policy.start_timeout is not None and not self.ever_started and not self.lost:
            dues["start"] = self.opened_at + policy.start_timeout
        if policy.heartbeat_seconds is not None and self.last_seen is not None:
            dues["silence"] = self.last_seen + policy.heartbeat_seconds
        if self.cancelled_at is not None:
            dues["cancel"] = self.cancelled_at + policy.cancel_timeout
        return dues

    def due(self) -> float:
        """Return the first of them."""
        return min(self.dues().values(), default=float("inf"))

    def lose(self) -> str:
        """Its delivery has failed; return what has to follow."""
        if not self.may_be_sent_again:
            return "error"
        self.lost, self.queued, self.started, self.last_seen = True, True, False, None
        return "again"

    def hear(self, frame: frames.Frame, now: float) -> str:
        """Take an event in; return what has to follow: why it is dropped, nothing, ``again`` or an outcome."""
        kind = frame["type"]
        if not self.open:
            return "late"
        if kind == frames.TASK_RESULT:
            return "result"
        own_end = kind in frames.TERMINAL and not (
            kind == frames.TASK_ERROR and frame["error"]["source"] == "backend"
        )
        if frame["attempt"] < self.attempt or (self.lost and not own_end):
            return "stale"
        execution = frame.get("execution")
        if execution is not None and kind not in frames.TERMINAL:
            if frame["seq"] <= self.seqs.get(execution, 0):
                return "duplicate"
            self.seqs[execution] = frame["seq"]
        if kind == frames.TASK_RETRY:
            self.queued = self.started = False
            self.ever_started, self.last_seen = True, None
            return "nothing"
        self.attempt = max(self.attempt, frame["attempt"])
        if kind == frames.TASK_ERROR and frame["error"]["source"] == "backend":
            return self.lose()
        arrival = min(now, frame.get("received_at", now))
        self.started = self.ever_started = True
        self.last_seen = max(arrival, self.last_seen or self.opened_at)
        return kind.removeprefix("task_") if kind in frames.TERMINAL else "nothing"


#: What makes an event malformed: other fields, or (``...``) missing ones.
FLAWS: list[tuple[str, dict[str, Any]]] = [
    ("heartbeat", {"seq": 0}),
    ("task_result", {"seq": None}),
    ("task_cancelled", {"attempt": -1}),
    ("task_cancelled", {"attempt": ...}),
    ("task_result", {"run_id": ["unhashable"]}),
    ("task_result", {"run_id": "short"}),
    ("task_result", {"type": ["unhashable"]}),
    ("task_result", {"result": ...}),
    ("task_error", {"error": None}),
    ("task_error", {"error": {"kind": None}}),
    ("task_retry", {"error": ...}),
    ("progress", {"fraction": 2}),
    ("log", {"message": 5}),
]

NEWS = sorted(frames.EVENTS - frames.TERMINAL)
#: Which run a step is about; the last ones stand for any run, also one that has ended.
WHICH = list(range(10))
#: Who sends an event: one that keeps its numbers apart, or one that does not say who it is.
WHO = ["e1", "e2", None]
#: What passes at once: less than most deadlines, so that runs live to see something.
MOMENTS = [0.25, 0.5, 1, 3]
#: The steps of the machine below and what they may be given.
STEPS: dict[str, dict[str, list[Any]]] = {
    "open": {
        "timeout": [None, 1, 3, 10, 30],
        "start_timeout": [None, None, 1, 3, 10],
        "heartbeat_seconds": [None, 1, 3, 10],
        "cancel_mode": ["require_ack", "best_effort"],
        "cancel_timeout": [1, 3, 10],
        "retries": [0, 1, 2, 3],
    },
    "all_goes_well": {"which": WHICH, "steps": [1, 2, 3, 4]},
    "the_backend_refuses": {"which": WHICH, "doubtful": [True, False]},
    "submitted_again": {"which": WHICH, "lost_run": [True, False]},
    "cancel": {"which": WHICH},
    "sign_of_life": {
        "which": WHICH,
        "kind": NEWS,
        "who": WHO,
        "newer": [False] * 9 + [True],
        "late": [0, 0, 0.5, 2],
    },
    "end": {"which": WHICH, "kind": [*sorted(frames.TERMINAL), "failure on this side"], "who": WHO},
    "the_backend_says_that_the_worker_is_lost": {"which": WHICH, "lost_run": [False, False, True]},
    "word_of_an_earlier_attempt": {
        "which": WHICH,
        "kind": [*sorted(frames.EVENTS), "loss", "submission"],
        "who": WHO,
    },
    "duplicate": {"back": [0, 0, 0, 1, 1, 2, 3, 5, 7, 9], "of_open_run": [True, True, False]},
    "malformed_event": {"which": WHICH, "flaw": FLAWS},
    "let_time_pass": {"seconds": MOMENTS},
    "let_time_pass_while_the_loop_is_busy": {"seconds": MOMENTS},
}


#: Those by which runs come far; the long walks take them more often.
DEEPER = ["all_goes_well", "submitted_again", "the_backend_says_that_the_worker_is_lost", "duplicate"]


def step(name: str) -> Any:
    """Make a method a rule that is given what :data:`STEPS` says."""
    return rule(**{key: st.sampled_from(values) for key, values in STEPS[name].items()})


#: What the machine has to have met: how an event, a refusal, a cancellation or a deadline came out, and in
#: which state it found its run.
CROSSINGS = frozenset(
    {
        *(f"{kind} while {state}: {kind}" for kind in ("result", "error", "cancelled")
          for state in ("queued", "submitted", "started", "lost", "cancelling") if kind != "result"),
        *(f"result while {state}: result" for state in ("queued", "submitted", "started", "lost", "cancelling")),
        *(f"loss while {state}: again" for state in ("queued", "submitted", "started")),
        *(f"loss while {state}: error" for state in ("queued", "submitted", "started", "cancelling")),
        *(f"retry while {state}: nothing" for state in ("queued", "submitted", "started", "cancelling")),
        *(f"{kind} while {state}: stale" for kind in ("news", "error", "cancelled", "loss", "retry")
          for state in ("queued", "started")),
        *(f"{kind} while lost: stale" for kind in ("news", "loss", "retry")),
        *(f"{kind} while {state}: duplicate" for kind in ("news", "retry") for state in ("submitted", "started")),
        *(f"{kind} while closed: late" for kind in ("news", "result", "error", "cancelled", "loss", "retry")),
        "refusal while queued: again",
        "refusal while queued: error",
        "refusal while cancelling: error",
        "refusal while closed: nothing",
        "doubt while queued: again",
        "doubt while queued: error",
        "doubt while cancelling: error",
        "repetition while queued",
        *(f"resubmission while {state}: nothing" for state in ("queued", "started", "cancelling", "closed")),
        *(f"resubmission while lost: attempt {attempt}" for attempt in (2, 3, 4)),
        *(f"cancel while {state}: cancelled" for state in ("queued", "submitted", "started", "lost")),
        *(f"cancel while {state}: nothing"
          for state in ("queued", "submitted", "started", "cancelling", "closed")),
        *(f"{reason} while {state}: timeout" for reason in ("timeout", "start") for state in ("queued", "submitted")),
        *(f"timeout while {state}: timeout" for state in ("started", "lost", "cancelling")),
        "cancel while cancelling: timeout",
        "silence while started: again",
        "silence while started: error",
        "silence while cancelling: error",
        "submission of an earlier attempt",
        "event read late",
        "result of an earlier attempt",
    }
)  # fmt: skip


#: What hypothesis meets whenever it runs, although it draws much less.
OFTEN_MET = (
    "result while *: result",
    "loss while *: again",
    "loss while *: error",
    "refusal while queued: again",
    "silence while *",
    "retry while *: nothing",
    "resubmission while lost: attempt 2",
    "cancel while lost: cancelled",
    "cancel while *: nothing",
    "*: stale",
    "*: duplicate",
    "*: late",
    "timeout while *: timeout",
    "start while *: timeout",
)


class DeliveryMachine(RuleBasedStateMachine):
    """Any interleaving of calls: at most one outcome per run, and one once its deadlines have passed."""

    def __init__(self, met: Counter[str]) -> None:
        super().__init__()
        self.met = met
        self.clock = Clock()
        self.table = RunTable("reports", self.clock)
        self.runs: dict[str, Model] = {}
        self.sent: list[frames.Frame] = []

    def pick(self, which: int, wanted: Callable[[Model], bool] = lambda model: model.open) -> str:
        """Return the id of a run: mostly of one that is wanted, or open at least."""
        for fits in (wanted, lambda model: model.open):
            fitting = [run_id for run_id, model in self.runs.items() if fits(model)]
            if fitting and which < 8:
                return fitting[which % len(fitting)]
        return sorted(self.runs)[which % len(self.runs)]

    def state(self, run_id: str) -> str:
        """Return the state that a run should be in."""
        return self.runs[run_id].state if self.runs[run_id].open else "closed"

    def follow(self, run_id: str, step: Outcome | Resubmission | None, expected: str) -> None:
        """Note what came of something, which has to be what was expected."""
        model = self.runs[run_id]
        if expected in ("result", "error", "cancelled", "timeout"):
            outcome = ended(step)
            assert (outcome.run.run_id, outcome.kind) == (run_id, expected)
            assert model.open, "a second outcome"
            model.outcomes.append(outcome.kind)
        elif expected == "again":
            assert isinstance(step, Resubmission)
            assert step.run.run_id == run_id
        else:
            assert step is None

    def deliver(self, frame: frames.Frame) -> None:
        """Apply an event, which has to lead to what the model says."""
        run_id, kind = frame["run_id"], frame["type"].removeprefix("task_")
        if frame["type"] == frames.TASK_ERROR and frame["error"]["source"] == "backend":
            kind = "loss"
        elif frame["type"] not in frames.TERMINAL | {frames.TASK_RETRY}:
            kind = "news"
        model, state, before = self.runs[run_id], self.state(run_id), Counter(self.table.dropped)
        if kind == "result" and model.open and frame["attempt"] < model.attempt:
            self.met["result of an earlier attempt"] += 1
        expected = model.hear(frame, self.clock.now)
        applied = self.table.apply(dict(frame))
        self.met[f"{kind} while {state}: {expected}"] += 1
        dropped = expected in ("late", "stale", "duplicate")
        assert self.table.dropped - before == (Counter([expected]) if dropped else Counter())
        assert applied.taken is not dropped
        assert applied.outcome is None or applied.again is None
        self.follow(run_id, applied.outcome or applied.again, expected)

    def send(self, run_id: str, kind: str, who: str | None, attempt: int, **fields: Any) -> None:
        """Deliver a new event."""
        if who is not None:
            fields["execution"] = who
        frame = event(kind, run_id, attempt, len(self.sent) + 1, **fields)
        self.sent.append(frame)
        self.deliver(frame)

    # --- this side --------------------------------------------------------------

    @step("open")
    def open(self, **policy: Any) -> None:
        while len(self.table) < 4:
            run_id = f"{len(self.runs):032x}"
            run = self.table.open(run_id, "app.task", DeliveryPolicy(**policy))
            self.runs[run_id] = Model(run.policy, self.clock.now)
            if len(self.table) % 2:
                self.accept(run_id)

    def accept(self, run_id: str) -> None:
        """The backend accepts what was handed to it last."""
        model = self.runs[run_id]
        if not model.lost:  # then nothing is in its hands
            self.table.submitted(run_id, model.attempt)
            model.queued = model.doubtful = False

    @precondition(lambda self: self.runs)
    @step("all_goes_well")
    def all_goes_well(self, which: int, steps: int) -> None:
        """Take a run some steps along its way."""
        run_id = self.pick(which)
        for _ in range(steps):
            match self.state(run_id):
                case "lost":
                    self.submit_again(run_id)
                case "queued":
                    self.accept(run_id)
                case "submitted":
                    self.send(run_id, frames.TASK_STARTED, "e1", self.runs[run_id].attempt)
                case "started":
                    self.send(run_id, frames.HEARTBEAT, None, self.runs[run_id].attempt)

    @precondition(lambda self: self.runs)
    @step("the_backend_refuses")
    def the_backend_refuses(self, which: int, doubtful: bool) -> None:
        run_id = self.pick(which, lambda model: model.open and model.queued and not model.lost)
        model, state = self.runs[run_id], self.state(run_id)
        if model.open and not (model.queued or model.started or model.lost):
            return  # nobody hands such a run over
        expected = "nothing"
        if model.open and not (model.started or model.lost):
            if doubtful and model.may_be_sent_again:
                model.doubtful, expected = True, "again"
            else:
                expected = model.lose()
        self.met[f"{'doubt' if doubtful else 'refusal'} while {state}: {expected}"] += 1
        error = SubmitError("the broker is down")
        refused = self.table.refuse(run_id, error, model.attempt, doubtful=doubtful)
        self.follow(run_id, refused, expected)

    @precondition(lambda self: self.runs)
    @step("submitted_again")
    def submitted_again(self, which: int, lost_run: bool) -> None:
        self.submit_again(self.pick(which, lambda model: model.open and model.lost is lost_run))

    def submit_again(self, run_id: str) -> None:
        """Submit a run again; only a lost one takes that, and a doubtful one that was not heard of."""
        model, state = self.runs[run_id], self.state(run_id)
        run = self.table.resubmit(run_id)
        assert (run is not None) == (state == "lost" or (state == "queued" and model.doubtful))
        if run is None:
            self.met[f"resubmission while {state}: nothing"] += 1
            return
        model.submissions += 1
        if state == "lost":
            model.attempt += 1
            self.met[f"resubmission while lost: attempt {min(model.attempt, 4)}"] += 1
        else:
            self.met["repetition while queued"] += 1
        model.lost = model.doubtful = False
        assert run.attempt == model.attempt

    @precondition(lambda self: self.runs)
    @step("cancel")
    def cancel(self, which: int) -> None:
        model, state = self.runs[run_id := self.pick(which)], self.state(run_id)
        at_once = model.open and (model.policy.cancel_mode == "best_effort" or model.lost)
        expected = "cancelled" if at_once else "nothing"
        self.met[f"cancel while {state}: {expected}"] += 1
        self.follow(run_id, self.table.cancel(run_id), expected)
        if model.open and model.cancelled_at is None:
            model.cancelled_at = self.clock.now

    # --- what comes back ---------------------------------------------------------

    @precondition(lambda self: self.runs)
    @step("sign_of_life")
    def sign_of_life(self, which: int, kind: str, who: str | None, newer: bool, late: float) -> None:
        run_id = self.pick(which)
        fields = {}
        if late:  # read by a loop that was busy when it came
            fields["received_at"] = self.clock.now - late
            self.met["event read late"] += 1
        self.send(run_id, kind, who, self.runs[run_id].attempt + newer, **fields)

    @precondition(lambda self: self.runs)
    @step("end")
    def end(self, which: int, kind: str, who: str | None) -> None:
        run_id = self.pick(which)
        if kind in frames.TERMINAL:
            self.send(run_id, kind, who, self.runs[run_id].attempt)
        else:
            expected = "error" if self.runs[run_id].open else "nothing"
            self.follow(run_id, self.table.fail(run_id, ValueError("x")), expected)

    @precondition(lambda self: self.runs)
    @step("the_backend_says_that_the_worker_is_lost")
    def the_backend_says_that_the_worker_is_lost(self, which: int, lost_run: bool) -> None:
        run_id = self.pick(which, lambda model: model.open and model.lost is lost_run)
        self.send(run_id, frames.TASK_ERROR, None, self.runs[run_id].attempt, error=lost("signal 9"))

    @precondition(lambda self: self.runs)
    @step("word_of_an_earlier_attempt")
    def word_of_an_earlier_attempt(self, which: int, kind: str, who: str | None) -> None:
        run_id = self.pick(which, lambda model: model.open and model.attempt > 1)
        attempt = max(1, self.runs[run_id].attempt - 1)
        if kind == "submission":
            if attempt < self.runs[run_id].attempt:
                self.met["submission of an earlier attempt"] += 1
                self.table.submitted(run_id, attempt)
        elif kind == "loss":
            self.send(run_id, frames.TASK_ERROR, who, attempt, error=lost("signal 9"))
        else:
            self.send(run_id, kind, who, attempt)

    @precondition(lambda self: self.sent)
    @step("duplicate")
    def duplicate(self, back: int, of_open_run: bool) -> None:
        # The latest ones: most of what was said earlier is of runs that have ended.
        recent = [frame for frame in self.sent[-40:] if self.runs[frame["run_id"]].open is of_open_run]
        sent = recent or self.sent
        self.deliver(sent[-1 - back % len(sent)])

    @precondition(lambda self: self.runs)
    @step("malformed_event")
    def malformed_event(self, which: int, flaw: tuple[str, dict[str, Any]]) -> None:
        kind, changes = flaw
        changed = {**event(kind, self.pick(which)), **changes}
        frame = {key: value for key, value in changed.items() if value is not ...}
        before = self.table.dropped["malformed"]
        for junk in (frame, None, [frame], {}):
            assert self.table.apply(junk) == (False, None, None)
        assert self.table.dropped["malformed"] == before + 4
        assert self.table.apply(event("task_result", "f" * 32)) == (False, None, None)
        assert self.table.apply(event("of_a_newer_peer", self.pick(which))) == (False, None, None)

    # --- clocks -------------------------------------------------------------------

    @step("let_time_pass")
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.expire()

    @step("let_time_pass_while_the_loop_is_busy")
    def let_time_pass_while_the_loop_is_busy(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def expire(self) -> None:
        """End, or submit again, what is due: that, all of that, and nothing else."""
        for step in self.table.expire():
            run_id = step.run.run_id
            model, state = self.runs[run_id], self.state(run_id)
            overdue = {reason for reason, due in model.dues().items() if due <= self.clock.now}
            assert overdue, "a run was given up before its time"
            if isinstance(step, Resubmission):
                assert "silence" in overdue
                self.met[f"silence while {state}: again"] += 1
                assert model.lose() == "again", "a run is submitted more often than it may"
                continue
            assert step.kind in ("timeout", "error")
            assert step.kind == "timeout" or ("silence" in overdue and not model.may_be_sent_again)
            assert step.kind == "error" or overdue - {"silence"}
            for reason in overdue:
                self.met[f"{reason} while {state}: {step.kind}"] += 1
            self.follow(run_id, step, step.kind)
        late = [run_id for run_id, model in self.runs.items() if model.open and model.due() <= self.clock.now]
        assert not late, "runs outlived their deadlines"

    @invariant()
    def always(self) -> None:
        """Check what holds after every step."""
        models = self.runs.values()
        assert max((len(model.outcomes) for model in models), default=0) <= 1, "two outcomes"
        assert all(model.submissions <= model.policy.retries + 1 for model in models), "too many attempts"
        # Exactly the runs without an outcome are open, and where they should be.
        should = {run_id: (model.state, model.attempt) for run_id, model in self.runs.items() if model.open}
        assert {run.run_id: (run.state, run.attempt) for run in self.table.open_runs()} == should
        assert len(self.table) == len(should)
        # Somebody is woken for the next deadline.
        due = min((model.due() for model in models if model.open), default=float("inf"))
        wake = self.table.next_deadline()
        assert due == float("inf") or (wake is not None and wake <= due)
        # Nothing piles up.
        assert len(self.table._deadlines) <= 64 + 4 * len(self.table) + 1
        for run in self.table.open_runs():
            assert len(run.history) <= MAX_HISTORY
            assert len(run.seqs) <= 2

    def teardown(self) -> None:
        """Let all time pass: what has a deadline ends; the rest ends when the environment stops."""
        self.clock.advance(1000)
        self.expire()
        assert all(not model.open or model.due() == float("inf") for model in self.runs.values())
        for run in self.table.open_runs():
            self.follow(run.run_id, self.table.fail(run.run_id, ValueError("stopped")), "error")
        assert len(self.table) == 0
        assert self.table.next_deadline() is None
        assert len(self.table._deadlines) == 0
        assert set(self.table._closed) == set(self.runs)
        assert Counter(len(model.outcomes) for model in self.runs.values()) in ({}, {1: len(self.runs)})


def test_any_interleaving_leads_to_one_outcome_per_run() -> None:
    met: Counter[str] = Counter()
    run_state_machine_as_test(
        lambda: DeliveryMachine(met),
        settings=settings(
            max_examples=200,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        ),
    )
    for crossing in OFTEN_MET:
        assert fnmatch.filter(met, crossing), f"never met: {crossing}"


def test_long_walks_meet_every_crossing() -> None:
    """The same machine without the drawing and shrinking, so much faster; what it never meets is not tested."""
    met: Counter[str] = Counter()
    for seed in range(150):
        chance = random.Random(seed)
        machine = DeliveryMachine(met)
        for name in ["open", "sign_of_life", *chance.choices([*STEPS, *DEEPER], k=300)]:
            getattr(machine, name)(**{key: chance.choice(values) for key, values in STEPS[name].items()})
            machine.always()
        machine.teardown()
    assert not CROSSINGS - set(met)
