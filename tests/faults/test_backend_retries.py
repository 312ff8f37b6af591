"""The backend itself runs a task again. Row 35 of the fault matrix."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from rq import Retry
from wove_tests import deeds, tasks
from wove_tests.crew import Crew, Job, kill
from wove_tests.waiting import until, until_states

from wove import EnvironmentExecutionError, ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis


@pytest.fixture
async def celery(crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    """A fleet that retries ConnectionError twice, and gives the messages of dead processes to others."""
    async with ExecutorRuntime({"fleet": crew.definition("celery-retrying")}) as runtime:
        yield runtime["fleet"]


@pytest.fixture
async def rq(crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    """A fleet whose jobs are retried twice."""
    config = {"enqueue_options": {"retry": Retry(max=2), "failure_ttl": 1}}
    async with ExecutorRuntime({"fleet": crew.definition("rq-worker", executor_config=config)}) as runtime:
        yield runtime["fleet"]


class TestRow35Celery:
    """``autoretry_for``, ``retry()``, ``Reject`` and ``Ignore`` pass through."""

    async def test_row_35_autoretry_ends_with_the_last_execution(
        self, celery: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(celery, tmp_path, "job", deeds.fail_until, 3)
        assert await job.call == 3
        assert [(line.run_id, line.attempt) for line in job.executions] == [(job.executions[0].run_id, 1)] * 3

    async def test_row_35_autoretry_that_is_used_up_ends_with_its_error(
        self, celery: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(celery, tmp_path, "job", deeds.fail_until, 9)
        with pytest.raises(ConnectionError, match="execution 3"):
            await job.call
        assert len(job.executions) == 3

    async def test_row_35_what_is_not_named_is_not_retried(
        self, celery: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(celery, tmp_path, "job", deeds.fail)
        with pytest.raises(LookupError):
            await job.call
        assert len(job.executions) == 1

    @pytest.mark.parametrize("name", ["celery-retrying", "celery-prefork", "celery-threads"])
    async def test_row_35_retry_that_the_task_asks_for(self, name: str, crew: Crew, tmp_path: Path) -> None:
        # Celery sends the next message before the task has ended: another process may have it at once.
        async with ExecutorRuntime({"fleet": crew.definition(name, delivery_timeout=8)}) as runtime:
            jobs = [Job(runtime["fleet"], tmp_path, f"job{n}", deeds.retry_until, 3) for n in range(10)]
            assert await asyncio.gather(*(job.call for job in jobs)) == [3] * 10
            assert [len(job.executions) for job in jobs] == [3] * 10

    async def test_row_35_reject_with_requeue(self, celery: EnvironmentHandle, tmp_path: Path) -> None:
        job = Job(celery, tmp_path, "job", deeds.reject_until, 3)
        assert await job.call == 3
        assert len(job.executions) == 3

    # With late acknowledgements, what is to be put back is delivered again.
    @pytest.mark.parametrize(
        ("name", "requeue"),
        [("celery-retrying", False), ("celery-prefork", False), ("celery-prefork", True)],
    )
    async def test_row_35_reject_that_is_for_good_is_an_outcome(
        self, name: str, requeue: bool, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition(name)}) as runtime:
            job = Job(runtime["fleet"], tmp_path, "job", deeds.reject_until, 9, requeue)
            error = await _failure(job)
            assert "execution 1" in str(error)
            assert await runtime["fleet"].run(tasks.double, 21) == 42
            assert len(job.executions) == 1

    async def test_row_35_ignore_is_an_outcome(self, celery: EnvironmentHandle, tmp_path: Path) -> None:
        job = Job(celery, tmp_path, "job", deeds.ignore)
        assert "Ignore" in repr(await _failure(job))
        assert len(job.executions) == 1

    @pytest.mark.parametrize("after", [0.0, 1.5])
    async def test_row_35_the_message_of_a_dead_process_is_run_again(
        self, after: float, celery: EnvironmentHandle, tmp_path: Path
    ) -> None:
        await _survives(celery.options(delivery_timeout=12.0), tmp_path, after)

    async def test_row_35_cancelled_between_two_executions_it_does_not_run_again(
        self, celery: EnvironmentHandle, tmp_path: Path
    ) -> None:
        patient = celery.options(delivery_cancel_mode="require_ack", delivery_cancel_timeout=20.0)
        job = Job(patient, tmp_path, "job", deeds.retry_in, 1.5)
        await job.begun()
        await until_states(celery, "submitted")
        job.call.cancel()
        (ended,) = await asyncio.gather(job.call, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError)
        assert not getattr(ended, "__notes__", [])
        assert await celery.run(tasks.double, 21) == 42
        assert len(job.executions) == 1


class TestRow35Rq:
    """``Retry``, of the job or returned by the function."""

    async def test_row_35_retry_ends_with_the_last_execution(
        self, rq: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(rq, tmp_path, "job", deeds.fail_until, 3)
        assert await job.call == 3
        assert len(job.executions) == 3

    async def test_row_35_retry_that_is_used_up_ends_with_its_error(
        self, rq: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(rq, tmp_path, "job", deeds.fail_until, 9)
        with pytest.raises(ConnectionError, match="execution 3"):
            await job.call
        assert len(job.executions) == 3

    @pytest.mark.parametrize("after", [0.0, 1.5])
    async def test_row_35_a_work_horse_that_dies_is_retried_as_well(
        self, after: float, rq: EnvironmentHandle, tmp_path: Path
    ) -> None:
        await _survives(rq.options(delivery_timeout=12.0), tmp_path, after)

    async def test_row_35_work_horses_that_all_die_are_a_lost_worker(
        self, rq: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(rq, tmp_path, "job", deeds.die, "SIGKILL")
        with pytest.raises(WorkerLostError):
            await job.call
        assert len(job.executions) == 3

    @pytest.mark.parametrize("name", ["rq-worker", "rq-simple"])
    async def test_row_35_retry_that_the_function_returns(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition(name)}) as runtime:
            job = Job(runtime["fleet"], tmp_path, "job", deeds.return_retry_until, 3)
            assert await job.call == 3
            assert len(job.executions) == 3

    async def test_row_35_retry_that_the_function_returns_once_too_often(
        self, crew: Crew, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition("rq-worker")}) as runtime:
            job = Job(runtime["fleet"], tmp_path, "job", deeds.return_retry_until, 9, 2)
            (ended,) = await asyncio.gather(job.call, return_exceptions=True)
            assert isinstance(ended, (Retry, EnvironmentExecutionError)), "something is said of it"
            await until(lambda: crew.idle("rq-worker"), "RQ is done with it")
            assert len(job.executions) == 3


async def _survives(handle: EnvironmentHandle, folder: Path, after: float) -> None:
    """Kill a run's process, with its open beat or before it, and see the backend run it again."""
    job = Job(handle, folder)
    first = await job.running()
    await asyncio.wait([job.call], timeout=after)
    kill(first.pid)
    # Whoever is next has to wait until it is known that the first one is dead.
    await until(lambda: len(job.executions) == 2 or job.call.done(), "it is run again")
    job.release()
    assert await job.call == "done"
    assert [(line.run_id, line.attempt) for line in job.executions] == [(first.run_id, 1)] * 2


async def _failure(job: Job) -> BaseException:
    (ended,) = await asyncio.gather(job.call, return_exceptions=True)
    assert isinstance(ended, BaseException)
    assert not isinstance(ended, (asyncio.CancelledError, TimeoutError))
    return ended
