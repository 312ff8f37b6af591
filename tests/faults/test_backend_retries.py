"""The backend itself runs a task again. Row 35 of the fault matrix."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

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


#: Fleets whose backend runs what fails twice again: on ConnectionError, and when a process dies; on any error.
RETRYING: dict[str, dict[str, Any]] = {
    "celery-retrying": {},
    "rq-worker": {"executor_config": {"enqueue_options": {"retry": Retry(max=2), "failure_ttl": 1}}},
}


@asynccontextmanager
async def running(crew: Crew, name: str) -> AsyncIterator[EnvironmentHandle]:
    """Have an environment on one of them."""
    async with ExecutorRuntime({"fleet": crew.definition(name, **RETRYING[name])}) as runtime:
        yield runtime["fleet"]


@pytest.fixture(params=RETRYING)
async def either(request: pytest.FixtureRequest, crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    async with running(crew, request.param) as handle:
        yield handle


@pytest.fixture
async def celery(crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    async with running(crew, "celery-retrying") as handle:
        yield handle


@pytest.fixture
async def rq(crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    async with running(crew, "rq-worker") as handle:
        yield handle


class TestRow35Either:
    """What Celery and RQ do alike."""

    async def test_row_35_retries_end_with_the_last_execution(
        self, either: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(either, tmp_path, "job", deeds.fail_until, 3)
        assert await job.call == 3
        assert [(line.run_id, line.attempt) for line in job.executions] == [(job.executions[0].run_id, 1)] * 3

    async def test_row_35_retries_that_are_used_up_end_with_their_error(
        self, either: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(either, tmp_path, "job", deeds.fail_until, 9)
        with pytest.raises(ConnectionError, match="execution 3"):
            await job.call
        assert len(job.executions) == 3

    # Before its first beat, and while it holds one open.
    @pytest.mark.parametrize("after", [0.0, 1.5])
    async def test_row_35_the_work_of_a_process_that_dies_is_run_again(
        self, after: float, either: EnvironmentHandle, tmp_path: Path
    ) -> None:
        job = Job(either.options(delivery_timeout=12.0), tmp_path)
        first = await job.running()
        await asyncio.wait([job.call], timeout=after)
        kill(first.pid)
        # Whoever is next has to wait until it is known that the first one is dead.
        await until(lambda: len(job.executions) == 2 or job.call.done(), "it is run again")
        job.release()
        assert await job.call == "done"
        assert [(line.run_id, line.attempt) for line in job.executions] == [(first.run_id, 1)] * 2


class TestRow35Celery:
    """``autoretry_for``, ``retry()``, ``Reject`` and ``Ignore`` pass through."""

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


async def _failure(job: Job) -> BaseException:
    (ended,) = await asyncio.gather(job.call, return_exceptions=True)
    assert isinstance(ended, BaseException)
    assert not isinstance(ended, (asyncio.CancelledError, TimeoutError))
    return ended
