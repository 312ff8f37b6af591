"""What is left in somebody's Redis when Wove has used it: nothing that stays."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis
from rq.registry import FailedJobRegistry
from wove_tests import tasks
from wove_tests.callbacks import child_environment
from wove_tests.waiting import until, until_exists

from wove import DeliveryTimeoutError, EncodeError, ExecutorRuntime, WorkerLostError
from wove.adapters.rq import FAILURE_TTL
from wove.demo.processes import CeleryWorker, RqWorker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

QUEUE = "leftovers"
#: Databases that no fleet of the contract tests uses: what is found there is of these tests.
RQ_DATABASE, CELERY_DATABASE = 11, 12

#: What RQ itself writes about its queues and workers, whoever enqueues.
RQS_OWN = ("rq:queues", "rq:workers", f"rq:workers:{QUEUE}", "rq:worker:", "rq:clean_")
FAILED_REGISTRY = f"rq:failed:{QUEUE}"


@pytest.fixture(scope="module")
def rq_redis(fleets: Fleets) -> Iterator[Redis]:
    """A database with an RQ worker."""
    url = fleets.redis_url(RQ_DATABASE)
    with (
        RqWorker(url, queues=[QUEUE], env=child_environment()),
        closing(Redis.from_url(url, decode_responses=True)) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def celery_redis(fleets: Fleets) -> Iterator[Redis]:
    """A database with a Celery worker that runs one task at a time."""
    url = fleets.redis_url(CELERY_DATABASE)
    worker = CeleryWorker(url, queue=QUEUE, pool="threads", concurrency=1, env=child_environment())
    with worker, closing(Redis.from_url(url, decode_responses=True)) as client:
        yield client


async def started(executor: str, **config: Any) -> ExecutorRuntime:
    runtime = ExecutorRuntime(
        {"fleet": {"executor": executor, "executor_config": config, "delivery_timeout": 30}}
    )
    await runtime.start()
    return runtime


@pytest.fixture
def rq_config(fleets: Fleets, rq_redis: Redis) -> Iterator[dict[str, Any]]:
    """Its ``executor_config``; what a test has left is removed after it."""
    yield {"redis_url": fleets.redis_url(RQ_DATABASE), "queue_name": QUEUE}
    if left := left_by_rq(rq_redis):
        rq_redis.delete(*left)


@pytest.fixture
async def rq(rq_config: dict[str, Any]) -> AsyncIterator[EnvironmentHandle]:
    """The environment on RQ."""
    runtime = await started("rq", **rq_config)
    yield runtime["fleet"]
    await runtime.stop()


@pytest.fixture
async def celery(fleets: Fleets, celery_redis: Redis) -> AsyncIterator[EnvironmentHandle]:
    """The environment on Celery."""
    runtime = await started("celery", broker_url=fleets.redis_url(CELERY_DATABASE), queue=QUEUE)
    yield runtime["fleet"]
    await runtime.stop()


def left_by_rq(client: Redis) -> set[str]:
    """Return the keys that are there because something was enqueued."""
    return {key for key in client.keys() if not key.startswith(RQS_OWN)}


def left_by_celery(client: Redis) -> set[str]:
    """Return the keys that are there because something was sent."""
    return {key for key in client.keys() if not key.startswith("_kombu.binding")}


# --- what is done to a fleet -----------------------------------------------------


async def succeed(fleet: EnvironmentHandle) -> None:
    """Run what comes back."""
    assert await fleet.run(tasks.double, 21) == 42
    assert await fleet.run(tasks.double_async, 21) == 42
    assert await fleet.run(len, bytes(1_000_000)) == 1_000_000
    assert await fleet.run(tasks.report_progress)
    assert [result async for result in fleet.map(tasks.double, range(30))] == [2 * n for n in range(30)]


async def fail(fleet: EnvironmentHandle) -> None:
    """Run what fails in the user's function and in ours."""
    with pytest.raises(ValueError, match="a builtin problem"):
        await fleet.run(tasks.fail_builtin)
    with pytest.raises(EncodeError):
        await fleet.run(tasks.return_lock)


async def cancel(fleet: EnvironmentHandle, folder: Path) -> None:
    """Cancel one call that runs, as a function and as a coroutine, and one that is queued behind it."""
    for number, func in enumerate((tasks.until_cancelled, tasks.until_cancelled_async)):
        busy, seen = folder / f"started{number}", folder / f"seen{number}"
        running = asyncio.create_task(fleet.run(func, str(busy), str(seen)))
        await until_exists(busy)
        queued = asyncio.create_task(fleet.run(tasks.touch, str(folder / "never")))
        await until(lambda: len(fleet._dispatcher.table) == 2, "both are open")
        await until(lambda: states(fleet) == ["started", "submitted"], "the second one is queued")
        for call in (queued, running):
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        await until_exists(seen)
    # Whatever was queued has had its turn when this is done.
    assert await fleet.run(tasks.double, 1) == 2
    assert not (folder / "never").exists()


def states(fleet: EnvironmentHandle) -> list[str]:
    return sorted(str(run.state) for run in fleet._dispatcher.table.open_runs())


async def time_out(fleet: EnvironmentHandle, folder: Path) -> None:
    """Let one call run out of time in the queue, behind another."""
    busy, release = folder / "busy", folder / "release"
    running = asyncio.create_task(fleet.run(tasks.touch_and_wait, str(busy), str(release)))
    await until_exists(busy)
    with pytest.raises(DeliveryTimeoutError):
        await fleet.options(delivery_timeout=0.1).run(tasks.touch, str(folder / "never"))
    release.touch()
    assert await running == "released"
    assert await fleet.run(tasks.double, 1) == 2
    assert not (folder / "never").exists()


# --- RQ ----------------------------------------------------------------------------


class TestRq:
    """Jobs are gone when they have ended; those that failed can be looked at for a while."""

    async def test_success(self, rq: EnvironmentHandle, rq_redis: Redis) -> None:
        await succeed(rq)
        await until(lambda: not left_by_rq(rq_redis), "nothing is left")

    async def test_cancellation(self, rq: EnvironmentHandle, rq_redis: Redis, tmp_path: Path) -> None:
        await cancel(rq, tmp_path)
        await until(lambda: not left_by_rq(rq_redis), "nothing is left")

    async def test_timeout(self, rq: EnvironmentHandle, rq_redis: Redis, tmp_path: Path) -> None:
        await time_out(rq, tmp_path)
        await until(lambda: not left_by_rq(rq_redis), "nothing is left")

    async def test_failure(self, rq: EnvironmentHandle, rq_redis: Redis) -> None:
        await fail(rq)
        with pytest.raises(WorkerLostError):
            await rq.run(tasks.die)
        assert await rq.run(tasks.double, 1) == 2
        # RQ has its own word for the exception that was raised and for the process that died; what could
        # not be encoded came of a job that had ended well.
        failed = await until(
            lambda: ids if len(ids := set(rq_redis.zrange(FAILED_REGISTRY, 0, -1))) == 2 else None,
            "both failures are in RQ's registry",
        )
        kept = {f"rq:{kind}:{job}" for kind in ("job", "results") for job in failed}
        await until(lambda: left_by_rq(rq_redis) <= kept | {FAILED_REGISTRY}, "only the failed jobs are left")
        for key in left_by_rq(rq_redis) - {FAILED_REGISTRY}:
            assert 0 < rq_redis.ttl(key) <= FAILURE_TTL <= 300, key
        assert {f"rq:job:{job}" for job in failed} <= left_by_rq(rq_redis), "they can be looked at"

    async def test_a_failure_vanishes(self, rq_config: dict[str, Any], rq_redis: Redis) -> None:
        runtime = await started("rq", **rq_config, enqueue_options={"failure_ttl": 1})
        try:
            with pytest.raises(ValueError, match="a builtin problem"):
                await runtime["fleet"].run(tasks.fail_builtin)
            await until(lambda: rq_redis.exists(FAILED_REGISTRY), "it is in RQ's registry")
        finally:
            await runtime.stop()
        await until(lambda: left_by_rq(rq_redis) == {FAILED_REGISTRY}, "the job has expired")

        def cleaned() -> bool:
            # Workers do this every ten minutes or so.
            FailedJobRegistry(QUEUE, connection=rq_redis).cleanup()
            return not left_by_rq(rq_redis)

        await until(cleaned, "the registry is empty as well")

    async def test_a_job_that_was_stopped(
        self, rq_config: dict[str, Any], rq_redis: Redis, tmp_path: Path
    ) -> None:
        runtime = await started("rq", **rq_config, stop_on_cancel=True)
        try:
            busy = tmp_path / "busy"
            # Blind to cancellation: RQ ends its process.
            blind = runtime["fleet"].run(tasks.touch_and_wait, str(busy), str(tmp_path / "never"))
            running = asyncio.create_task(blind)
            await until_exists(busy)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(
                lambda: rq_redis.exists(FAILED_REGISTRY) and not rq_redis.exists(f"rq:wip:{QUEUE}"),
                "RQ has stopped it",
            )
            assert await runtime["fleet"].run(tasks.double, 1) == 2
        finally:
            await runtime.stop()
        (job,) = rq_redis.zrange(FAILED_REGISTRY, 0, -1)
        kept = {f"rq:job:{job}", f"rq:results:{job}", FAILED_REGISTRY}
        await until(lambda: left_by_rq(rq_redis) <= kept, "only the stopped job is left")
        assert 0 < rq_redis.ttl(f"rq:job:{job}") <= FAILURE_TTL

    async def test_an_environment_that_is_stopped(
        self, rq_config: dict[str, Any], rq_redis: Redis, tmp_path: Path
    ) -> None:
        runtime = await started("rq", **rq_config)
        busy, seen = tmp_path / "busy", tmp_path / "seen"
        calls = [
            asyncio.create_task(runtime["fleet"].run(tasks.until_cancelled, str(busy), str(seen))),
            asyncio.create_task(runtime["fleet"].run(tasks.touch, str(tmp_path / "never"))),
        ]
        await until_exists(busy)
        await until(lambda: states(runtime["fleet"]) == ["started", "submitted"], "one of them is queued")
        await runtime.stop()
        for call in calls:
            with pytest.raises(asyncio.CancelledError):
                await call
        await until_exists(seen)
        await until(lambda: not left_by_rq(rq_redis), "nothing is left")
        assert not (tmp_path / "never").exists()


# --- Celery --------------------------------------------------------------------------


class TestCelery:
    """No result is stored, and no message is left: only what says which queues there are."""

    async def test_success(self, celery: EnvironmentHandle, celery_redis: Redis) -> None:
        await succeed(celery)
        await until(lambda: not left_by_celery(celery_redis), "nothing is left")
        assert celery_redis.keys(), "it was this database"

    async def test_failure(self, celery: EnvironmentHandle, celery_redis: Redis) -> None:
        await fail(celery)
        await until(lambda: not left_by_celery(celery_redis), "nothing is left")

    async def test_cancellation(self, celery: EnvironmentHandle, celery_redis: Redis, tmp_path: Path) -> None:
        await cancel(celery, tmp_path)
        await until(lambda: not left_by_celery(celery_redis), "nothing is left")

    async def test_timeout(self, celery: EnvironmentHandle, celery_redis: Redis, tmp_path: Path) -> None:
        await time_out(celery, tmp_path)
        await until(lambda: not left_by_celery(celery_redis), "nothing is left")

    async def test_no_binding_is_ours(self, celery: EnvironmentHandle, celery_redis: Redis) -> None:
        # One more queue per submitter would stay for ever: the fleet's are all there are.
        before = {key: celery_redis.smembers(key) for key in celery_redis.keys("_kombu.binding.*")}
        await celery.run(tasks.double, 1)
        after = {key: celery_redis.smembers(key) for key in celery_redis.keys("_kombu.binding.*")}
        assert after == before
        assert set(after) == {f"_kombu.binding.{QUEUE}", "_kombu.binding.celery.pidbox"}
