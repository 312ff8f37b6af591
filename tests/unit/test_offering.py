"""How long a worker offers an outcome, and when it stops; its clock passes by its own sleeps."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.clock import Clock

from wove.worker import offering
from wove.worker.connection import Reply
from wove.worker.offering import (
    DELAY_SHARE,
    FIRST_DELAY,
    KEPT_RETRY,
    LEAST_DELAY,
    LEAST_RETRY,
    LEFT_SHARE,
    LONGEST_DELAY,
    REFUSED_DELAY,
    offer,
    patience,
    retry_after,
    retry_seconds,
)

if TYPE_CHECKING:
    from wove.worker.assignment import Assignment

ORIGIN = "http://submitter:1"


class SoftTimeLimitExceeded(Exception):
    """Named as Celery's, which strikes wherever the main thread is."""


class PausingClock(Clock):
    """A clock that remembers for how long somebody slept."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def advance(self, seconds: float) -> None:
        self.pauses.append(seconds)
        super().advance(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> PausingClock:
    """The worker's clock; chance always picks the longest pause."""
    made = PausingClock()
    monkeypatch.setattr(offering, "time", made.as_time())
    monkeypatch.setattr(offering, "random", SimpleNamespace(uniform=lambda _, longest: longest))
    return made


@pytest.fixture(autouse=True)
def _no_outages_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offering, "down_since", {})


def task(**changes: Any) -> Assignment:
    """Return what an offer needs to know of a run."""
    known = {"run_id": "a" * 32, "origin": ORIGIN, "timeout": None, "keep": False, **changes}
    return SimpleNamespace(**known)


class Server:
    """A callback server that answers what the test says: the last answer again and again."""

    def __init__(self, *answers: int | Reply | BaseException) -> None:
        self._answers = list(answers)
        self.asked = 0

    def __call__(self) -> Reply:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, Reply) else Reply(answer, {}, b"")


def busy(retry: str) -> Reply:
    """Return the answer of a server that has too much to do."""
    return Reply(503, {"retry-after": retry}, b"")


class TestOffers:
    """An outcome is offered until the callback server has decided."""

    @pytest.mark.parametrize("status", [200, 204, 410, 413])
    def test_a_decision_is_final(self, clock: PausingClock, status: int) -> None:
        server = Server(status)
        reply = offer(server, task(), 300)
        assert reply is not None
        assert (reply.status, server.asked, clock.pauses) == (status, 1, [])

    def test_a_time_limit_of_the_backend_is_no_trouble_of_the_network(self, clock: PausingClock) -> None:
        server = Server(SoftTimeLimitExceeded(), 204)
        with pytest.raises(SoftTimeLimitExceeded):
            offer(server, task(), 300)
        assert (server.asked, clock.pauses, offering.down_since) == (1, [], {})

    @pytest.mark.parametrize("status", [204, 410, 413])
    @pytest.mark.parametrize(
        "trouble",
        [
            ConnectionRefusedError("down"),
            TimeoutError(),
            ValueError("half a reply"),
            500,
            502,
            429,
            301,
            400,
            401,
        ],
        ids=repr,
    )
    def test_trouble_is_waited_out(self, clock: PausingClock, trouble: int | Exception, status: int) -> None:
        server = Server(trouble, trouble, status)
        reply = offer(server, task(), 300)
        assert reply is not None
        assert (reply.status, server.asked) == (status, 3)
        refused = trouble in (400, 401)  # a gateway may answer so for a moment
        assert clock.pauses == [REFUSED_DELAY[1] if refused else FIRST_DELAY] * 2
        assert offering.down_since == {}

    @pytest.mark.parametrize("seconds", [0.5, 2.0, 60.0, 300.0])
    def test_the_last_offer_is_made_when_the_time_is_up(self, clock: PausingClock, seconds: float) -> None:
        server = Server(ConnectionRefusedError("nobody there"))
        assert offer(server, task(), seconds) is None
        assert server.asked == len(clock.pauses) + 1
        assert clock.now - 1000 == pytest.approx(seconds)
        assert server.asked < 70  # and not in ever shorter steps

    def test_the_pauses_grow_with_the_outage_and_shrink_with_the_time_left(self, clock: PausingClock) -> None:
        assert offer(Server(ConnectionRefusedError()), task(), 300) is None
        away = 0.0
        for pause in clock.pauses[:-1]:
            wanted = min(LONGEST_DELAY, max(FIRST_DELAY, away * DELAY_SHARE))
            assert pause == pytest.approx(min(wanted, max(LEAST_DELAY, (300 - away) * LEFT_SHARE)))
            away += pause
        assert max(clock.pauses) == LONGEST_DELAY

    @pytest.mark.parametrize("outage", [0.5, 5.0, 60.0])
    def test_an_outage_is_noticed_to_be_over_soon(self, clock: PausingClock, outage: float) -> None:
        def post() -> Reply:
            if clock.now < 1000 + outage:
                raise ConnectionRefusedError
            return Reply(204, {}, b"")

        assert offer(post, task(), 300) is not None
        assert clock.now - 1000 <= outage * (1 + DELAY_SHARE) + FIRST_DELAY

    def test_a_long_outage_does_not_fill_the_log(
        self, clock: PausingClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG, "wove.worker"):
            assert (
                offer(Server(ConnectionRefusedError("nobody there")), task(), 60, "the kept result") is None
            )
        first, *others, last = (record.levelname for record in caplog.records)
        assert (first, set(others), last) == ("WARNING", {"DEBUG"}, "ERROR")
        assert caplog.records[-1].getMessage() == (
            f"the kept result of run {'a' * 32} could not be exchanged with {ORIGIN}: "
            "ConnectionRefusedError: nobody there"
        )

    def test_a_fleet_does_not_come_back_all_at_once(
        self, clock: PausingClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[float] = []

        def uniform(shortest: float, longest: float) -> float:
            assert shortest == 0
            drawn.append(longest)
            return longest / 2

        monkeypatch.setattr(offering, "random", SimpleNamespace(uniform=uniform))
        offer(Server(OSError(), OSError(), OSError(), 204), task(), 60)
        assert clock.pauses == [longest / 2 for longest in drawn]

    def test_without_time_there_is_one_offer(self, clock: PausingClock) -> None:
        server = Server(OSError("down"))
        assert offer(server, task(), 0) is None
        assert (server.asked, clock.pauses) == (1, [])

    def test_a_server_that_is_full_says_when_to_come_back(self, clock: PausingClock) -> None:
        server = Server(busy("2"), busy("0.5"), 204)
        reply = offer(server, task(), 300)
        assert reply is not None
        assert reply.status == 204
        assert clock.pauses == [2.0, 0.5]

    def test_it_does_not_say_when_to_give_up(self, clock: PausingClock) -> None:
        server = Server(busy("1000"))
        assert offer(server, task(), 40) is None
        assert clock.now == pytest.approx(1040)

    @pytest.mark.parametrize("status", [400, 401, 404])
    def test_three_refusals_are_enough(
        self, clock: PausingClock, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = Server(status)
        assert offer(server, task(), 300) is None
        assert (server.asked, len(clock.pauses)) == (3, 2)
        assert f"the callback server answered {status}" in caplog.records[-1].getMessage()

    def test_refusals_of_different_kinds_count_together(self, clock: PausingClock) -> None:
        server = Server(401, OSError("down"), 404, 503, 400, 204)
        assert offer(server, task(), 300) is None
        assert server.asked == 5

    @pytest.mark.parametrize("ending", [SystemExit(1), KeyboardInterrupt()], ids=repr)
    def test_the_end_of_the_process_is_not_waited_out(
        self, clock: PausingClock, ending: BaseException
    ) -> None:
        with pytest.raises(type(ending)):
            offer(Server(ending), task(), 300)
        assert clock.pauses == []

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ({"retry-after": "2"}, 2.0),
            ({"retry-after": " 2.5 "}, 2.5),
            ({"retry-after": "0"}, 0.05),
            ({"retry-after": "-7"}, 0.05),
            ({"retry-after": "nan"}, 0.05),
            ({"retry-after": "inf"}, 30.0),
            ({"retry-after": "100000"}, 30.0),
            ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
            ({"retry-after": ""}, None),
            ({}, None),
        ],
        ids=str,
    )
    @pytest.mark.usefixtures("clock")
    def test_what_a_server_may_ask_for(self, header: dict[str, str], seconds: float | None) -> None:
        assert retry_after(Reply(503, header, b"")) == seconds

    def test_the_wait_it_asks_for_is_spread(self) -> None:
        asked = {retry_after(busy("2")) for _ in range(50)}
        assert len(asked) > 1
        assert all(wait is not None and 1.0 <= wait <= 2.0 for wait in asked)


class TestOutages:
    """An outage of a callback server is noted from its beginning to its end."""

    def test_it_lasts_from_the_first_failure_to_the_next_answer(self, clock: PausingClock) -> None:
        assert offer(Server(OSError("down")), task(), 10) is None
        assert offering.down_since == {ORIGIN: 1000}
        assert offer(Server(OSError("down")), task(), 10) is None
        assert offering.down_since == {ORIGIN: 1000}
        offer(Server(OSError("down"), 503, 204), task(), 10)
        assert offering.down_since == {}

    @pytest.mark.parametrize("status", [204, 410, 413, 503, 401, 500])
    def test_any_answer_ends_it(self, clock: PausingClock, status: int) -> None:
        offering.down_since[ORIGIN] = 1.0
        offer(Server(status), task(), 0)
        assert offering.down_since == {}

    def test_those_of_other_servers_are_their_own(self, clock: PausingClock) -> None:
        offering.down_since["http://other:1"] = 900.0
        offer(Server(204), task(), 10)
        assert offering.down_since == {"http://other:1": 900.0}
        assert patience(task(), 1000, cancelled=False) == 300


class Marks:
    """What others have noted of an outage."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.said: list[str] = []

    def known_for(self, origin: str) -> float:
        self.said.append(f"{origin} is away")
        return self.seconds

    def over(self, origin: str) -> None:
        self.said.append(f"{origin} is back")


class TestOutagesOfOthers:
    """Processes that live for one task wait for an outage together."""

    @pytest.mark.parametrize(
        ("known_for", "waited"), [(0.0, 300.0), (100.0, 200.0), (299.0, 2.0), (5000.0, 2.0)]
    )
    def test_what_others_have_waited_counts(
        self, clock: PausingClock, known_for: float, waited: float
    ) -> None:
        marks = Marks(known_for)
        assert offer(Server(OSError("down")), task(), 300, marks=marks) is None
        assert clock.now - 1000 == pytest.approx(waited)
        assert marks.said == [f"{ORIGIN} is away"]
        assert offering.down_since == {ORIGIN: 1000 - known_for}

    def test_nobody_waits_longer_because_of_them(self, clock: PausingClock) -> None:
        assert offer(Server(OSError("down")), task(), 0.5, marks=Marks(60.0)) is None
        assert clock.now - 1000 == pytest.approx(0.5)

    def test_the_end_is_noted_by_who_has_noted_the_beginning(self, clock: PausingClock) -> None:
        marks = Marks(10.0)
        offer(Server(OSError("down"), OSError("down"), 503, 204), task(), 300, marks=marks)
        assert marks.said == [f"{ORIGIN} is away", f"{ORIGIN} is back"]
        offer(Server(204), task(), 300, marks=marks)
        assert len(marks.said) == 2


class TestPatience:
    """How long an outcome is worth offering."""

    def test_five_minutes_where_nothing_else_is_said(self, clock: PausingClock) -> None:
        assert patience(task(), 0.0, cancelled=False) == 300

    def test_one_outage_is_waited_for_once(self, clock: PausingClock) -> None:
        offering.down_since[ORIGIN] = clock.now - 100
        assert patience(task(), clock.now, cancelled=False) == 200
        clock.now += 150
        assert patience(task(), clock.now, cancelled=False) == 50
        clock.now += 1000
        assert patience(task(), clock.now, cancelled=False) == LEAST_RETRY

    def test_later_outcomes_of_one_outage_do_not_hold_up_the_worker(self, clock: PausingClock) -> None:
        spent = []
        for _ in range(10):
            begun = clock.now
            seconds = patience(task(), begun, cancelled=False)
            assert offer(Server(ConnectionRefusedError()), task(), seconds) is None
            spent.append(clock.now - begun)
        assert spent == pytest.approx([300, *[LEAST_RETRY] * 9])

    def test_nobody_waits_beyond_the_deadline_of_the_run(self, clock: PausingClock) -> None:
        assert patience(task(timeout=60.0), clock.now - 20, cancelled=False) == 40
        assert patience(task(timeout=1000.0), clock.now - 20, cancelled=False) == 300
        assert patience(task(timeout=60.0), clock.now - 100, cancelled=False) == LEAST_RETRY

    def test_what_the_backend_keeps_anyway_is_offered_shortly(self, clock: PausingClock) -> None:
        assert patience(task(keep=True), clock.now, cancelled=False) == KEPT_RETRY

    def test_who_has_cancelled_hardly_waits(self, clock: PausingClock) -> None:
        assert patience(task(), clock.now, cancelled=True) == LEAST_RETRY

    @pytest.mark.parametrize(
        ("setting", "seconds"),
        [(None, 300), ("", 300), ("60", 60), ("0.5", 0.5), ("1e3", 1000), ("0", 0), ("-5", 0), (" 7 ", 7)],
    )
    def test_the_setting_says_how_long(
        self, clock: PausingClock, monkeypatch: pytest.MonkeyPatch, setting: str | None, seconds: float
    ) -> None:
        if setting is None:
            monkeypatch.delenv("WOVE_RESULT_RETRY_SECONDS", raising=False)
        else:
            monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", setting)
        assert retry_seconds() == seconds
        assert patience(task(), clock.now, cancelled=False) == seconds

    @pytest.mark.parametrize("setting", ["5m", "five", "1,5", "--"])
    def test_a_setting_that_is_no_number_is_named_and_not_used(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str
    ) -> None:
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", setting)
        assert retry_seconds() == 300
        (record,) = caplog.records
        assert record.getMessage() == (
            f"WOVE_RESULT_RETRY_SECONDS is a number of seconds, not {setting!r}; using 300"
        )

    def test_a_setting_below_the_least_is_the_least(
        self, clock: PausingClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WOVE_RESULT_RETRY_SECONDS", "0.5")
        offering.down_since[ORIGIN] = clock.now - 1000
        assert patience(task(), clock.now, cancelled=True) == 0.5
