"""What the callback server knows of runs: who executes them, over which connections, since when in vain."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.clock import Clock

from wove import frames
from wove.callback_server import contacts as contacts_module
from wove.callback_server import run_table
from wove.callback_server import runs as runs_module
from wove.callback_server.contacts import Contacts
from wove.callback_server.run_table import MAX_CANCELLED, MAX_ENDED, OpenRuns
from wove.callback_server.runs import MAX_EXECUTIONS, OpenRun
from wove.security import SecretRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from wove.callback_server.runs import Execution

RUN = "a" * 32


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the callback server."""
    made = Clock()
    for module in (contacts_module, run_table, runs_module):
        monkeypatch.setattr(module, "time", made.as_time())
    return made


class Environment:
    """Makes runs, and hears of them."""

    def __init__(self) -> None:
        self.told: list[frames.Frame] = []
        self.suspects: list[OpenRun] = []
        self._ring = SecretRing.parse(secrets.token_hex(32), "the test")

    def sink(self, batch: Iterable[frames.Frame]) -> bool:
        self.told.extend(batch)
        return True

    def run(self, run_id: str = RUN, **fields: Any) -> OpenRun:
        """Return a run whose events come here."""
        known: dict[str, Any] = {
            "task_id": "app.task",
            "environment": "reports",
            "ring": self._ring,
            "nonce": b"n" * 16,
            "sink": self.sink,
            "max_body": 1000,
            "on_suspect": self.suspects.append,
        }
        return OpenRun(run_id=run_id, **{**known, **fields})


@pytest.fixture
def environment() -> Environment:
    """The environment of the runs."""
    return Environment()


@pytest.fixture
def run(environment: Environment) -> OpenRun:
    """A run."""
    return environment.run()


@pytest.fixture
def contacts() -> Contacts:
    """The connections of a listener."""
    return Contacts()


def executed(run: OpenRun, name: str = "e1", attempt: int = 1) -> Execution:
    """Return an execution of a run."""
    execution = run.execution(name, attempt)
    assert execution is not None
    return execution


class Connection:
    """Stands for one."""


class TestSuspicion:
    """A process that dies loses all its connections; only that makes its runs suspect."""

    def test_a_run_is_suspect_from_when_its_only_connection_is_lost(
        self, environment: Environment, run: OpenRun, contacts: Contacts, clock: Clock
    ) -> None:
        connection = Connection()
        contacts.heard(connection, run, executed(run))
        assert (run.started, run.suspect_since) == (True, None)
        clock.advance(5)
        contacts.lost(connection)
        assert run.suspect_since == 1005
        assert run.last_contact == 1000
        assert environment.suspects == [run]
        assert len(contacts) == 0

    def test_not_while_its_process_has_another_connection(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        beat, report = Connection(), Connection()
        execution = executed(run)
        contacts.heard(beat, run, execution)
        contacts.heard(report, run, execution)
        contacts.lost(report)
        assert (run.suspect_since, environment.suspects) == (None, [])
        contacts.lost(beat)
        assert environment.suspects == [run]

    def test_a_worker_that_comes_back_is_none(
        self, environment: Environment, run: OpenRun, contacts: Contacts, clock: Clock
    ) -> None:
        first, second = Connection(), Connection()
        contacts.heard(first, run, executed(run))
        contacts.lost(first)
        clock.advance(0.5)
        contacts.heard(second, run, executed(run))
        assert (run.suspect_since, run.last_contact) == (None, 1000.5)
        clock.advance(1)
        contacts.lost(second)
        assert run.suspect_since == 1001.5
        assert environment.suspects == [run, run]

    def test_one_that_comes_back_for_a_moment_has_no_connection_still(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        connection = Connection()
        contacts.heard(connection, run, executed(run))
        contacts.lost(connection)
        contacts.heard(None, run, executed(run))  # over a connection that is not its own
        assert (run.suspect_since, executed(run).connections) == (None, set())
        assert environment.suspects == [run]

    def test_the_end_of_a_connection_that_nobody_is_known_by_means_nothing(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        contacts.heard(None, run, executed(run))
        contacts.lost(Connection())
        assert (run.started, run.suspect_since, environment.suspects) == (True, None, [])
        assert len(contacts) == 0

    def test_a_run_that_never_started_is_not_suspect(self, run: OpenRun) -> None:
        assert (run.started, run.suspect_since, run.last_contact) == (False, None, 1000)

    def test_one_process_that_runs_many_tasks_makes_them_all_suspect(
        self, environment: Environment, contacts: Contacts
    ) -> None:
        connection = Connection()
        runs = [environment.run(f"{number:032x}") for number in range(20)]
        for run in runs:
            contacts.heard(connection, run, executed(run))
        contacts.lost(connection)
        assert environment.suspects == runs

    def test_a_run_is_not_suspect_while_another_execution_of_it_is_alive(
        self, environment: Environment, run: OpenRun, contacts: Contacts, clock: Clock
    ) -> None:
        dead, alive = Connection(), Connection()
        contacts.heard(dead, run, executed(run, "e1"))
        contacts.heard(alive, run, executed(run, "e2"))
        contacts.lost(dead)
        assert (run.suspect_since, environment.suspects) == (None, [])
        clock.advance(3)
        contacts.lost(alive)
        assert run.suspect_since == 1003  # since the last of them has gone
        assert environment.suspects == [run]

    def test_nor_while_one_speaks_by_no_connection_of_its_own(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        connection = Connection()
        contacts.heard(connection, run, executed(run, "e1"))
        contacts.heard(None, run, executed(run, "e2"))
        contacts.lost(connection)
        assert (run.suspect_since, environment.suspects) == (None, [])

    def test_an_execution_that_is_over_is_missed_by_nobody(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        connection = Connection()
        execution = executed(run)
        contacts.heard(connection, run, execution)
        execution.over = True
        contacts.lost(connection)
        assert (run.started, run.suspect_since, environment.suspects) == (False, None, [])

    def test_one_that_is_over_and_speaks_is_over_still(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        connection = Connection()
        execution = executed(run)
        execution.over = True
        contacts.heard(connection, run, execution)
        assert (run.started, execution.connections, len(contacts)) == (False, set(), 0)
        contacts.lost(connection)
        assert environment.suspects == []

    def test_of_an_execution_that_is_over_and_one_that_is_not_the_latter_counts(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        first, second = Connection(), Connection()
        contacts.heard(first, run, executed(run, "e1"))
        executed(run, "e1").over = True  # the backend has retried it
        contacts.heard(second, run, executed(run, "e2"))
        contacts.lost(second)
        assert environment.suspects == [run]

    def test_a_run_that_has_ended_is_missed_by_nobody(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        runs, connection = OpenRuns(), Connection()
        runs.add(run)
        contacts.heard(connection, run, executed(run))
        runs.close(run.run_id)
        contacts.lost(connection)
        assert environment.suspects == []

    def test_a_run_for_which_nobody_watches_is_suspect_all_the_same(
        self, environment: Environment, contacts: Contacts
    ) -> None:
        run, connection = environment.run(on_suspect=None), Connection()
        contacts.heard(connection, run, executed(run))
        contacts.lost(connection)
        assert run.suspect_since == 1000

    def test_a_connection_that_outlives_many_short_tasks_does_not_remember_them(
        self, environment: Environment, contacts: Contacts
    ) -> None:
        runs, connection = OpenRuns(), Connection()
        for number in range(500):
            run = environment.run(f"{number:032x}")
            runs.add(run)
            contacts.heard(connection, run, executed(run))
            runs.close(run.run_id)
        assert len(contacts) == 1
        assert len(contacts._by_connection[connection]) < 20

    def test_one_that_serves_many_tasks_at_once_remembers_them_all(
        self, environment: Environment, contacts: Contacts
    ) -> None:
        connection = Connection()
        runs = [environment.run(f"{number:032x}") for number in range(100)]
        for _ in range(2):
            for run in runs:
                contacts.heard(connection, run, executed(run))
        contacts.lost(connection)
        assert environment.suspects == runs


class TestAttempts:
    """Another attempt begins anew; what earlier executions do counts no more."""

    def test_a_renewed_run_has_not_started(
        self, environment: Environment, run: OpenRun, contacts: Contacts, clock: Clock
    ) -> None:
        connection = Connection()
        contacts.heard(connection, run, executed(run))
        run.worker = {"host": "w1", "pid": 7}
        clock.advance(10)
        run.renew(2, [b"message"])
        assert (run.attempt, run.message, run.worker, run.opened_at) == (2, [b"message"], {}, 1010)
        assert (run.started, run.suspect_since, run.last_contact) == (False, None, 1010)
        assert run.job == f"{RUN}-2"
        contacts.lost(connection)
        assert environment.suspects == []

    def test_an_earlier_execution_that_speaks_does_not_start_it(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        contacts.heard(Connection(), run, executed(run))
        run.renew(2, None)
        connection = Connection()
        contacts.heard(connection, run, executed(run, "e1", 1))
        contacts.heard(connection, run, executed(run, "late", 1))  # a redelivery of the earlier attempt
        contacts.lost(connection)
        assert (run.started, run.suspect_since, environment.suspects) == (False, None, [])

    def test_the_new_attempt_is_watched_like_the_first(
        self, environment: Environment, run: OpenRun, contacts: Contacts, clock: Clock
    ) -> None:
        contacts.heard(Connection(), run, executed(run))
        run.renew(2, None)
        connection = Connection()
        clock.advance(3)
        contacts.heard(connection, run, executed(run, "e2", 2))
        assert (run.started, run.last_contact) == (True, 1003)
        contacts.lost(connection)
        assert environment.suspects == [run]

    def test_an_event_of_this_side_is_of_the_current_attempt_and_overtakes_all(self, run: OpenRun) -> None:
        run.renew(3, None)
        frame = run.event(frames.HEARTBEAT)
        assert frames.check_event(frame)
        assert (frame["run_id"], frame["task_id"], frame["attempt"]) == (RUN, "app.task", 3)
        assert "execution" not in frame  # so that it is no duplicate of what a worker says

    def test_a_forsaken_run_waits_for_its_next_execution(
        self, environment: Environment, run: OpenRun, contacts: Contacts
    ) -> None:
        first, second = Connection(), Connection()
        contacts.heard(first, run, executed(run, "e1"))
        contacts.lost(first)
        run.forsake()
        assert (run.started, run.suspect_since) == (False, None)
        contacts.heard(second, run, executed(run, "e2"))
        assert run.started
        contacts.lost(second)
        assert environment.suspects == [run, run]

    def test_an_execution_keeps_its_name(self, run: OpenRun) -> None:
        assert run.execution("e1", 1) is run.execution("e1", 1)
        assert run.execution("e1", 1) is not run.execution("e2", 1)

    def test_a_run_has_not_more_executions_than_anybody_can_have_started(self, run: OpenRun) -> None:
        for number in range(10 * MAX_EXECUTIONS):
            run.execution(f"e{number}", 1)
        assert len(run.executions) == MAX_EXECUTIONS


class TestOpenRuns:
    """The table of a listener."""

    @pytest.fixture
    def runs(self) -> OpenRuns:
        """An empty table."""
        return OpenRuns()

    def test_a_closed_run_lets_everything_go(
        self, environment: Environment, run: OpenRun, runs: OpenRuns
    ) -> None:
        run.message = [b"x"]
        execution = executed(run)
        runs.add(run)
        assert runs.close(RUN) is run
        assert (run.closed, run.message, run.executions, execution.over) == (True, None, {}, True)
        assert (len(runs), runs.get(RUN)) == (0, None)
        assert runs.close(RUN) is None
        assert environment.told == []

    @pytest.mark.parametrize("ended", [True, False])
    def test_a_run_that_is_over_is_told_from_one_that_nobody_waits_for(
        self, run: OpenRun, runs: OpenRuns, ended: bool
    ) -> None:
        runs.add(run)
        assert not runs.has_ended(RUN)
        runs.close(RUN, ended=ended)
        assert runs.has_ended(RUN) is ended

    def test_the_ends_of_runs_are_remembered_for_a_while_and_not_for_ever(
        self, environment: Environment, runs: OpenRuns
    ) -> None:
        ids = [f"{number:032x}" for number in range(MAX_ENDED + 5)]
        for run_id in ids:
            runs.add(environment.run(run_id))
            runs.close(run_id)
        assert [runs.has_ended(run_id) for run_id in ids] == [False] * 5 + [True] * MAX_ENDED

    def test_a_cancelled_run_stays_open_for_its_worker_to_hear_of_it(
        self, run: OpenRun, runs: OpenRuns, clock: Clock
    ) -> None:
        run.message = [b"x"]
        runs.add(run)
        clock.advance(3)
        runs.cancel(RUN)
        assert (run.cancelled, run.cancelled_at, run.message, run.closed) == (True, 1003, None, False)
        clock.advance(3)
        runs.cancel(RUN)
        assert run.cancelled_at == 1003
        runs.cancel("b" * 32)
        assert len(runs) == 1

    def test_cancelled_runs_that_nobody_acknowledges_do_not_pile_up(
        self, environment: Environment, runs: OpenRuns
    ) -> None:
        opened = [environment.run(f"{number:032x}") for number in range(MAX_CANCELLED + 3)]
        for run in opened:
            runs.add(run)
            runs.cancel(run.run_id)
        assert [run.closed for run in opened] == [True] * 3 + [False] * MAX_CANCELLED

    @pytest.mark.parametrize("end", ["cancel", "close"])
    def test_a_beat_that_is_held_is_woken(self, run: OpenRun, runs: OpenRuns, end: str) -> None:
        class Beat:
            woken = 0

            def set(self) -> None:
                self.woken += 1

        beats = [Beat(), Beat()]
        run.watchers = dict.fromkeys(beats)
        runs.add(run)
        getattr(runs, end)(RUN)
        assert [beat.woken for beat in beats] == [1, 1]

    def test_silence_while_nobody_could_be_heard_is_forgiven(
        self, environment: Environment, runs: OpenRuns, contacts: Contacts, clock: Clock
    ) -> None:
        names = ("started", "queued", "cancelled", "over")
        started, queued, cancelled, over = (
            environment.run(secrets.token_hex(16), task_id=name) for name in names
        )
        for run in (started, queued, cancelled, over):
            runs.add(run)
        for run in (started, cancelled, over):
            contacts.heard(Connection(), run, executed(run))
        runs.cancel(cancelled.run_id)
        executed(over).over = True
        clock.advance(60)
        runs.forgive()
        assert [(frame["type"], frame["task_id"]) for frame in environment.told] == [("heartbeat", "started")]
        assert started.last_contact == 1060
        assert queued.last_contact == 1000

    def test_a_listener_that_fails_ends_all_its_runs(self, environment: Environment, runs: OpenRuns) -> None:
        opened = [environment.run(f"{number:032x}") for number in range(3)]
        for run in opened:
            runs.add(run)
        runs.fail_all(OSError("too many open files"))
        assert [frame["type"] for frame in environment.told] == [frames.TASK_ERROR] * 3
        error = environment.told[0]["error"]
        assert error["message"] == "the callback listener failed: OSError: too many open files"
        assert error["source"] == "executor"  # no worker was lost: there is nothing to be tried again
        assert (len(runs), all(run.closed for run in opened)) == (0, True)

    def test_the_runs_of_one_sink(self, environment: Environment, runs: OpenRuns) -> None:
        other: Callable[[Iterable[frames.Frame]], bool] = Environment().sink
        ours, theirs = environment.run("a" * 32), environment.run("b" * 32, sink=other)
        runs.add(ours)
        runs.add(theirs)
        assert runs.of(environment.sink) == [ours]
        assert runs.of(other) == [theirs]
