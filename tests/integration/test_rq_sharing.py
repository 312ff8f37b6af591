"""Calls with equal keys share one RQ job, also those of different processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from rq.job import Job
from wove_tests import tasks
from wove_tests.fleets import SUPPORT
from wove_tests.waiting import run_states, until, until_exists, until_states

from wove import (
    ConfigurationError,
    DeliveryOrphanedError,
    DeliveryTimeoutError,
    EnvironmentExecutionError,
    ExecutorRuntime,
    WorkerLostError,
)
from wove.adapters.rq_sharing import JOINED
from wove.backend import shared_name
from wove.demo.processes import ManagedProcess, RqWorker, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from redis import Redis

    from wove.demo.processes import RedisServer
    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

#: A database that belongs to no fleet.
DATABASE = 11
QUEUE = "sharing"
KEY = "key"


def worker_on(url: str, *, worker_class: str | None = None) -> RqWorker:
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    # Submitters die here, and the next test wants its worker.
    env = {"PYTHONPATH": path, "WOVE_RESULT_RETRY_SECONDS": "2"}
    return RqWorker(url, queues=[QUEUE], worker_class=worker_class, env=env)


@pytest.fixture(scope="module")
def url(redis_server: RedisServer) -> str:
    return f"redis://127.0.0.1:{redis_server.port}/{DATABASE}"


@pytest.fixture(scope="module")
def standing_worker(url: str) -> Iterator[list[RqWorker]]:
    workers: list[RqWorker] = []
    yield workers
    for worker in workers:
        worker.stop()


@pytest.fixture
def worker(standing_worker: list[RqWorker], url: str) -> RqWorker:
    """An RQ worker; a test may kill it."""
    while standing_worker and not standing_worker[-1].running:
        standing_worker.pop().stop()
    if not standing_worker:
        standing_worker.append(worker_on(url).__enter__())
    return standing_worker[-1]


@pytest.fixture
def redis(url: str) -> Iterator[Redis]:
    """A client; what a test leaves of shared jobs is an error."""
    from redis import Redis

    with Redis.from_url(url) as client:
        yield client
        asyncio.run(until(lambda: not client.keys("wove:shared:*"), "nothing is left of shared jobs"))


class Files:
    """What an execution and its test tell each other by."""

    def __init__(self, folder: Path) -> None:
        self.counter = folder / "counter"
        self.release = folder / "release"
        self.seen = folder / "seen"
        self.blocked = folder / "blocked"
        self.unblock = folder / "unblock"

    def executions(self) -> list[int]:
        return tasks.executions(self.counter)

    @property
    def work(self) -> tuple[str, str]:
        return str(self.counter), str(self.release)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    for path in (files.release, files.unblock):
        path.touch()


def definition(url: str, **settings: Any) -> dict[str, Any]:
    """Return an environment with a listener of its own."""
    config = {
        "redis_url": url,
        "queue_name": QUEUE,
        "callback_port": free_port(),
        "enqueue_options": {"failure_ttl": 1},
        **settings.pop("executor_config", {}),
    }
    defaults = {"delivery_timeout": 60, "delivery_idempotency_key": KEY}
    return {"executor": "rq", "executor_config": config, **defaults, **settings}


@asynccontextmanager
async def submitters(url: str, count: int = 2, **settings: Any) -> AsyncIterator[list[EnvironmentHandle]]:
    """Start runtimes that know nothing of each other; each has a listener of its own."""
    runtimes = [ExecutorRuntime({"shared": definition(url, **settings)}) for _ in range(count)]
    try:
        for runtime in runtimes:
            await runtime.start()
        yield [runtime["shared"] for runtime in runtimes]
    finally:
        await asyncio.gather(*(runtime.stop() for runtime in runtimes))


def party(redis: Redis, environment: str = "shared") -> dict[bytes, bytes]:
    """Return what Redis knows of a shared job."""
    return redis.hgetall(shared_name(environment, QUEUE, KEY))


def joined(redis: Redis) -> int:
    return sum(name.startswith(JOINED.encode()) for name in party(redis))


async def until_joined(redis: Redis, count: int = 1) -> None:
    await until(lambda: joined(redis) == count, f"{count} have joined")


async def owner_and_joiner(
    redis: Redis, handles: list[EnvironmentHandle], func: Any, *args: Any
) -> list[asyncio.Task[Any]]:
    """Make the same call by each; the first is the one in whose name the job is enqueued."""
    calls = [asyncio.create_task(handles[0].run(func, *args))]
    await until(lambda: party(redis), "there is a job")
    for count, handle in enumerate(handles[1:], 1):
        calls.append(asyncio.create_task(handle.run(func, *args)))
        await until_joined(redis, count)
    return calls


async def block(handle: EnvironmentHandle, files: Files) -> asyncio.Task[Any]:
    """Keep the worker busy until ``files.unblock`` is there."""
    unshared = handle.options(delivery_idempotency_key=None)
    task = asyncio.create_task(unshared.run(tasks.touch_and_wait, str(files.blocked), str(files.unblock)))
    await until_exists(files.blocked)
    return task


def program(url: str, files: Files, count: int) -> ManagedProcess:
    """Return a submitter of its own process."""
    arguments = [json.dumps(definition(url)), str(count), *files.work]
    command = [sys.executable, "-m", "wove_tests.sharing_program", *arguments]
    return ManagedProcess(command, name="submitter", env={"PYTHONPATH": str(SUPPORT)})


class TestOutcome:
    def test_two_processes_with_25_calls_each_share_one_execution(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        with program(url, files, 25) as first, program(url, files, 25) as second:
            asyncio.run(until_joined(redis))
            files.release.touch()
            for submitter in (first, second):
                submitter.wait_for_log("]]")
                results = json.loads(submitter.log_text())
                assert results == [["value", files.executions()[0]]] * 25, submitter.log_text()
        assert len(files.executions()) == 1

    async def test_an_exception_is_shared_and_the_key_free_at_once(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_fail, *files.work)
            files.release.touch()
            for call in calls:
                with pytest.raises(tasks.TwoArguments) as caught:
                    await call
                assert caught.value.code == 7
                assert "count_and_fail" in str(caught.value.__cause__)
            assert len(files.executions()) == 1

    async def test_a_key_is_free_at_once_after_the_end(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        files.release.touch()
        async with submitters(url) as (first, second):
            for number in range(20):
                results = await asyncio.gather(
                    *(handle.run(tasks.count_and_wait, *files.work, number) for handle in (first, second))
                )
                assert [value for value, _ in results] == [number, number]

    async def test_large_arguments_and_results(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        value = os.urandom(3_000_000)
        async with submitters(url) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work, value)
            files.release.touch()
            for result, _ in await asyncio.gather(*calls):
                assert result == value

    async def test_environments_of_other_names_do_not_share(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        files.release.touch()
        two = {"one": definition(url), "two": definition(url)}
        async with ExecutorRuntime(two) as runtime:
            calls = [runtime[name].run(tasks.count_and_wait, *files.work, name) for name in two]
            assert [value for value, _ in await asyncio.gather(*calls)] == ["one", "two"]
        assert len(files.executions()) == 2

    async def test_a_key_in_use_for_another_function_is_an_error(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url) as (first, second):
            call = asyncio.create_task(first.run(tasks.count_and_wait, *files.work))
            await until(lambda: party(redis), "there is a job")
            with pytest.raises(ConfigurationError, match=r"in use for an open run of .*count_and_wait"):
                await second.run(tasks.double, 2)
            files.release.touch()
            await call

    async def test_who_has_joined_is_told_that_it_has_started(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, delivery_heartbeat_seconds=1.5, delivery_start_timeout=10) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            begun = asyncio.get_running_loop().time()
            # The beats of two listeners, for longer than their silence is allowed to be.
            await until(lambda: asyncio.get_running_loop().time() - begun > 2.5, "beats were due")
            files.release.touch()
            await asyncio.gather(*calls)
            assert len(files.executions()) == 1

    async def test_a_start_timeout_of_who_has_joined_counts_while_the_job_is_queued(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url) as handles:
            blocker = await block(handles[0], files)
            owner = asyncio.create_task(handles[0].run(tasks.count_and_wait, *files.work))
            await until(lambda: party(redis), "there is a job")
            with pytest.raises(DeliveryTimeoutError, match="did not start"):
                await handles[1].options(delivery_start_timeout=0.3).run(tasks.count_and_wait, *files.work)
            await until_joined(redis, 0)
            files.unblock.touch()
            files.release.touch()
            await asyncio.gather(owner, blocker)

    @pytest.mark.skipif(not hasattr(Job, "should_retry"), reason="functions cannot return Retry in this RQ")
    async def test_a_retry_of_rq_is_waited_for_by_all(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_retry, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            files.release.touch()
            assert await asyncio.gather(*calls) == ["at last", "at last"]
            assert len(files.executions()) == 2

    async def test_a_payload_that_cannot_be_verified_is_skipped(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, 3) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            name = shared_name("shared", QUEUE, KEY)
            (victim, _) = [field for field in redis.hkeys(name) if field.startswith(JOINED.encode())]
            payload = bytearray(redis.hget(name, victim))
            payload[-1] ^= 1
            redis.hset(name, victim, bytes(payload))
            redis.hset(name, JOINED + "0" * 32, b"garbage")
            files.release.touch()
            await until(lambda: sum(call.done() for call in calls) == 2, "two have the outcome")
            (left,) = [call for call in calls if not call.done()]
            left.cancel()
            await asyncio.wait([left])
        assert "not heard" in worker.log_text()

    @pytest.mark.parametrize("part", ["owner", "joiner"])
    async def test_an_answer_that_is_lost_makes_nobody_take_part_twice(
        self,
        worker: RqWorker,
        url: str,
        redis: Redis,
        files: Files,
        part: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        async with submitters(url, delivery_retries=2) as handles:
            calls: list[asyncio.Task[Any]] = []
            for handle, name in zip(handles, ("owner", "joiner"), strict=True):
                with monkeypatch.context() as patch:
                    lost = _lose_an_answer(patch) if name == part else []
                    calls.append(asyncio.create_task(handle.run(tasks.count_and_wait, *files.work, "value")))
                    await until(lambda lost=lost, name=name: lost or name != part, "an answer was lost")
                    await until(lambda n=name: joined(redis) if n == "joiner" else party(redis), "it is in")
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            assert [run.attempt for handle in handles for run in handle._dispatcher.table.open_runs()] == [
                1,
                1,
            ]
            files.release.touch()
            assert [value for value, _ in await asyncio.gather(*calls)] == ["value"] * 2
            assert len(files.executions()) == 1


def _lose_an_answer(patch: pytest.MonkeyPatch) -> list[str]:
    """Have Redis do what the next transaction says, and its answer be lost; the list then has an entry."""
    from redis.client import Pipeline

    real, lost = Pipeline.execute, []

    def execute(pipeline: Any, *args: Any, **options: Any) -> Any:
        submits = pipeline.explicit_transaction  # only there is MULTI said by its name
        result = real(pipeline, *args, **options)
        if submits and not lost:
            lost.append("one")
            raise ConnectionError("the answer was lost")
        return result

    patch.setattr(Pipeline, "execute", execute)
    return lost


class TestCancel:
    async def test_the_owner_of_a_queued_job_leaves_it_to_who_has_joined(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, delivery_cancel_mode="require_ack") as handles:
            blocker = await block(handles[0], files)
            owner, joiner = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work, "kept")
            owner.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await owner
            assert not hasattr(caught.value, "__notes__")
            files.unblock.touch()
            files.release.touch()
            value, _ = await joiner
            assert value == "kept"
            assert len(files.executions()) == 1
            await blocker

    @pytest.mark.parametrize("func", [tasks.count_and_wait, tasks.count_and_fail])
    async def test_the_owner_of_a_running_job_leaves_it_to_who_has_joined(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, func: Any
    ) -> None:
        settings = {"delivery_cancel_mode": "require_ack", "executor_config": {"stop_on_cancel": True}}
        async with submitters(url, **settings) as handles:
            owner, joiner = await owner_and_joiner(redis, handles, func, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            owner.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await owner
            assert not hasattr(caught.value, "__notes__")
            assert not joiner.done()
            files.release.touch()
            if func is tasks.count_and_fail:
                with pytest.raises(tasks.TwoArguments):
                    await joiner
            else:
                await joiner
            assert len(files.executions()) == 1

    async def test_who_has_joined_and_leaves_disturbs_nobody(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        settings = {"delivery_cancel_mode": "require_ack"}
        async with submitters(url, 3, **settings) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            calls[1].cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await calls[1]
            assert not hasattr(caught.value, "__notes__")
            assert joined(redis) == 1
            files.release.touch()
            await asyncio.gather(calls[0], calls[2])
            assert len(files.executions()) == 1

    async def test_a_queued_job_that_all_have_left_is_gone(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, 3) as handles:
            blocker = await block(handles[0], files)
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            await until(lambda: not redis.llen(f"rq:queue:{QUEUE}") and not party(redis), "nothing is queued")
            files.unblock.touch()
            files.release.touch()
            await blocker
            # Whatever was queued has had its turn when this is back.
            await handles[0].run(tasks.double, 2)
            assert not files.executions()

    @pytest.mark.parametrize("last", ["owner", "joiner"])
    async def test_a_running_job_that_all_have_left_is_told_to_stop(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, last: str
    ) -> None:
        async with submitters(url, delivery_cancel_mode="require_ack", delivery_cancel_timeout=20) as handles:
            calls = await owner_and_joiner(
                redis, handles, tasks.count_until_cancelled, str(files.counter), str(files.seen)
            )
            await until(files.executions, "it runs")
            for call in calls if last == "joiner" else reversed(calls):
                assert not files.seen.exists()
                call.cancel()
                with pytest.raises(asyncio.CancelledError) as caught:
                    await call
                assert not hasattr(caught.value, "__notes__")
            await until_exists(files.seen)
            assert len(files.executions()) == 1

    @pytest.mark.parametrize("last", ["owner", "joiner"])
    async def test_a_running_job_that_all_have_left_is_stopped_where_that_is_configured(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, last: str
    ) -> None:
        settings = {"delivery_cancel_mode": "require_ack", "delivery_cancel_timeout": 20}
        async with submitters(url, executor_config={"stop_on_cancel": True}, **settings) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            for call in calls if last == "joiner" else reversed(calls):
                call.cancel()
                with pytest.raises(asyncio.CancelledError) as caught:
                    await call
                assert not hasattr(caught.value, "__notes__")
            # The worker is free: its work horse was ended.
            assert await handles[0].run(tasks.double, 2) == 4

    async def test_a_key_that_all_have_left_begins_anew(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url) as handles:
            calls = await owner_and_joiner(
                redis, handles, tasks.count_until_cancelled, str(files.counter), str(files.seen)
            )
            await until(files.executions, "it runs")
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            await until(lambda: b"closed" in party(redis) or not party(redis), "all have left")
            assert await handles[1].run(tasks.double, 4) == 8

    @pytest.mark.parametrize("stops", ["owner", "joiner"])
    @pytest.mark.parametrize("policy", ["cancel", "fail", "detach", "requeue"])
    async def test_stopping_one_leaves_the_job_to_the_other(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, policy: str, stops: str
    ) -> None:
        async with submitters(url, 1) as (first,):
            runtime = ExecutorRuntime({"shared": definition(url, delivery_orphan_policy=policy)})
            await runtime.start()
            handles = [runtime["shared"], first] if stops == "owner" else [first, runtime["shared"]]
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work, 5)
            stopped, other = calls if stops == "owner" else reversed(calls)
            await until_states(runtime["shared"], "started")
            await runtime.stop()
            with pytest.raises(asyncio.CancelledError if policy == "cancel" else DeliveryOrphanedError):
                await stopped
            if stops == "joiner":  # who wants the work to go on keeps its share of it
                assert joined(redis) == (policy in ("detach", "requeue"))
            files.release.touch()
            value, _ = await other
            assert value == 5
            await until(lambda: not party(redis), "the job is over")
            assert await first.run(tasks.double, 2) == 4
            assert len(files.executions()) == 1


class TestDeath:
    async def test_the_owners_process_dies_and_who_has_joined_gets_the_outcome(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, 1) as (handle,):
            with program(url, files, 1) as submitter:
                await until(lambda: party(redis), "there is a job")
                joiner = asyncio.create_task(handle.run(tasks.count_and_wait, *files.work, "value"))
                await until_joined(redis)
                await until(files.executions, "it runs")
                submitter.kill()
            files.release.touch()
            value, pid = await joiner
            assert value == "value"
            assert files.executions() == [pid]

    async def test_the_owners_process_dies_before_the_job_begins(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, 1) as (handle,):
            blocker = await block(handle, files)
            with program(url, files, 1) as submitter:
                await until(lambda: party(redis), "there is a job")
                joiner = asyncio.create_task(handle.run(tasks.count_and_wait, *files.work, "value"))
                await until_joined(redis)
                submitter.kill()
            files.unblock.touch()
            files.release.touch()
            value, pid = await joiner
            assert value == "value"
            assert files.executions() == [pid]
            await blocker

    @pytest.mark.parametrize("whole", [False, True], ids=["work-horse", "worker"])
    async def test_a_killed_worker_is_a_loss_for_all(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, whole: bool
    ) -> None:
        async with submitters(url) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            begun = asyncio.get_running_loop().time()
            (pid,) = files.executions()
            if whole:
                worker.kill()
            else:
                os.kill(pid, signal.SIGKILL)
            for call in calls:
                with pytest.raises(WorkerLostError, match=f"pid {pid}"):
                    await call
            assert asyncio.get_running_loop().time() - begun < 10
            # Also where RQ itself does not know of it yet.
            await until(lambda: not party(redis), "the key is free")
        if whole:
            redis.flushdb()  # what RQ would clean up after minutes

    async def test_a_worker_that_is_killed_with_a_retry_left_is_made_good_once(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        async with submitters(url, delivery_retries=1) as handles:
            calls = await owner_and_joiner(redis, handles, tasks.count_and_wait, *files.work)
            await asyncio.gather(*(until_states(handle, "started") for handle in handles))
            os.kill(files.executions()[0], signal.SIGKILL)
            await until(lambda: len(files.executions()) > 1, "it was submitted again")
            await until(
                lambda: [*map(run_states, handles)] == [["started"], ["started"]],
                "both attempts have started",
            )
            files.release.touch()
            assert len({pid for _, pid in await asyncio.gather(*calls)}) == 1
            assert len(files.executions()) == 2

    async def test_a_job_whose_worker_is_dead_is_not_joined(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, standing_worker: list[RqWorker]
    ) -> None:
        with program(url, files, 1) as submitter:
            await until(files.executions, "it runs")
            submitter.kill()
        worker.kill()
        with worker_on(url):
            files.release.touch()
            async with submitters(url, 1) as (handle,):
                value, pid = await handle.run(tasks.count_and_wait, *files.work, "anew")
                assert value == "anew"
                assert files.executions()[1:] == [pid]
        redis.flushdb()

    async def test_an_outcome_that_cannot_be_delivered_is_found_with_the_job(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        # Its workers cannot come back, which nobody knows.
        nowhere = {"callback_url": f"http://127.0.0.1:{free_port()}"}
        async with submitters(url, 1) as (owner,), submitters(url, 1, executor_config=nowhere) as (deaf,):
            calls = await owner_and_joiner(redis, [owner, deaf], tasks.count_and_wait, *files.work, "parked")
            files.release.touch()
            assert (await calls[0])[0] == "parked"
            assert (await calls[1])[0] == "parked"
            assert len(files.executions()) == 1


PLAIN = {"queue_name": "sharing-plain", "pickle": False}


class TestWithoutPickles:
    """Shared jobs of environments, or workers, that take plain data only."""

    @pytest.fixture
    def listed(self, url: str) -> Iterator[RqWorker]:
        """A worker that has a list of functions."""
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        env = {"PYTHONPATH": path, "WOVE_ALLOW": "wove_tests.tasks:*", "WOVE_ENVIRONMENTS": "shared"}
        with RqWorker(url, queues=["sharing-plain"], env=env) as worker:
            yield worker

    async def both(self, handles: list[EnvironmentHandle], func: Any, *args: Any) -> list[Any]:
        """Make the same call by both and return what each got."""
        calls = [asyncio.create_task(handle.run(func, *args)) for handle in handles]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def test_results_errors_and_refusals_are_for_all(
        self, url: str, redis: Redis, files: Files, listed: RqWorker
    ) -> None:
        name = shared_name("shared", "sharing-plain", KEY)
        async with submitters(url, 2, executor_config=PLAIN) as handles:
            calls = [asyncio.create_task(handle.run(tasks.count_and_wait, *files.work)) for handle in handles]
            await until(
                lambda: any(f.startswith(JOINED.encode()) for f in redis.hkeys(name)), "one has joined"
            )
            files.release.touch()
            results = await asyncio.gather(*calls)
            assert results[0] == results[1]
            assert len(files.executions()) == 1
            # Errors are data, with the words of the exception.
            for outcome in await self.both(handles, tasks.fail_builtin):
                assert type(outcome) is EnvironmentExecutionError
                assert "a builtin problem" in str(outcome)
            # What is not on the list is refused to each of them.
            for outcome in await self.both(handles, os.getpid):
                assert isinstance(outcome, EnvironmentExecutionError)
                assert "is not allowed on this worker" in str(outcome)
            # What is no plain data comes back to nobody.
            for outcome in await self.both(handles, tasks.make_point, 1, 2):
                assert isinstance(outcome, EnvironmentExecutionError)
                assert "only plain data travels here" in str(outcome)

    async def test_one_that_takes_pickles_shares_with_one_that_does_not(
        self, worker: RqWorker, url: str, redis: Redis, files: Files
    ) -> None:
        plain = ExecutorRuntime({"shared": definition(url, executor_config={"pickle": False})})
        async with submitters(url, 1) as (handle,), plain:
            blocked = await block(handle, files)
            calls = await owner_and_joiner(redis, [plain["shared"], handle], tasks.make_point, 1, 2)
            files.unblock.touch()
            await blocked
            refused, point = await asyncio.gather(*calls, return_exceptions=True)
            assert point == tasks.Point(1, 2)
            assert isinstance(refused, EnvironmentExecutionError)
            assert "only plain data travels here" in str(refused)

    async def test_one_that_is_refused_does_not_take_the_others_along(
        self, worker: RqWorker, url: str, redis: Redis, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expiring = ExecutorRuntime({"shared": definition(url, executor_config={"payload_expires": 60})})
        async with submitters(url, 1) as (handle,), expiring:
            blocked = await block(handle, files)
            real = time.time
            past = real() - 1_000
            monkeypatch.setattr("wove.backend.time.time", lambda: past)
            calls = [asyncio.create_task(expiring["shared"].run(tasks.double, 4))]
            await until(lambda: party(redis), "there is a job")
            monkeypatch.undo()
            calls.append(asyncio.create_task(handle.run(tasks.double, 4)))
            await until_joined(redis)
            files.unblock.touch()
            await blocked
            refused, result = await asyncio.gather(*calls, return_exceptions=True)
            assert result == 8
            assert "it has expired" in str(refused)
