"""The checker of `make chaos` sees what it is there to see."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.chaos.executions import Executions
from wove_tests.chaos.ledger import Call, Ledger
from wove_tests.chaos.load import Job, Load
from wove_tests.chaos.tasks import ChaosError

from wove import DeliveryTimeoutError, SubmitError, WorkerLostError

if TYPE_CHECKING:
    from pathlib import Path

LOST = WorkerLostError({"kind": "WorkerLostError", "message": "gone"})


def a_call(key: int = 0, kind: str = "noop", expected: Any = 7, **changes: Any) -> Call:
    call = Call(key, "somewhere", kind, expected, begun=100.0, deadline=10.0, settings={})
    call.ended = 101.0
    for name, value in changes.items():
        setattr(call, name, value)
    return call


async def ended(result: Any) -> asyncio.Task[Any]:
    """Return a task that ended so."""

    async def end() -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    task = asyncio.create_task(end())
    await asyncio.wait([task])
    return task


@pytest.mark.parametrize(
    ("call", "result", "outcome"),
    [
        (a_call(), 7, "result"),
        (a_call(), 8, "wrong"),
        (a_call(), None, "wrong"),
        (a_call(), SubmitError("no broker"), "SubmitError"),
        (a_call(), DeliveryTimeoutError("late"), "DeliveryTimeoutError"),
        (a_call(), LOST, "WorkerLostError"),
        (a_call(), ConnectionError("not the task's"), "wrong"),
        (a_call(), ChaosError(0, 1), "wrong"),
        (a_call(kind="fail", expected=(0, 1)), ChaosError(0, 1), "task error"),
        (a_call(kind="fail", expected=(0, 1)), ChaosError(5, 1), "wrong"),
        (a_call(kind="fail", expected=(0, 1)), None, "wrong"),
        (a_call(cancelled_at=100.5), asyncio.CancelledError(), "cancelled"),
        (a_call(), asyncio.CancelledError(), "wrong"),
    ],
    ids=str,
)
async def test_judges_outcomes(call: Call, result: Any, outcome: str) -> None:
    ledger = Ledger()
    ledger.note(call, await ended(result))
    assert call.outcome == outcome
    assert len(ledger.wrong) == (outcome == "wrong")


async def test_a_call_without_an_outcome_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        name = "silent"

        def options(self, **_: Any) -> Silent:
            return self

        async def run(self, *_: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr("wove_tests.chaos.load.GRACE", 0.01)
    ledger = Ledger()
    load = Load({}, ledger, 1, None)
    call = a_call(deadline=0.01)
    await load._follow(call, Silent(), Job("noop", abs, (), 0.0, 0.01), None)
    assert call.outcome == "lost"
    assert len(ledger.lost) == 1


def test_callers_of_one_run_must_hear_the_same() -> None:
    ledger = Ledger()
    ledger.compare([a_call(outcome="result"), a_call(outcome="result")])
    ledger.compare([a_call(outcome="cancelled", cancelled_at=100.1), a_call(outcome="result")])
    assert not ledger.double
    ledger.compare([a_call(outcome="WorkerLostError"), a_call(outcome="result")])
    assert len(ledger.double) == 1


class TestExecutions:
    @pytest.fixture
    def log(self, tmp_path: Path) -> Path:
        return tmp_path / "executions"

    async def test_a_start_after_an_acknowledged_cancellation_is_a_zombie(self, log: Path) -> None:
        ledger = Ledger()
        for key, mode in enumerate(["require_ack", "best_effort"]):
            call = a_call(key, cancelled_at=100.5, cancel_mode=mode, cancel_timeout=5.0)
            ledger.note(call, await ended(asyncio.CancelledError()))
        log.write_text(
            "0 aa 1 start 50 40 100.900000\n"  # began before the acknowledgement
            "0 aa 1 start 51 40 101.200000\n"
            "1 bb 1 start 52 40 101.200000\n"  # nobody promised anything
        )
        found = Executions.check(log, ledger, {})
        assert len(found.zombies) == 1 and "pid 51" in found.zombies[0]
        assert found.started_late.total() == 1
        assert (found.started, found.duplicates, found.retried) == (3, 1, 0)

    async def test_an_unanswered_cancellation_promises_nothing(self, log: Path) -> None:
        ledger = Ledger()
        call = a_call(cancelled_at=100.5, cancel_mode="require_ack", cancel_timeout=5.0, ended=105.5)
        ledger.note(call, await ended(asyncio.CancelledError()))
        log.write_text("0 aa 1 start 50 40 106.000000\n")
        assert not Executions.check(log, ledger, {}).zombies

    async def test_a_lost_worker_that_nobody_killed_is_a_false_alarm(self, log: Path) -> None:
        ledger = Ledger()
        for key in range(4):
            ledger.note(a_call(key), await ended(LOST))
        log.write_text(
            "0 aa 1 start 50 40 100.100000\n"
            "1 bb 1 start 51 40 100.100000\n"  # killed
            "2 cc 1 start 52 41 100.100000\n"  # its worker was killed
            "3 dd 1 start 50 40 100.100000\n3 dd 2 start 51 40 100.500000\n3 dd 2 sta"  # its last attempt was
        )
        found = Executions.check(log, ledger, {50: 99.0, 51: 100.6, 41: 100.6, 52: 101.5})
        assert len(found.false_alarms) == 1 and "call 0 " in found.false_alarms[0]
        assert found.retried == 1

    async def test_says_what_a_timeout_hid(self, log: Path) -> None:
        ledger = Ledger()
        for key in range(4):
            ledger.note(a_call(key, ended=110.0), await ended(DeliveryTimeoutError("late")))
        log.write_text(
            "0 aa 1 start 50 40 101.000000\n"  # killed
            "1 bb 1 start 52 40 101.000000\n"  # still at it
            "2 cc 1 start 52 40 101.000000\n2 cc 1 end 52 40 102.000000\n"  # its result is where?
            "3 dd 1 start 52 40 101.000000\n3 dd 1 end 52 40 109.500000\n"  # no time was left
        )
        found = Executions.check(log, ledger, {50: 101.5})
        assert len(found.unnoticed) == 1 and "call 0 " in found.unnoticed[0]
        assert len(found.undelivered) == 1 and "call 2 " in found.undelivered[0]
