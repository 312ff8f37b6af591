"""Brokers are killed, lose their data, do not answer, deliver again. Rows 6-8 and 37 of the fault matrix."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from wove_tests import deeds, tasks
from wove_tests.chaos.fleet import PersistentRedis
from wove_tests.chaos.vitals import LoopLag
from wove_tests.crew import Crew, Job, Post
from wove_tests.proxy import TcpProxy
from wove_tests.rabbitmq import RabbitServer
from wove_tests.waiting import run_states, until

from wove import DeliveryTimeoutError, ExecutorRuntime, SubmitError, WorkerLostError
from wove.executors import watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

#: What a worker had taken and not begun when its broker died comes back after this; Celery's default is an hour.
_SOON = {
    "broker_transport_options": {
        "visibility_timeout": 2,
        "unacked_restore_interval": 0.5,
        "unacked_restore_throttle": 1,
    }
}
#: Seconds for which the loop may be held up. Clients wait for their brokers for five; a busy machine is no fault.
HELD_UP = 2.5
_ONE = {"pool": "prefork", "concurrency": 1}
_POSTS = {
    post.name: post
    for post in (
        Post("celery-redis", "celery", _ONE, _SOON),
        Post("rq-redis", "rq"),
        Post("celery-rabbitmq", "celery", _ONE, broker="rabbitmq"),
    )
}


@pytest.fixture(scope="module")
def mortal(_no_process_left: None) -> Iterator[Crew]:
    """Workers on brokers that may be killed, and keep their data."""
    data = Path(tempfile.mkdtemp(prefix="wove-rabbitmq-data-"))
    try:
        with Crew(_POSTS, PersistentRedis(), RabbitServer(data)) as running:
            yield running
    finally:
        shutil.rmtree(data, ignore_errors=True)


def take_down(crew: Crew, name: str) -> None:
    """End a broker, with nothing that it has accepted lost."""
    broker = crew.broker(name)
    if isinstance(broker, RabbitServer):
        # It writes to its disk now and then; what is meant to survive a kill, publishers have to have confirmed.
        broker.stop(30.0)
    else:
        broker.kill()


def revive(crew: Crew, name: str) -> None:
    """Start a broker again.

    Without its Redis an RQ worker ends, and so does one of Celery that had taken messages (kombu 5.7): whoever
    runs them starts them again.
    """
    broker = crew.broker(name)
    broker.stop()
    broker.start()
    broker.wait_ready()
    if isinstance(broker, PersistentRedis):
        crew.slot(name).replace()


async def queued(handle: EnvironmentHandle, jobs: int) -> None:
    await until(lambda: run_states(handle).count("submitted") == jobs, "they are accepted")


@pytest.mark.parametrize(
    "name",
    [
        "celery-redis",
        "rq-redis",
        # Its broker is started twice, which takes its time where others are at work.
        pytest.param("celery-rabbitmq", marks=[pytest.mark.rabbitmq, pytest.mark.timeout(300)]),
    ],
)
async def test_row_06_a_broker_that_restarts_with_its_data(name: str, mortal: Crew, tmp_path: Path) -> None:
    async with ExecutorRuntime({"fleet": mortal.definition(name)}) as runtime:
        handle = runtime["fleet"]
        busy = Job(handle, tmp_path, "busy")
        await busy.running()
        waiting = [Job(handle, tmp_path, f"waiting{number}", deeds.mark, number) for number in range(3)]
        await queued(handle, 3)
        await asyncio.to_thread(take_down, mortal, name)
        busy.release()
        assert await busy.call == "done", "results do not come by the broker"
        await asyncio.to_thread(revive, mortal, name)
        assert await asyncio.gather(*(each.call for each in waiting)) == [0, 1, 2]
        assert await handle.run(tasks.double, 21) == 42
        assert len(busy.executions) == 1


@pytest.mark.parametrize("name", ["celery-redis", "rq-redis"])
async def test_row_07_a_broker_that_has_lost_its_data(
    name: str, mortal: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "UNSTARTED", (1.0, 1.0))
    async with ExecutorRuntime({"fleet": mortal.definition(name)}) as runtime:
        handle = runtime["fleet"]
        busy = Job(handle, tmp_path, "busy")
        await busy.running()
        limit = 3.0 if name == "celery-redis" else 20.0
        forgotten = Job(handle.options(delivery_start_timeout=limit), tmp_path, "forgotten", deeds.mark, 1)
        again = Job(handle.options(delivery_retries=1), tmp_path, "again", deeds.mark, 2)
        await queued(handle, 2)
        await asyncio.to_thread(_take_down_for_good, mortal, name)
        busy.release()
        assert await busy.call == "done"
        await asyncio.to_thread(revive, mortal, name)
        if name == "celery-redis":
            # Celery cannot say what its broker holds.
            with pytest.raises(DeliveryTimeoutError, match="accepted by the backend, never started"):
                await forgotten.call
            again.call.cancel()
            await asyncio.wait([again.call])
        else:
            with pytest.raises(WorkerLostError, match="RQ has no such job"):
                await forgotten.call
            assert await again.call == 2
            assert [line.attempt for line in again.executions] == [2]
        assert not forgotten.executions


def _take_down_for_good(crew: Crew, name: str) -> None:
    broker = crew.broker(name)
    assert isinstance(broker, PersistentRedis)
    broker.kill()
    shutil.rmtree(broker.data)
    broker.data.mkdir()


@pytest.fixture
def proxy(crew: Crew) -> Iterator[TcpProxy]:
    """The way from the submitter to its broker; workers have one of their own."""
    with TcpProxy("127.0.0.1", crew.broker("rq-worker").port) as weather:
        yield weather


@pytest.mark.parametrize("name", ["celery-prefork", "rq-worker"])
class TestRow08Submitting:
    """The broker cannot be reached, or its answer does not come."""

    async def test_row_08_a_black_hole_holds_nobody_up(
        self, name: str, crew: Crew, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition(name, port=proxy.port)}) as runtime:
            handle = runtime["fleet"]
            assert await handle.run(tasks.double, 1) == 2
            proxy.black_hole()
            lag = LoopLag()
            async with lag.watched():
                begun = time.monotonic()
                swallowed = asyncio.create_task(handle.run(tasks.double, 2))
                with pytest.raises(DeliveryTimeoutError, match="delivery_timeout=1 s"):
                    await handle.options(delivery_timeout=1.0).run(tasks.double, 3)
                assert time.monotonic() - begun < 3.0
                begun = time.monotonic()
                swallowed.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await swallowed
                assert time.monotonic() - begun < HELD_UP
            assert lag.longest < HELD_UP
            proxy.up()
            assert await handle.options(delivery_retries=3).run(tasks.double, 21) == 42

    async def test_row_08_a_broker_that_is_down_is_an_error_that_says_so(
        self, name: str, crew: Crew, proxy: TcpProxy
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition(name, port=proxy.port)}) as runtime:
            handle = runtime["fleet"]
            assert await handle.run(tasks.double, 1) == 2
            proxy.down()
            lag = LoopLag()
            async with lag.watched():
                with pytest.raises(SubmitError, match="did not accept the run") as caught:
                    await handle.run(tasks.double, 2)
            assert caught.value.maybe_accepted
            assert str(proxy.port) in str(caught.value)
            assert lag.longest < HELD_UP
            patient = asyncio.create_task(handle.options(delivery_retries=10).run(tasks.double, 21))
            await until(lambda: len(handle._dispatcher.table), "it is open")
            (run,) = handle._dispatcher.table.open_runs()
            await until(lambda: run.doubtful or run.repeats, "it was refused once")
            proxy.up()
            assert await patient == 42

    async def test_row_08_an_answer_that_is_lost_makes_no_second_outcome(
        self, name: str, crew: Crew, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"fleet": crew.definition(name, port=proxy.port)}) as runtime:
            handle = runtime["fleet"]
            assert await handle.run(tasks.double, 1) == 2
            log = crew.slot(name).worker.log_text
            before = log().count("deeds.mark")
            proxy.cut_after_commit()
            once = Job(handle, tmp_path, "once", deeds.mark, 1)
            again = [
                Job(handle.options(delivery_retries=10), tmp_path, f"again{number}", deeds.mark, number)
                for number in range(5)
            ]
            # The broker has them, and the worker takes them, whatever the submitter was told.
            await until(lambda: log().count("deeds.mark") > before, "something was accepted")
            proxy.up()
            assert await asyncio.gather(*(each.call for each in again)) == list(range(5))
            (ended,) = await asyncio.gather(once.call, return_exceptions=True)
            assert ended == 1 or (isinstance(ended, SubmitError) and ended.maybe_accepted)
            if name == "rq-worker":  # Celery's client repeats what it was not answered to, by itself
                assert [len(each.executions) for each in again] == [1] * 5
            assert await handle.run(tasks.double, 21) == 42
            assert len(handle._dispatcher.table) == 0


async def test_row_37_a_task_that_outlasts_the_visibility_timeout_runs_once(
    crew: Crew, tmp_path: Path
) -> None:
    async with ExecutorRuntime({"fleet": crew.definition("celery-visible")}) as runtime:
        handle = runtime["fleet"]
        job = Job(handle, tmp_path)
        await job.running()
        first = crew.slot("celery-visible").worker
        with crew.new_worker("celery-visible") as second:
            await until(
                lambda: any("another worker is at it" in each.log_text() for each in (first, second)),
                "its message was delivered a second time, and dropped",
            )
            job.release()
            assert await job.call == "done"
        assert await handle.run(tasks.double, 21) == 42
        assert len(job.executions) == 1
