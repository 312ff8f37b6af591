"""Outcomes of a batch as its worker keeps them, until they are delivered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from wove.tables import CANCELLED, ERROR, MAX_VALUE, RETURNED
from wove.wire import unpack_message
from wove.worker.batch_news import News
from wove.worker.batch_places import Places
from wove.worker.batch_session import BatchSession

RUN = "a" * 32


class Exits:
    """Ends whoever pickles it."""

    def __reduce__(self) -> Any:
        raise SystemExit(3)


class Unheard:
    """Reports a run of its own to nobody."""

    parked: bytes | None = None

    def succeed(self, result: object) -> None:
        self.parked = b"x" * 100_000


def make() -> BatchSession:
    assignment: Any = SimpleNamespace(
        run_id="b" * 32, task_id="task", attempt=1, path="", origin="http://nowhere", plain=False
    )
    return BatchSession(assignment)


def errors_of(session: BatchSession) -> list[tuple[int, str]]:
    told = []
    for place, codec, data in session._news.rows:
        assert codec == ERROR
        told.append((place, unpack_message(data)[0]["error"]["message"]))
    return told


def test_a_result_whose_pickling_exits_is_an_error_of_its_run() -> None:
    session = make()
    with pytest.raises(SystemExit):
        session.add_result(4, RUN, Exits())
    assert [place for place, _ in errors_of(session)] == [4]


def test_a_large_result_that_nobody_takes_is_said_to_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    monkeypatch.setattr(session, "_alone", lambda run_id: Unheard())
    session.add_result(4, RUN, b"x" * (MAX_VALUE + 1))
    ((place, message),) = errors_of(session)
    assert place == 4
    assert "could not be delivered" in message


def test_runs_that_are_not_wanted_any_more_are_passed_over_and_said_to_be_cancelled() -> None:
    session = make()
    session.expect(5)
    session.withdraw("2 0 2")
    assert session.next_place() == 1
    session.withdraw("3 3")
    session.give_back()
    assert session.next_place() is None
    assert [row[:2] for row in session._news.rows] == [
        (0, CANCELLED),
        (2, CANCELLED),
        (3, CANCELLED),
        (4, RETURNED),
    ]
    assert session.beat_rest == " 3"


def test_the_run_that_is_executed_is_cancelled_when_it_is_withdrawn() -> None:
    session = make()
    session.expect(2)
    place = session.next_place()
    assert place == 0
    item = session.begin(place, RUN)
    session.withdraw("1 1")
    assert not item.context.cancelled
    session.withdraw("2 0")
    assert item.context.cancelled


def test_of_runs_that_had_ended_before_the_batch_began_nothing_is_said() -> None:
    places = Places()
    places.expect(3)
    places.withdraw("1 1")
    places.settle()
    places.withdraw("2 2")
    assert list(places.draw()) == [(0, True), (2, False)]
    assert not places.are_left


def test_what_was_said_in_vain_is_said_again_before_the_rest() -> None:
    earlier, news = News(), News()
    earlier.add(0, "json", b"1")
    earlier.add_time(0.5)
    news.add(1, "json", b"2")
    news.add_time(0.25)
    news.put_back(earlier)
    assert [row[0] for row in news.rows] == [0, 1]
    assert news.since == earlier.since
    assert (news.executed, news.busy) == (2, 0.75)
