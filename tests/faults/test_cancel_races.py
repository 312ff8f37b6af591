"""A cancellation meets a run before its start, with its result under way, and after its end. Row 16 of the fault matrix."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import deeds, tasks
from wove_tests.chaos.vitals import own_time
from wove_tests.crew import Crew, Job
from wove_tests.proxy import TcpProxy
from wove_tests.waiting import run_states, until, until_states

from wove import ExecutorRuntime
from wove.demo.processes import free_port
from wove.waiter import Waiter

if TYPE_CHECKING:
    from pathlib import Path


redis = pytest.mark.redis
FLEETS = [
    "memory",
    *(pytest.param(name, marks=redis) for name in ("celery-prefork", "celery-threads", "rq-worker")),
]
#: How many tasks each of them runs at once.
SLOTS = {"celery-prefork": 2, "celery-threads": 4, "rq-worker": 1}

ACKNOWLEDGED = {"delivery_cancel_mode": "require_ack", "delivery_cancel_timeout": 20.0}


def definition_of(name: str, crew: Crew, **config: Any) -> dict[str, Any]:
    if name == "memory":
        return {"executor": "memory", "delivery_timeout": 30, "executor_config": config}
    return crew.definition(name, executor_config=config)


async def cancelled(call: asyncio.Task[Any]) -> asyncio.CancelledError:
    """Cancel a call and return what its caller gets."""
    call.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await call
    return caught.value


def acknowledged(error: BaseException) -> bool:
    return not getattr(error, "__notes__", [])


class TestRow16:
    """Cancellations at every moment."""

    @pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
    @pytest.mark.parametrize("name", FLEETS)
    async def test_row_16_at_random_moments_nothing_starts_after_its_acknowledgement(
        self, name: str, mode: str, crew: Crew, tmp_path: Path
    ) -> None:
        pick = random.Random(f"{name} {mode}")
        calls = 15 if name == "rq-worker" else 40
        settings = {**ACKNOWLEDGED, "delivery_cancel_mode": mode}
        async with ExecutorRuntime({"fleet": definition_of(name, crew)}) as runtime:
            handle = runtime["fleet"]

            async def one(number: int) -> str:
                seconds = pick.choice([0.0, 0.01, 0.05])
                job = Job(handle.options(**settings), tmp_path, f"job{number}", deeds.take, seconds, number)
                await asyncio.wait([job.call], timeout=pick.uniform(0.0, 0.08))
                job.call.cancel()
                (ended,) = await asyncio.gather(job.call, return_exceptions=True)
                at = time.monotonic()
                if not isinstance(ended, BaseException):
                    assert ended == number
                    return "result"
                assert isinstance(ended, asyncio.CancelledError)
                ends[number] = at
                return "acknowledged" if acknowledged(ended) else "not acknowledged"

            ends: dict[int, float] = {}
            outcomes = []
            for start in range(0, calls, 5):
                outcomes += await asyncio.gather(*(one(start + n) for n in range(5)))
            assert set(outcomes) <= {"result", "acknowledged"}
            assert len(handle._dispatcher.table) == 0
            # What was queued behind them has had its turn when this is done.
            assert await asyncio.gather(*(handle.run(tasks.double, n) for n in range(8))) == [
                2 * n for n in range(8)
            ]
            if mode == "require_ack":
                logs = {number: deeds.notes(tmp_path / f"job{number}.log") for number in ends}
                zombies = [number for number, log in logs.items() for line in log if line.at > ends[number]]
                assert not zombies

    @redis
    @pytest.mark.parametrize("name", list(SLOTS))
    async def test_row_16_before_the_start_it_is_acknowledged_and_never_starts(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": definition_of(name, crew)}) as runtime:
            handle = runtime["fleet"]
            busy = [Job(handle, tmp_path, f"busy{n}") for n in range(SLOTS[name])]
            for each in busy:
                await each.begun()
            never = [Job(handle.options(**ACKNOWLEDGED), tmp_path, f"never{n}") for n in range(3)]
            await until(lambda: run_states(handle).count("submitted") == 3, "they are queued")
            for each in never:
                each.call.cancel()
            await until(lambda: "submitted" not in run_states(handle), "they are being cancelled")
            for each in busy:
                each.release()
            ended = await asyncio.gather(*(each.call for each in never), return_exceptions=True)
            assert {type(each) for each in ended} == {asyncio.CancelledError}
            assert all(acknowledged(each) for each in ended)
            assert await asyncio.gather(*(each.call for each in busy)) == ["done"] * len(busy)
            assert await asyncio.gather(*(handle.run(tasks.double, n) for n in range(4))) == [0, 2, 4, 6]
            assert not [line for each in never for line in each.executions]

    @redis
    @pytest.mark.parametrize("name", list(SLOTS))
    async def test_row_16_with_the_result_in_flight_the_run_has_one_outcome(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        with TcpProxy("127.0.0.1", free_port()) as proxy:
            url = f"http://127.0.0.1:{proxy.port}"
            config = {"callback_url": url, "callback_port": proxy.upstream_port}
            async with ExecutorRuntime({"fleet": definition_of(name, crew, **config)}) as runtime:
                handle = runtime["fleet"]
                job = Job(handle.options(**ACKNOWLEDGED), tmp_path)
                await job.running()
                proxy.latency(0.7, 0.0, "request")
                job.release()
                await job.ended()
                error = await cancelled(job.call)
                # The result was its worker's last word on it: nobody else will acknowledge it.
                assert acknowledged(error)
                assert len(handle._dispatcher.table) == 0
                proxy.up()
                assert await handle.run(tasks.double, 21) == 42

    @redis
    @pytest.mark.parametrize("name", list(SLOTS))
    async def test_row_16_after_the_end_it_changes_nothing(
        self, name: str, crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settle = Waiter.settle

        def settle_and_cancel(waiter: Waiter, outcome: Any) -> None:
            settle(waiter, outcome)
            job.call.cancel()  # the result is in, and its caller has not read it yet

        async with ExecutorRuntime({"fleet": definition_of(name, crew)}) as runtime:
            handle = runtime["fleet"]
            job = Job(handle.options(**ACKNOWLEDGED), tmp_path, "job", deeds.mark, 7)
            begun = time.monotonic()
            with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError) as caught:
                patch.setattr(Waiter, "settle", settle_and_cancel)
                await job.call
            assert acknowledged(caught.value)
            assert time.monotonic() - begun < 10.0, "there is nobody left to acknowledge it"
            assert len(handle._dispatcher.table) == 0
            assert await handle.run(tasks.double, 21) == 42
            assert len(job.executions) == 1


@redis
@pytest.mark.parametrize(
    ("name", "setting"), [("celery-prefork", "terminate_on_cancel"), ("rq-worker", "stop_on_cancel")]
)
class TestRow16Escalation:
    """The process of a task that does not listen is ended a second later."""

    async def test_row_16_who_listens_ends_by_itself(
        self, name: str, setting: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": definition_of(name, crew, **{setting: True})}) as runtime:
            handle = runtime["fleet"].options(**ACKNOWLEDGED)
            stopped = crew.slot(name).worker.log_text().count("stopped by user")
            for func in (tasks.until_cancelled, tasks.until_cancelled_async):
                started, seen = tmp_path / f"{func.__name__}.started", tmp_path / f"{func.__name__}.seen"
                call = asyncio.create_task(handle.run(func, str(started), str(seen)))
                await until(started.exists, "it runs")
                await until_states(handle, "started")
                assert acknowledged(await cancelled(call))
                assert seen.exists(), "it had the time to tidy up"
            worker = crew.slot(name).worker
            before = set(worker.members())
            # Longer than an escalation takes; a work horse goes with its job, and a pool process stays.
            await asyncio.wait([asyncio.create_task(handle.run(deeds.sleep, 1.5))])
            assert worker.log_text().count("stopped by user") == stopped
            if name == "celery-prefork":
                assert set(worker.members()) == before, "nobody was killed"

    async def test_row_16_who_does_not_listen_is_ended(
        self, name: str, setting: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": definition_of(name, crew, **{setting: True})}) as runtime:
            handle = runtime["fleet"]
            deaf = Job(handle.options(**ACKNOWLEDGED), tmp_path, "deaf")
            line = await deaf.running()
            begun = time.monotonic()
            assert acknowledged(await cancelled(deaf.call))
            assert 0.5 < time.monotonic() - begun < 15.0
            await until(lambda: line.pid not in crew.slot(name).worker.members(), "its process has ended")
            assert not deeds.notes(deaf.log, "end")
            assert await handle.run(tasks.double, 21) == 42

    async def test_row_16_without_waiting_for_it_as_well(
        self, name: str, setting: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": definition_of(name, crew, **{setting: True})}) as runtime:
            handle = runtime["fleet"]
            deaf = Job(handle, tmp_path, "deaf")
            line = await deaf.running()
            begun = own_time()
            await cancelled(deaf.call)
            assert own_time() - begun < 0.5, "best effort returns at once"
            await until(lambda: line.pid not in crew.slot(name).worker.members(), "its process has ended")
            assert not deeds.notes(deaf.log, "end")
            assert await handle.run(tasks.double, 21) == 42
