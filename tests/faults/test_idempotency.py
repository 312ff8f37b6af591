"""Calls with equal keys share one run while it is open."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import deeds, tasks
from wove_tests.crew import Crew, Job
from wove_tests.waiting import until, until_states

from wove import ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

CALLERS = 50


@pytest.fixture(params=["celery-prefork", "celery-threads", "rq-worker"])
async def handle(request: pytest.FixtureRequest, crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    async with ExecutorRuntime({"fleet": crew.definition(request.param)}) as runtime:
        yield runtime["fleet"]


async def shared(handle: EnvironmentHandle, folder: Path, func: Any, *args: Any) -> list[Job]:
    """Return the calls of many callers, of which one is submitted."""
    keyed = handle.options(delivery_idempotency_key="report-{log}")
    jobs = [Job(keyed, folder, "shared", func, *args) for _ in range(CALLERS)]
    await jobs[0].begun()
    return jobs


async def test_fifty_concurrent_calls_execute_once(handle: EnvironmentHandle, tmp_path: Path) -> None:
    jobs = await shared(handle, tmp_path, deeds.take, 0.3, {"rows": [1, 2]})
    assert await asyncio.gather(*(job.call for job in jobs)) == [{"rows": [1, 2]}] * CALLERS
    assert len(jobs[0].executions) == 1
    # A call after the end is a run of its own.
    again = Job(
        handle.options(delivery_idempotency_key="report-{log}"), tmp_path, "shared", deeds.take, 0.0, 7
    )
    assert await again.call == 7
    assert len(again.executions) == 2


async def test_fifty_concurrent_calls_hear_of_one_error(handle: EnvironmentHandle, tmp_path: Path) -> None:
    jobs = await shared(handle, tmp_path, deeds.fail)
    ended = await asyncio.gather(*(job.call for job in jobs), return_exceptions=True)
    assert {(type(each), str(each)) for each in ended} == {(LookupError, "the task's own")}
    assert len(jobs[0].executions) == 1


async def test_cancelling_one_leaves_the_others(handle: EnvironmentHandle, tmp_path: Path) -> None:
    jobs = [Job(handle.options(delivery_idempotency_key="one"), tmp_path, "shared") for _ in range(CALLERS)]
    await jobs[0].running()
    for job in jobs[: CALLERS // 2]:
        job.call.cancel()
    left = await asyncio.gather(*(job.call for job in jobs[: CALLERS // 2]), return_exceptions=True)
    assert {type(each) for each in left} == {asyncio.CancelledError}
    await until_states(handle, "started")
    jobs[0].release()
    assert await asyncio.gather(*(job.call for job in jobs[CALLERS // 2 :])) == ["done"] * (CALLERS // 2)
    assert len(jobs[0].executions) == 1


async def test_cancelling_the_last_cancels_the_work(handle: EnvironmentHandle, tmp_path: Path) -> None:
    release = tmp_path / "never"
    keyed = handle.options(delivery_idempotency_key="one")
    jobs = [Job(keyed, tmp_path, "shared", deeds.hold_async, str(release)) for _ in range(5)]
    await jobs[0].running()
    for job in jobs:
        job.call.cancel()
    await asyncio.gather(*(job.call for job in jobs), return_exceptions=True)
    await until(lambda: deeds.notes(jobs[0].log, "cancelled"), "the task has heard of it")
    assert await handle.run(tasks.double, 21) == 42


async def test_fifty_callers_hear_of_one_lost_worker(crew: Crew, tmp_path: Path) -> None:
    async with ExecutorRuntime({"fleet": crew.definition("celery-prefork")}) as runtime:
        jobs = await shared(runtime["fleet"], tmp_path, deeds.die, "SIGKILL")
        ended = await asyncio.gather(*(job.call for job in jobs), return_exceptions=True)
        assert {type(each) for each in ended} == {WorkerLostError}
        assert len(jobs[0].executions) == 1


async def test_fifty_callers_share_an_attempt_after_a_lost_one(crew: Crew, tmp_path: Path) -> None:
    async with ExecutorRuntime({"fleet": crew.definition("celery-prefork")}) as runtime:
        jobs = await shared(runtime["fleet"].options(delivery_retries=2), tmp_path, deeds.die_until, 2)
        assert await asyncio.gather(*(job.call for job in jobs)) == [2] * CALLERS
        assert [line.attempt for line in jobs[0].executions] == [1, 2]
