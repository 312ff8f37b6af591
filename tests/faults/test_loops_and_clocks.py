"""Event loops stand still, processes are stopped, clocks are wrong. Rows 22, 23 and 25 of the fault matrix."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import deeds, tasks
from wove_tests.callbacks import child_environment
from wove_tests.crew import POSTS, Crew, Job
from wove_tests.fleets import SUPPORT
from wove_tests.resources import find_compiler
from wove_tests.waiting import until

from wove import ExecutorRuntime
from wove.demo.processes import ManagedProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.redis

EVERYWHERE = ["celery-prefork", "celery-threads", "rq-worker"]
STRICT = {"delivery_heartbeat_seconds": 1.5}


def definitions(crew: Crew, **changes: Any) -> dict[str, Any]:
    return {name: crew.definition(name, **changes) for name in EVERYWHERE}


@pytest.mark.parametrize(
    ("func", "result"),
    [(deeds.block_the_loop, "blocked"), (deeds.keep_busy, "computed"), (deeds.sleep, "slept")],
    ids=["a-loop-that-is-held", "computing", "waiting"],
)
async def test_row_22_a_task_that_lets_nobody_else_work_is_not_lost(
    func: Any, result: str, crew: Crew
) -> None:
    async with ExecutorRuntime(definitions(crew, **STRICT)) as runtime:
        calls = [runtime[name].run(func, 4.0) for name in EVERYWHERE]
        # Beside it, in the threads of the same process and on other ones.
        calls += [runtime["celery-threads"].run(func, 4.0) for _ in range(2)]
        assert await asyncio.gather(*calls) == [result] * 5


async def test_row_23_a_submitter_whose_loop_is_held_loses_nothing(crew: Crew, tmp_path: Path) -> None:
    async with ExecutorRuntime(definitions(crew, **STRICT, delivery_timeout=4.0)) as runtime:
        jobs = [Job(runtime[name], tmp_path, name) for name in EVERYWHERE]
        short = []
        for job in jobs:
            await job.running()
        for name in EVERYWHERE:
            short += [asyncio.create_task(runtime[name].run(tasks.double, n)) for n in range(4)]
        await asyncio.sleep(0)
        for job in jobs:
            job.release()
        time.sleep(5.0)  # the application holds its loop beyond every deadline
        assert await asyncio.gather(*(job.call for job in jobs)) == ["done"] * 3
        # These were not even submitted when the time had come: whatever they are told, they are told something.
        ended = await asyncio.gather(*short, return_exceptions=True)
        assert all(each in (0, 2, 4, 6) or isinstance(each, TimeoutError) for each in ended)
        for name in EVERYWHERE:
            assert await runtime[name].run(tasks.double, 21) == 42


async def test_row_23_a_running_task_outlives_a_held_loop(crew: Crew, tmp_path: Path) -> None:
    async with ExecutorRuntime(definitions(crew, **STRICT)) as runtime:
        jobs = [Job(runtime[name], tmp_path, name) for name in EVERYWHERE]
        for job in jobs:
            await job.running()
        time.sleep(4.0)  # nobody reads the heartbeats meanwhile
        await asyncio.wait([job.call for job in jobs], timeout=1.0)
        for job in jobs:
            job.release()
        assert await asyncio.gather(*(job.call for job in jobs)) == ["done"] * 3
        assert [len(job.executions) for job in jobs] == [1, 1, 1]


#: A submitter that is stopped for a while: it runs one call on each of the environments given as JSON.
SUBMITTER = """
import asyncio, json, sys
from wove import ExecutorRuntime
from wove_tests import deeds

async def main():
    folder = sys.argv[2]
    async with ExecutorRuntime(json.loads(sys.argv[1])) as runtime:
        calls = {
            name: runtime[name].run(deeds.hold, f"{folder}/{name}.log", f"{folder}/{name}.release")
            for name in json.loads(sys.argv[1])
        }
        ended = await asyncio.gather(*calls.values(), return_exceptions=True)
        print("ended", dict(zip(calls, map(repr, ended))), flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("ends", ["meanwhile", "after"])
async def test_row_25_a_submitter_that_was_stopped_raises_no_false_alarm(
    ends: str, crew: Crew, tmp_path: Path
) -> None:
    arguments = [json.dumps(definitions(crew, **STRICT)), str(tmp_path)]
    command = [sys.executable, "-W", "error", "-c", SUBMITTER, *arguments]
    with ManagedProcess(command, name="submitter", env=child_environment()) as submitter:
        for name in EVERYWHERE:
            await until(lambda log=tmp_path / f"{name}.log": deeds.notes(log), f"{name} runs")
        # Long enough for the first beats, by which it knows that they run.
        await asyncio.to_thread(_stand_still, submitter.pid, 1.0, signal.SIGCONT)
        os.kill(submitter.pid, signal.SIGSTOP)
        try:
            if ends == "meanwhile":
                _release(tmp_path)
            await asyncio.sleep(4.0)  # beyond every heartbeat: the submitter's time goes on without it
        finally:
            os.kill(submitter.pid, signal.SIGCONT)
        if ends == "after":
            await asyncio.to_thread(_stand_still, submitter.pid, 1.0, signal.SIGCONT)
            assert "ended" not in submitter.log_text()
            _release(tmp_path)
        await asyncio.to_thread(submitter.wait_for_log, "ended")
        assert submitter.log_text().count("'done'") == 3, submitter.log_text()


def _stand_still(pid: int, seconds: float, then: int) -> None:
    time.sleep(seconds)
    os.kill(pid, then)


def _release(folder: Path) -> None:
    for name in EVERYWHERE:
        (folder / f"{name}.release").touch()


class WorkersClock:
    """The clock of the workers of a crew."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "skew"
        self.set(0)
        library = folder / "clock_skew.so"
        source = SUPPORT / "wove_tests" / "clock_skew.c"
        compiler = find_compiler()
        assert compiler is not None  # wove_tests.resources has seen to it
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_SKEW_FILE": str(self._file)}

    def set(self, seconds: int) -> None:
        """Put it wrong by so many seconds, at once."""
        if not self._file.exists():
            self._file.write_bytes(bytes(8))
        with open(self._file, "r+b") as file:
            file.write(struct.pack("q", seconds))


@pytest.fixture(scope="module")
def workers_clock(tmp_path_factory: pytest.TempPathFactory) -> WorkersClock:
    return WorkersClock(tmp_path_factory.mktemp("skew"))


@pytest.fixture(scope="module")
def skewed(workers_clock: WorkersClock, _no_process_left: None) -> Iterator[Crew]:
    """Workers whose wall clock is not this process's; their broker's is."""
    posts = {name: replace(POSTS[name], env=workers_clock.env) for name in ("celery-prefork", "rq-worker")}
    with Crew(posts) as running:
        yield running


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_row_25_clocks_that_are_an_hour_apart_change_nothing(
    seconds: int, workers_clock: WorkersClock, skewed: Crew, tmp_path: Path
) -> None:
    workers_clock.set(seconds)
    names = ["celery-prefork", "rq-worker"]
    both = {name: skewed.definition(name, delivery_timeout=30, **STRICT) for name in names}
    async with ExecutorRuntime(both) as runtime:
        for name in names:
            assert abs(await runtime[name].run(time.time) - time.time() - seconds) < 60, "it is so"
            assert await asyncio.gather(*(runtime[name].run(tasks.double, n) for n in range(20))) == [
                2 * n for n in range(20)
            ]
        # Queued for longer than a moment, and running while the clock jumps back.
        jobs = [Job(runtime[name], tmp_path, f"{name}-{n}") for name in names for n in range(3)]
        for name in names:
            await until(lambda log=tmp_path / f"{name}-0.log": deeds.notes(log), "one runs, others wait")
        workers_clock.set(-seconds)
        await asyncio.wait([job.call for job in jobs], timeout=2.5)
        assert not [job.call for job in jobs if job.call.done()]
        for job in jobs:
            job.release()
        assert await asyncio.gather(*(job.call for job in jobs)) == ["done"] * 6
        assert [len(job.executions) for job in jobs] == [1] * 6
