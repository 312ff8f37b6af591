"""Which functions are known to end within a moment."""

from __future__ import annotations

import pytest
from wove_tests.clock import Clock

from wove.worker import pace
from wove.worker.pace import MAX_NAMES, SHORT, is_short, measured


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made.as_time())
    monkeypatch.setattr(pace, "_short", {})
    return made


def execute(clock: Clock, function: str, seconds: float) -> None:
    with measured(function):
        clock.advance(seconds)


def test_only_what_was_short_the_last_time_is_short(clock: Clock) -> None:
    assert not is_short("a")
    execute(clock, "a", SHORT / 2)
    execute(clock, "b", SHORT * 2)
    assert is_short("a")
    assert not is_short("b")
    execute(clock, "a", SHORT * 2)
    assert not is_short("a")


def test_what_fails_counts_as_well(clock: Clock) -> None:
    with pytest.raises(LookupError), measured("a"):
        raise LookupError
    assert is_short("a")


def test_names_that_are_made_up_for_each_call_do_not_pile_up(clock: Clock) -> None:
    for number in range(2 * MAX_NAMES + 5):
        execute(clock, str(number), 0.0)
    assert len(pace._short) <= MAX_NAMES
