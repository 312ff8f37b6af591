"""``delivery_retries``: a lost delivery is made again, and nothing else is."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from wove_tests import deeds, tasks
from wove_tests.crew import Crew, Job, kill
from wove_tests.waiting import until_states

from wove import DeliveryTimeoutError, ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis


@pytest.fixture(params=["celery-prefork", "rq-worker"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def handle(name: str, crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    async with ExecutorRuntime({"fleet": crew.definition(name)}) as runtime:
        yield runtime["fleet"]


async def test_a_lost_worker_is_followed_by_another_attempt(
    handle: EnvironmentHandle, tmp_path: Path
) -> None:
    job = Job(handle.options(delivery_retries=1), tmp_path)
    first = await job.running()
    kill(first.pid)
    second = await job.begun(2)
    assert (first.run_id, first.attempt, second.attempt) == (second.run_id, 1, 2)
    await until_states(handle, "started")
    job.release()
    assert await job.call == "done"
    assert len(job.executions) == 2


async def test_a_whole_worker_is_followed_by_another_one(
    handle: EnvironmentHandle, name: str, crew: Crew, tmp_path: Path
) -> None:
    job = Job(handle.options(delivery_retries=1), tmp_path)
    await job.running()
    slot = crew.slot(name)
    slot.worker.kill()
    slot.replace()
    await job.begun(2)
    job.release()
    assert await job.call == "done"
    assert [line.attempt for line in job.executions] == [1, 2]


async def test_a_poison_task_stops_after_its_retries_with_the_history(
    handle: EnvironmentHandle, tmp_path: Path
) -> None:
    job = Job(handle.options(delivery_retries=2), tmp_path, "job", deeds.die, "SIGKILL")
    with pytest.raises(WorkerLostError, match="attempt 3") as caught:
        await job.call
    assert [line.attempt for line in job.executions] == [1, 2, 3]
    error = caught.value
    assert [entry["attempt"] for entry in error.attempts] == [1, 2, 3]
    assert all(entry["reason"] and entry["seconds"] >= 0 for entry in error.attempts)
    (history,) = [note for note in error.__notes__ if "executions came to nothing" in note]
    assert history.startswith("3 executions")
    assert await handle.run(tasks.double, 21) == 42


async def test_a_tasks_own_exception_is_never_retried(handle: EnvironmentHandle, tmp_path: Path) -> None:
    job = Job(handle.options(delivery_retries=5), tmp_path, "job", deeds.fail)
    with pytest.raises(LookupError, match="the task's own"):
        await job.call
    assert len(job.executions) == 1


async def test_the_deadline_covers_all_attempts(handle: EnvironmentHandle, tmp_path: Path) -> None:
    job = Job(
        handle.options(delivery_retries=50, delivery_timeout=4.0), tmp_path, "job", deeds.die, "SIGKILL"
    )
    begun = time.monotonic()
    with pytest.raises(DeliveryTimeoutError):
        await job.call
    assert time.monotonic() - begun < 6.0
    assert len(job.executions) >= 2
    assert await handle.run(tasks.double, 21) == 42


async def test_a_cancelled_call_is_not_submitted_again(handle: EnvironmentHandle, tmp_path: Path) -> None:
    job = Job(handle.options(delivery_retries=5), tmp_path)
    line = await job.running()
    kill(line.pid)
    job.call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job.call
    assert await handle.run(tasks.double, 21) == 42
    assert len(job.executions) == 1
    assert len(handle._dispatcher.table) == 0
