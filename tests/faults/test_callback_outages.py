"""Workers cannot reach the callback server, or badly. Rows 9-12, 26, 27 and 40 of the fault matrix."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from redis import Redis
from wove_tests import deeds, tasks
from wove_tests.callbacks import child_environment
from wove_tests.crew import FULL, Crew, Job
from wove_tests.proxy import TcpProxy
from wove_tests.waiting import until

from wove import EncodeError, ExecutorRuntime, WorkerLostError
from wove.demo.processes import ManagedProcess, free_port
from wove.executors import watch
from wove.worker.rq import RqOutages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

#: Seconds of an outage, and calls whose results come in meanwhile.
OUTAGES = [(0.5, 200), (5.0, 200)]
if FULL:
    OUTAGES = [(seconds, 1_000) for seconds in (0.5, 5.0, 60.0)]

EVERYWHERE = ["celery-prefork", "celery-threads", "rq-worker"]


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    """The way from workers to a callback server on a port of its own."""
    with TcpProxy("127.0.0.1", free_port()) as weather:
        yield weather


def through(proxy: TcpProxy, **config: Any) -> dict[str, Any]:
    """Return the ``executor_config`` of a submitter that is called back by way of the proxy."""
    url = f"http://127.0.0.1:{proxy.port}"
    return {"callback_url": url, "callback_port": proxy.upstream_port, **config}


@pytest.fixture
async def started(crew: Crew, proxy: TcpProxy) -> AsyncIterator[Callable[..., Any]]:
    """Starts an environment whose workers report by way of the proxy."""
    runtime = ExecutorRuntime({})
    await runtime.start()
    used: list[str] = []

    async def start(name: str, **changes: Any) -> EnvironmentHandle:
        used.append(name)
        config = through(proxy, **changes.pop("executor_config", {}))
        await runtime.ensure_environment(name, crew.definition(name, executor_config=config, **changes))
        return runtime[name]

    yield start
    proxy.up()
    # A worker that is not told that its outcome has arrived offers it for minutes, and the next test finds it busy.
    await until(lambda: not proxy.busy, "nothing is on its way")
    for name in used:
        if name.startswith("rq"):
            await until(lambda name=name: crew.idle(name), "nothing is under way", 40.0)
    await runtime.stop()


class TestRow09Down:
    """The callback server is away for a while: results wait for it."""

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize(("seconds", "calls"), OUTAGES)
    async def test_row_09_down_and_every_result_arrives(
        self, seconds: float, calls: int, started: Any, proxy: TcpProxy
    ) -> None:
        # The longest pause between two offers is half the outage, 30 s at most; the rest is work.
        limit = seconds + min(30.0, seconds) + 60.0
        fleets = [await started(name, delivery_timeout=limit) for name in EVERYWHERE]
        # RQ forks a process for each, and runs one at a time.
        shares = [calls // 2, calls // 2 - calls // 20, calls // 20]
        running = [
            asyncio.ensure_future(asyncio.gather(*(fleet.run(tasks.double, n) for n in range(share))))
            for fleet, share in zip(fleets, shares, strict=True)
        ]
        await until(
            lambda: any(fleet._dispatcher._reception.taken for fleet in fleets), "the first result is in"
        )
        proxy.down()
        await asyncio.wait(running, timeout=seconds)
        assert not all(each.done() for each in running), "the outage has held somebody up"
        proxy.up()
        results = await asyncio.gather(*running)
        assert results == [[2 * n for n in range(share)] for share in shares]


class TestRow10LongOutage:
    """Silence while nobody could be heard is not the worker's."""

    @pytest.mark.parametrize("heartbeat", [3.0, 6.0] if FULL else [3.0])
    async def test_row_10_an_outage_longer_than_the_heartbeat_is_no_loss(
        self, heartbeat: float, started: Any, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        jobs = []
        for name in EVERYWHERE:
            handle = (await started(name)).options(delivery_heartbeat_seconds=heartbeat)
            jobs.append(Job(handle, tmp_path, name))
            await jobs[-1].running()
        for weather in (proxy.down, proxy.reset):
            weather()
            await asyncio.wait([job.call for job in jobs], timeout=4.0)
        for job in jobs:
            job.release()
            await job.ended()
        assert not any(job.call.done() for job in jobs), "nobody is told anything yet"
        proxy.up()
        assert await asyncio.gather(*(job.call for job in jobs)) == ["done"] * 3
        assert [len(job.executions) for job in jobs] == [1, 1, 1]

    async def test_row_10_a_black_hole_shorter_than_the_heartbeat_is_no_loss(
        self, started: Any, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        jobs = []
        for name in EVERYWHERE:
            handle = (await started(name)).options(delivery_heartbeat_seconds=9.0)
            jobs.append(Job(handle, tmp_path, name))
            await jobs[-1].running()
        proxy.black_hole()
        for job in jobs:
            job.release()
            await job.ended()
        await asyncio.wait([job.call for job in jobs], timeout=3.0)
        assert not any(job.call.done() for job in jobs), "nothing gets through"
        proxy.up()
        assert await asyncio.gather(*(job.call for job in jobs)) == ["done"] * 3


class TestRow11BeyondPatience:
    """Workers that have offered an outcome in vain leave it with their backend."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "UNSTARTED", (0.5, 0.5, 1.0))

    @pytest.mark.parametrize("name", ["rq-impatient", "celery-impatient"])
    async def test_row_11_a_parked_outcome_is_found_while_nobody_can_call_back(
        self, name: str, started: Any, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        handle = await started(name)
        assert await handle.run(tasks.double, 1) == 2
        job = Job(handle, tmp_path)
        await job.running()
        proxy.down()
        job.release()
        assert await job.call == "done"
        # Their slots are free, and what follows begins and ends unheard.
        followers = [handle.run(deeds.mark, str(tmp_path / "log"), {"row": n, 2: (n,)}) for n in range(3)]
        failing = handle.run(tasks.fail_custom)
        *results, failure = await asyncio.gather(*followers, failing, return_exceptions=True)
        assert results == [{"row": n, 2: (n,)} for n in range(3)]
        assert isinstance(failure, tasks.TwoArguments)
        assert (failure.code, failure.reason) == (7, "seven")
        assert proxy.weather == "down"
        assert len(deeds.notes(tmp_path / "log")) == 3

    async def test_row_11_without_a_place_to_keep_it_the_caller_is_told(
        self, started: Any, proxy: TcpProxy, tmp_path: Path, crew: Crew
    ) -> None:
        handle = await started("celery-forgetful")
        job = Job(handle, tmp_path)
        await job.running()
        proxy.down()
        job.release()
        await job.ended()
        with pytest.raises(WorkerLostError, match="is not at it any more"):
            await job.call
        assert (
            "this fleet has no result backend to keep it in"
            in crew.slot("celery-forgetful").worker.log_text()
        )


#: A submitter that is killed: it runs so many calls on the environment given as JSON.
SUBMITTER = """
import asyncio, json, sys
from wove import ExecutorRuntime
from wove_tests import deeds

async def main():
    async with ExecutorRuntime({"fleet": json.loads(sys.argv[1])}) as runtime:
        calls = [runtime["fleet"].run(deeds.hold_async, *sys.argv[3:]) for _ in range(int(sys.argv[2]))]
        await asyncio.gather(*calls)

asyncio.run(main())
"""


class TestRow12SubmitterRestart:
    """The submitter dies, and with it whoever waits; every slot of its fleet is at its work."""

    @pytest.mark.parametrize(("name", "slots"), [("celery-prefork", 2), ("rq-worker", 1)])
    async def test_row_12_the_next_submitter_on_the_port_ends_the_old_ones_work(
        self, name: str, slots: int, crew: Crew, tmp_path: Path
    ) -> None:
        port = free_port()
        definition = crew.definition(name, executor_config={"callback_port": port})
        log, release = tmp_path / "log", tmp_path / "release"
        with _submitter(definition, slots, log, release):
            await until(lambda: len(deeds.notes(log)) == slots, "its calls run")
        async with ExecutorRuntime({"fleet": definition}) as runtime:
            release.touch()
            # Nobody knows the runs: their outcomes are offered once, and the slots are free.
            calls = [runtime["fleet"].options(delivery_timeout=15).run(tasks.double, n) for n in range(4)]
            assert await asyncio.gather(*calls) == [0, 2, 4, 6]
            await until(lambda: len(deeds.notes(log, "end")) == slots, "its work has ended")

    @pytest.mark.parametrize(("name", "slots"), [("celery-forgetful", 4), ("rq-impatient", 1)])
    async def test_row_12_without_one_a_worker_gives_up_in_time(
        self, name: str, slots: int, crew: Crew, tmp_path: Path
    ) -> None:
        definition = crew.definition(name)
        log, release = tmp_path / "log", tmp_path / "release"
        with _submitter(definition, slots, log, release):
            await until(lambda: len(deeds.notes(log)) == slots, "its calls run")
        release.touch()
        async with ExecutorRuntime({"fleet": definition}) as runtime:
            calls = [runtime["fleet"].options(delivery_timeout=15).run(tasks.double, n) for n in range(8)]
            assert await asyncio.gather(*calls) == [2 * n for n in range(8)]

    async def test_row_12_an_outage_that_was_waited_for_is_not_waited_for_by_each_work_horse(
        self, crew: Crew, tmp_path: Path
    ) -> None:
        port = free_port()
        definition = crew.definition("rq-worker", executor_config={"callback_port": port})
        origin = f"http://127.0.0.1:{port}"
        log, release = tmp_path / "log", tmp_path / "release"
        with Redis.from_url(crew.url("rq-worker")) as client, _submitter(definition, 1, log, release):
            await until(lambda: deeds.notes(log), "its call runs")
            # Another work horse has noted it, and has waited long enough.
            noted = RqOutages(client)
            noted.known_for(origin)
            (name,) = client.keys("wove:outage:*")
            client.set(name, client.time()[0] - 400, ex=60)
        release.touch()
        # The work horse has five minutes for its outcome, as long as nobody has waited before.
        async with ExecutorRuntime({"fleet": crew.definition("rq-worker")}) as runtime:
            assert await runtime["fleet"].options(delivery_timeout=30).run(tasks.double, 21) == 42
        with Redis.from_url(crew.url("rq-worker")) as client:
            assert RqOutages(client).known_for(origin) > 300
            RqOutages(client).over(origin)
            assert not client.keys("wove:outage:*")


class _Killed(ManagedProcess):
    """A process that is killed in the end, and says no good-bye."""

    def stop(self, timeout: float = 0.0) -> None:
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
        super().stop(timeout)


def _submitter(definition: dict[str, Any], calls: int, log: Path, release: Path) -> ManagedProcess:
    arguments = [json.dumps(definition), str(calls), str(log), str(release)]
    return _Killed([sys.executable, "-c", SUBMITTER, *arguments], name="submitter", env=child_environment())


@pytest.mark.parametrize("name", ["celery-prefork", "rq-worker"])
async def test_row_26_a_result_over_the_limit_is_an_error_that_names_the_setting(
    name: str, started: Any
) -> None:
    handle = await started(name, executor_config={"callback_max_body": 1024 * 1024})
    with pytest.raises(EncodeError, match="callback_max_body"):
        await handle.run(tasks.long_text, 2 * 1024 * 1024)
    assert len(await handle.run(tasks.long_text, 900_000)) == 900_000


@pytest.mark.parametrize("name", EVERYWHERE)
async def test_row_27_a_body_that_is_cut_on_its_way_is_sent_again(
    name: str, started: Any, proxy: TcpProxy
) -> None:
    handle = await started(name)
    proxy.slicer(32 * 1024, 0.02, "request")
    call = asyncio.create_task(handle.run(tasks.long_text, 4_000_000))
    for _ in range(3):
        before = proxy.passed["request"]
        await until(lambda seen=before: proxy.passed["request"] > seen + 300_000, "a part of it has come")
        assert not call.done()
        proxy.cut()
    proxy.up()
    assert len(await call) == 4_000_000


async def test_row_34_hundreds_of_workers_report_at_the_same_moment() -> None:
    # Threads of this process, each with a connection of its own: a fleet whose tasks end together.
    threads = 300
    config = {"threads": threads}
    definition = {"executor": "memory", "executor_config": config, "delivery_timeout": 60}
    together = threading.Barrier(threads)
    Together.barrier = together
    async with ExecutorRuntime({"memory": definition}) as runtime:
        calls = [runtime["memory"].run(Together.end, number) for number in range(threads)]
        assert await asyncio.gather(*calls) == list(range(threads))


class Together:
    """Tasks of this process that end at the same moment."""

    barrier: ClassVar[threading.Barrier]

    @classmethod
    def end(cls, number: int) -> int:
        """Return when all are there."""
        cls.barrier.wait(60)
        return number


WEATHERS: dict[str, Callable[[TcpProxy], None]] = {
    "latency": lambda proxy: proxy.latency(0.1, 0.05),
    "slicer": lambda proxy: proxy.slicer(40),
    "reset": lambda proxy: proxy.reset(),
    "cut-after-commit": lambda proxy: proxy.cut_after_commit(),
    "cut-in-the-answer": lambda proxy: proxy.cut_after_commit(20),
    "black-hole-for-answers": lambda proxy: proxy.black_hole("response"),
}


@pytest.mark.parametrize("weather", WEATHERS)
async def test_row_40_whatever_the_network_does_each_call_has_its_outcome(
    weather: str, started: Any, proxy: TcpProxy, tmp_path: Path
) -> None:
    calls: list[Any] = []
    expected: list[Any] = []
    handles = [await started(name) for name in EVERYWHERE]
    assert await asyncio.gather(*(handle.run(tasks.double, 1) for handle in handles)) == [2, 2, 2]
    WEATHERS[weather](proxy)
    for handle in handles:
        calls += [handle.run(tasks.double, n) for n in range(6)]
        expected += [2 * n for n in range(6)]
        calls += [handle.run(tasks.echo, bytes(300_000)), handle.run(tasks.fail_custom)]
        expected += [bytes(300_000), "7: seven"]
    running = asyncio.gather(*calls, return_exceptions=True)
    lasts = weather in ("latency", "slicer")
    await asyncio.wait([asyncio.ensure_future(running)], timeout=30.0 if lasts else 1.5)
    proxy.up()
    results = [str(each) if isinstance(each, Exception) else each for each in await running]
    assert results == expected
    assert [len(handle._dispatcher.table) for handle in handles] == [0, 0, 0]


@pytest.mark.parametrize("name", EVERYWHERE)
async def test_row_40_an_idle_connection_that_was_dropped_costs_nobody_a_result(
    name: str, started: Any, proxy: TcpProxy, tmp_path: Path
) -> None:
    handle = await started(name)
    for number in range(5):
        begun = time.monotonic()
        assert await handle.run(tasks.double, number) == 2 * number
        assert time.monotonic() - begun < 5.0
        proxy.cut()
    job = Job(handle, tmp_path)
    await job.running()
    for _ in range(3):
        proxy.cut()
        await asyncio.wait([job.call], timeout=0.5)
    job.release()
    assert await job.call == "done"
    assert len(job.executions) == 1
