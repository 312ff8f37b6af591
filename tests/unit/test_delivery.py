"""The promises about a run, and the table that keeps them; its clock stands still unless told."""

from __future__ import annotations

import secrets
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wove import frames
from wove.delivery import TOMBSTONES, Outcome, RunState, RunTable
from wove.errors import ConfigurationError, DeliveryTimeoutError, EnvironmentExecutionError, WorkerLostError
from wove.policy import SETTINGS, DeliveryPolicy, nearest

RUN = "a" * 32
WORKER = {"host": "w1", "pid": 7, "backend": "celery", "job": "j1"}


class Clock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def event(kind: str, run_id: str = RUN, attempt: int = 1, seq: int = 1, **fields: Any) -> frames.Frame:
    """Build an event with whatever its type demands."""
    needed: dict[str, Any] = {}
    if kind == frames.TASK_RESULT:
        needed = {"result": 42}
    elif kind == frames.TASK_ERROR:
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


def opened(table: RunTable, run_id: str = RUN, **policy: Any) -> None:
    """Open and submit a run."""
    table.open(run_id, "app.task", DeliveryPolicy(**policy))
    table.submitted(run_id)


def outcome_of(table: RunTable, frame: Any) -> Outcome | None:
    """Apply an event and return the outcome, if it was one."""
    return table.apply(frame).outcome


class TestPolicy:
    """Settings: the nearest layer wins, and a mistake is an error."""

    def test_the_documented_settings_and_defaults(self) -> None:
        assert {name: getattr(DeliveryPolicy(), name.removeprefix("delivery_")) for name in SETTINGS} == {
            "delivery_timeout": None,
            "delivery_start_timeout": None,
            "delivery_heartbeat_seconds": None,
            "delivery_cancel_mode": "best_effort",
            "delivery_cancel_timeout": 10.0,
            "delivery_idempotency_key": None,
            "delivery_max_in_flight": None,
            "delivery_orphan_policy": "cancel",
            "delivery_retries": 0,
        }

    def test_the_first_layer_wins_and_the_defaults_come_last(self) -> None:
        policy = DeliveryPolicy.resolve(
            {"delivery_timeout": 1},
            None,
            {"delivery_timeout": 2, "delivery_start_timeout": 2},
            {"delivery_timeout": 3, "delivery_start_timeout": 3, "delivery_cancel_timeout": 3},
            heartbeat_seconds=15.0,
        )
        assert (policy.timeout, policy.start_timeout, policy.cancel_timeout) == (1, 2, 3)
        assert policy.heartbeat_seconds == 15.0

    def test_none_in_a_near_layer_takes_a_far_setting_back(self) -> None:
        far = {"delivery_timeout": 3}
        assert DeliveryPolicy.resolve({"delivery_timeout": None}, far).timeout is None
        no_beats = {"delivery_heartbeat_seconds": None}
        assert DeliveryPolicy.resolve(no_beats, heartbeat_seconds=15.0).heartbeat_seconds is None

    def test_keys_of_others_are_left_to_them(self) -> None:
        assert DeliveryPolicy.resolve({"executor": "local", "timeout": -1}) == DeliveryPolicy()

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("delivery_timeot", "delivery_timeout"),
            ("delivery_heartbeat", "delivery_heartbeat_seconds"),
            ("delivery_retry", "delivery_retries"),
        ],
    )
    def test_a_misspelt_setting_is_named_together_with_the_nearest(self, key: str, meant: str) -> None:
        with pytest.raises(
            ConfigurationError, match=f"unknown delivery setting '{key}'; did you mean '{meant}'"
        ):
            DeliveryPolicy.resolve({key: 1})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("timeout", 0.001),
            ("timeout", 60),
            ("start_timeout", None),
            ("heartbeat_seconds", 15),
            ("cancel_mode", "require_ack"),
            ("cancel_timeout", 0.5),
            ("max_in_flight", 1),
            ("max_in_flight", None),
            ("orphan_policy", "fail"),
            ("orphan_policy", "detach"),
            ("retries", 0),
            ("idempotency_key", None),
        ],
    )
    def test_accepted_values(self, key: str, value: Any) -> None:
        assert getattr(DeliveryPolicy.resolve({f"delivery_{key}": value}), key) == value

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("timeout", 0),
            ("timeout", -1),
            ("timeout", "60"),
            ("timeout", True),
            ("timeout", float("nan")),
            ("timeout", float("inf")),
            ("start_timeout", []),
            ("heartbeat_seconds", 0.0),
            ("cancel_mode", "best-effort"),
            ("cancel_mode", None),
            ("cancel_mode", ["require_ack"]),
            ("cancel_timeout", None),
            ("cancel_timeout", 0),
            ("max_in_flight", 0),
            ("max_in_flight", 1.5),
            ("max_in_flight", True),
            ("orphan_policy", "keep"),
            ("orphan_policy", None),
            ("retries", -1),
            ("retries", False),
        ],
    )
    def test_an_unusable_value_is_refused_together_with_its_key(self, key: str, value: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            DeliveryPolicy.resolve({f"delivery_{key}": value})
        assert str(caught.value).startswith(f"delivery_{key} is ")
        assert str(caught.value).endswith(f"got {value!r}")

    @pytest.mark.parametrize(
        ("key", "value"), [("retries", 3), ("idempotency_key", "{order}"), ("orphan_policy", "requeue")]
    )
    def test_what_this_version_does_not_carry_is_refused_and_not_ignored(self, key: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="this version of Wove"):
            DeliveryPolicy.resolve({f"delivery_{key}": value})

    def test_a_far_layer_is_checked_although_a_near_one_wins(self) -> None:
        with pytest.raises(ConfigurationError, match="delivery_timeout"):
            DeliveryPolicy.resolve({"delivery_timeout": 1}, {"delivery_timeout": "x"})

    def test_the_nearest_name_or_all_of_them(self) -> None:
        assert nearest("reprots", ["mail", "reports"]) == "; did you mean 'reports'?"
        assert nearest("xyz", ["reports", "mail"]) == "; known: mail, reports"
        assert nearest("xyz", []) == ""


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
        opened(table)
        table.apply(event("task_started", attempt=2, worker=WORKER))
        outcome = outcome_of(table, event("task_error", attempt=2))
        assert outcome is not None
        assert outcome.kind == "error"
        assert isinstance(outcome.exception, EnvironmentExecutionError)
        (note,) = outcome.exception.__notes__
        assert note == (
            f"in run {RUN} of app.task, environment 'reports', on worker w1 pid 7, celery job j1, attempt 2"
        )

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
            assert table.apply(frame) == (False, None)
        table.fail(RUN, ValueError())
        assert table.apply(event("log")) == (False, None)


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
        (outcome,) = table.expire()
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
        (outcome,) = table.expire()
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
        assert [outcome.kind for outcome in table.expire()] == ["timeout"]

    def test_a_run_that_does_not_start_in_time_although_it_was_accepted(
        self, table: RunTable, clock: Clock
    ) -> None:
        opened(table, start_timeout=5)
        clock.now += 5
        (outcome,) = table.expire()
        assert isinstance(outcome.exception, DeliveryTimeoutError)
        assert "delivery_start_timeout=5 s: accepted by the backend, never started" in str(outcome.exception)
        assert outcome.cancel_work

    def test_a_run_that_the_backend_does_not_accept_in_time(self, table: RunTable, clock: Clock) -> None:
        table.open(RUN, "app.task", DeliveryPolicy(start_timeout=5))
        clock.now += 5
        (outcome,) = table.expire()
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
        (outcome,) = table.expire()
        assert (outcome.kind, outcome.cancel_work) == ("error", True)
        assert isinstance(outcome.exception, WorkerLostError)
        assert "no sign of life from its worker for 2.4 s (delivery_heartbeat_seconds=2)" in str(
            outcome.exception
        )
        assert outcome.exception.payload["retryable"] is True
        assert "on worker w1 pid 7" in outcome.exception.__notes__[0]

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
        (outcome,) = table.expire()
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


@dataclass
class Model:
    """What the machine below knows of a run, by rules of its own."""

    policy: DeliveryPolicy
    opened_at: float
    started: bool = False
    last_seen: float | None = None
    cancelled_at: float | None = None
    attempt: int = 1
    outcomes: list[str] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return not self.outcomes

    def due(self) -> float:
        """Return the moment at which the run must have ended."""
        policy, dues = self.policy, [float("inf")]
        if policy.timeout is not None:
            dues.append(self.opened_at + policy.timeout)
        if policy.start_timeout is not None and not self.started:
            dues.append(self.opened_at + policy.start_timeout)
        if policy.heartbeat_seconds is not None and self.last_seen is not None:
            dues.append(self.last_seen + policy.heartbeat_seconds)
        if self.cancelled_at is not None:
            dues.append(self.cancelled_at + policy.cancel_timeout)
        return min(dues)


DEADLINES = st.sampled_from([1, 2, 5, 10])
POLICIES = st.builds(
    DeliveryPolicy,
    timeout=st.none() | DEADLINES,
    start_timeout=st.none() | DEADLINES,
    heartbeat_seconds=st.none() | DEADLINES,
    cancel_mode=st.sampled_from(["best_effort", "require_ack"]),
    cancel_timeout=DEADLINES,
)
#: What passes at once: less than most deadlines, so that runs live to see something.
MOMENTS = st.sampled_from([0.25, 0.5, 1, 3])
#: Which run a step is about: the open ones come first, then the ended ones.
WHICH = st.integers(0, 4)
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
    ("progress", {"fraction": 2}),
    ("log", {"message": 5}),
]


class DeliveryMachine(RuleBasedStateMachine):
    """Any interleaving of calls: at most one outcome per run, and one once its deadlines have passed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = RunTable("reports", self.clock)
        self.runs: dict[str, Model] = {}
        self.sent: list[frames.Frame] = []

    def pick(self, which: int) -> str:
        """Return the id of a run."""
        return sorted(self.runs, key=lambda run_id: (not self.runs[run_id].open, run_id))[
            which % len(self.runs)
        ]

    def took(self, outcome: Outcome | None) -> None:
        """Note an outcome."""
        if outcome is not None:
            assert outcome.kind in ("result", "error", "cancelled", "timeout")
            self.runs[outcome.run.run_id].outcomes.append(outcome.kind)

    def apply(self, run_id: str, kind: str) -> Outcome | None:
        """Apply an event of the newest attempt."""
        frame = event(kind, run_id, self.runs[run_id].attempt, len(self.sent) + 1)
        self.sent.append(frame)
        return outcome_of(self.table, frame)

    def learn(self, run_id: str) -> None:
        """Ask the table whether it took an old event for a sign of life: it may, it need not."""
        for run in self.table.open_runs():
            if run.run_id == run_id:
                self.runs[run_id].started = run.started_at is not None
                self.runs[run_id].last_seen = run.last_seen

    @precondition(lambda self: len(self.table) < 4)
    @rule(policy=POLICIES, submitted=st.booleans())
    def open(self, policy: DeliveryPolicy, submitted: bool) -> None:
        run_id = f"{len(self.runs):032x}"
        self.runs[run_id] = Model(policy, self.clock.now)
        assert self.table.open(run_id, "app.task", policy).run_id == run_id
        if submitted:
            self.table.submitted(run_id)

    @precondition(lambda self: self.runs)
    @rule(
        which=WHICH,
        kind=st.sampled_from(sorted(frames.EVENTS - frames.TERMINAL)),
        newer=st.booleans(),
    )
    def sign_of_life(self, which: int, kind: str, newer: bool) -> None:
        run_id = self.pick(which)
        model = self.runs[run_id]
        model.attempt += newer
        assert self.apply(run_id, kind) is None
        if model.open:
            model.started, model.last_seen = True, self.clock.now

    @precondition(lambda self: self.runs)
    @rule(which=WHICH, kind=st.sampled_from([*sorted(frames.TERMINAL), "failure on this side"]))
    def end(self, which: int, kind: str) -> None:
        run_id = self.pick(which)
        was_open = self.runs[run_id].open
        if kind in frames.TERMINAL:
            outcome = self.apply(run_id, kind)
        else:
            outcome = self.table.fail(run_id, ValueError("x"))
        assert (outcome is not None) == was_open
        if outcome is not None:
            assert outcome.run.run_id == run_id
            assert kind not in frames.TERMINAL or kind == f"task_{outcome.kind}"
        self.took(outcome)

    @precondition(lambda self: self.runs)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        model = self.runs[run_id := self.pick(which)]
        outcome = self.table.cancel(run_id)
        best_effort = model.policy.cancel_mode == "best_effort"
        assert (outcome is not None) == (model.open and best_effort)
        if model.open and not best_effort and model.cancelled_at is None:
            model.cancelled_at = self.clock.now
        self.took(outcome)

    @precondition(lambda self: self.runs)
    @rule(which=WHICH, kind=st.sampled_from(sorted(frames.TERMINAL)))
    def outcome_of_a_stale_attempt(self, which: int, kind: str) -> None:
        model = self.runs[run_id := self.pick(which)]
        if model.attempt == 1:
            model.attempt = 2
            self.apply(run_id, frames.TASK_STARTED)
        was_open = model.open
        outcome = outcome_of(self.table, event(kind, run_id, model.attempt - 1))
        assert (outcome is not None) == (was_open and kind == frames.TASK_RESULT)
        self.took(outcome)
        self.learn(run_id)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        frame = data.draw(st.sampled_from(self.sent))
        was_open = self.runs[frame["run_id"]].open
        outcome = outcome_of(self.table, dict(frame))
        assert outcome is None or was_open
        self.took(outcome)
        self.learn(frame["run_id"])

    @precondition(lambda self: self.runs)
    @rule(which=WHICH, flaw=st.sampled_from(FLAWS))
    def malformed_event(self, which: int, flaw: tuple[str, dict[str, Any]]) -> None:
        kind, changes = flaw
        changed = {**event(kind, self.pick(which)), **changes}
        frame = {key: value for key, value in changed.items() if value is not ...}
        for junk in (frame, None, [frame], {}):
            before = self.table.dropped["malformed"]
            assert outcome_of(self.table, junk) is None
            assert self.table.dropped["malformed"] == before + 1

    @precondition(lambda self: self.runs)
    @rule(which=WHICH)
    def event_that_concerns_nobody(self, which: int) -> None:
        assert outcome_of(self.table, event("task_result", "f" * 32)) is None
        assert self.apply(self.pick(which), "of_a_newer_peer") is None

    @rule(seconds=MOMENTS)
    def let_time_pass(self, seconds: float) -> None:
        self.clock.now += seconds
        self.expire()

    @rule(seconds=MOMENTS)
    def let_time_pass_while_the_loop_is_busy(self, seconds: float) -> None:
        self.clock.now += seconds

    def expire(self) -> None:
        """End what is due: that, all of that, and nothing else."""
        for outcome in self.table.expire():
            model = self.runs[outcome.run.run_id]
            assert model.due() <= self.clock.now, "a run ended before its time"
            self.took(outcome)
        late = [run_id for run_id, model in self.runs.items() if model.open and model.due() <= self.clock.now]
        assert not late, "runs outlived their deadlines"

    @invariant()
    def no_run_has_two_outcomes(self) -> None:
        assert max((len(model.outcomes) for model in self.runs.values()), default=0) <= 1

    @invariant()
    def exactly_the_runs_without_an_outcome_are_open(self) -> None:
        still_open = {run_id for run_id, model in self.runs.items() if model.open}
        assert {run.run_id for run in self.table.open_runs()} == still_open
        assert len(self.table) == len(still_open)

    @invariant()
    def somebody_is_woken_for_the_next_deadline(self) -> None:
        due = min((model.due() for model in self.runs.values() if model.open), default=float("inf"))
        wake = self.table.next_deadline()
        assert due == float("inf") or (wake is not None and wake <= due)

    def teardown(self) -> None:
        """Let all time pass: what has a deadline ends; the rest ends when the environment stops."""
        self.clock.now += 1000
        self.expire()
        assert all(not model.open or model.due() == float("inf") for model in self.runs.values())
        for run in self.table.open_runs():
            self.took(self.table.fail(run.run_id, ValueError("stopped")))
        assert len(self.table) == 0
        assert self.table.next_deadline() is None
        assert Counter(len(model.outcomes) for model in self.runs.values()) in ({}, {1: len(self.runs)})


TestAnyInterleaving = DeliveryMachine.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
)
