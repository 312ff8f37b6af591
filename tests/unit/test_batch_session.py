"""Outcomes of a batch as its worker keeps them, until they are delivered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from wove.tables import ERROR, MAX_VALUE
from wove.wire import unpack_message
from wove.worker.batch import BatchSession

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
    for place, codec, data in session._rows:
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
