"""The stdio executor's processes: what they print, how they die, how they are replaced."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import tasks
from wove_tests.chaos.vitals import own_time
from wove_tests.waiting import until, until_exists, until_states

from wove import ConfigurationError, ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove.handle import EnvironmentHandle


def stdio(**config: Any) -> dict[str, Any]:
    """A definition."""
    return {"executor": "stdio", "executor_config": config}


@pytest.fixture
async def handle() -> AsyncIterator[EnvironmentHandle]:
    """An environment of one process."""
    async with ExecutorRuntime({"here": stdio()}) as runtime:
        yield runtime["here"]


class TestOutput:
    """Tasks may print what they like."""

    async def test_whatever_is_written_arrives_as_log(self, handle: EnvironmentHandle) -> None:
        seen: list[Any] = []
        assert await handle.options(on_progress=seen.append).run(tasks.say_everything) == "nobody there"
        lines = [line for frame in seen for line in frame["message"].split("\n")]
        assert {frame["type"] for frame in seen} == {"log"}
        assert sorted(lines) == sorted(
            ["from print", "to stderr", "from write(2)", "from a child process", "from C", "name? "]
        )

    async def test_runs_side_by_side_are_told_apart(self, handle: EnvironmentHandle) -> None:
        logs: dict[int, list[str]] = {number: [] for number in range(10)}

        async def run(number: int) -> None:
            watched = handle.options(on_progress=lambda frame: logs[number].append(frame["message"]))
            await watched.run(print, f"I am {number}")

        await asyncio.gather(*map(run, logs))
        assert logs == {number: [f"I am {number}"] for number in range(10)}

    async def test_megabytes_harm_nothing(self, handle: EnvironmentHandle) -> None:
        size = 5_000_000
        seen: list[int] = []
        watched = handle.options(on_progress=lambda frame: seen.append(len(frame["message"])))
        assert await watched.run(tasks.flood, size) == size
        assert sum(seen) > size
        assert max(seen) <= 8_000
        assert await handle.run(tasks.double, 2) == 4

    async def test_a_result_that_looks_like_a_frame_or_has_no_newline(
        self, handle: EnvironmentHandle
    ) -> None:
        for value in ('{"type": "task_result"}', "x" * 200_000, "\n\r\0" * 1_000):
            assert await handle.run(tasks.echo, value) == value


class TestDeath:
    """A process that ends takes its own runs along."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
    async def test_by_a_signal(self, handle: EnvironmentHandle, number: signal.Signals) -> None:
        before = await handle.run(os.getpid)
        begun = time.monotonic()
        with pytest.raises(WorkerLostError, match=f"worker process {before} .*was killed by {number.name}"):
            await handle.run(tasks.kill_own_process, int(number))
        assert time.monotonic() - begun < 5
        assert await handle.run(os.getpid) != before

    async def test_other_processes_go_on(self, tmp_path: Path) -> None:
        async with ExecutorRuntime({"here": stdio(processes=2)}) as runtime:
            handle = runtime["here"]
            started, release = tmp_path / "started", tmp_path / "release"
            waiting = asyncio.ensure_future(handle.run(tasks.touch_and_wait, str(started), str(release)))
            await until_exists(started)
            with pytest.raises(WorkerLostError):
                await handle.run(tasks.die)
            release.touch()
            assert await waiting == "released"

    async def test_the_last_result_before_the_end_counts(self) -> None:
        async with ExecutorRuntime({"here": stdio(max_tasks_per_process=1)}) as runtime:
            handle = runtime["here"]
            pids = [await handle.run(os.getpid) for _ in range(3)]
            assert len(set(pids)) == 3
            assert await asyncio.gather(*(handle.run(tasks.double, n) for n in range(6))) == [
                0,
                2,
                4,
                6,
                8,
                10,
            ]

    async def test_an_idle_process_is_ended_and_started_again(self) -> None:
        async with ExecutorRuntime({"here": stdio(idle_seconds=0.2)}) as runtime:
            pid = await runtime["here"].run(os.getpid)
            await until(lambda: not _exists(pid), "the idle process has ended")
            assert await runtime["here"].run(os.getpid) != pid

    async def test_nothing_is_left_when_the_environment_stops(self) -> None:
        async with ExecutorRuntime({"here": stdio(processes=2)}) as runtime:
            handle = runtime["here"]
            pids = {*await asyncio.gather(*(handle.run(tasks.pid_and_sleep, 0.2) for _ in range(8)))}
            hanging = asyncio.ensure_future(handle.run(tasks.pid_and_sleep, tasks.PATIENCE))
            await until_states(handle, "started")
        assert len(pids) == 2
        assert hanging.cancelled()
        assert not any(map(_exists, pids))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestIndependence:
    """What one task does to its thread or its loop, others do not feel."""

    async def test_beats_and_cancellations_pass_a_coroutine_that_blocks_its_loop(
        self, handle: EnvironmentHandle, tmp_path: Path
    ) -> None:
        strict = handle.options(delivery_heartbeat_seconds=0.6, delivery_cancel_mode="require_ack")
        started, release = tmp_path / "started", tmp_path / "release"
        blocking = asyncio.ensure_future(strict.run(tasks.block_the_loop, str(started), str(release)))
        await until_exists(started)
        since = time.monotonic()
        begun, seen = tmp_path / "begun", tmp_path / "seen"
        sync = asyncio.ensure_future(strict.run(tasks.until_cancelled, str(begun), str(seen)))
        await until_exists(begun)
        sync.cancel()
        await asyncio.wait((sync,))
        assert seen.exists()
        await until(lambda: time.monotonic() - since > 1.5, "more than two heartbeats have passed")
        release.touch()
        assert await blocking == "released"

    async def test_synchronous_tasks_run_side_by_side(
        self, handle: EnvironmentHandle, tmp_path: Path
    ) -> None:
        release = tmp_path / "release"
        calls = [
            asyncio.ensure_future(handle.run(tasks.touch_and_wait, str(tmp_path / f"s{n}"), str(release)))
            for n in range(10)
        ]
        for number in range(10):
            await until_exists(tmp_path / f"s{number}")
        release.touch()
        assert await asyncio.gather(*calls) == ["released"] * 10

    async def test_the_callers_loop_stays_free_while_much_is_sent(self, handle: EnvironmentHandle) -> None:
        stalls: list[float] = []
        done = False

        async def watch() -> None:
            while not done:
                begun = own_time()
                await asyncio.sleep(0.005)
                stalls.append(own_time() - begun)

        watching = asyncio.ensure_future(watch())
        assert await handle.run(len, bytes(64_000_000)) == 64_000_000
        assert len(await handle.run(tasks.large, 64_000_000)) == 64_000_000
        done = True
        await watching
        assert sorted(stalls)[-2] < 0.25, max(stalls)  # generous: the machine may be busy with others


class TestSettings:
    """What cannot work fails in ``start``, with the mend."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"command": "no-such-program --flag"}, "'no-such-program' cannot be run"),
            ({"command": []}, "program with its arguments"),
            ({"command": "'unbalanced"}, "cannot be split"),
            (
                {"command": [sys.executable, "-c", "print('not a worker')"]},
                "exited with 0 before it was ready",
            ),
            (
                {"command": [sys.executable, "-c", "import sys; sys.exit('no such module')"]},
                "(?s)exited with 1 before it was ready; its last words:\nno such module",
            ),
            ({"processes": 0}, r'executor_config\["processes"\] is a whole number from 1; got 0'),
            ({"proceses": 2}, "unknown executor_config key 'proceses'; did you mean 'processes'"),
            ({"threads": "many"}, r'executor_config\["threads"\]'),
            ({"idle_seconds": -1}, r'executor_config\["idle_seconds"\] is a number of seconds above 0'),
            ({"env": {"A": 1}}, r'executor_config\["env"\] is a mapping of strings'),
            ({"cwd": "/no/such/folder"}, r'executor_config\["cwd"\] is a folder'),
            ({"command": "python", "threads": 2}, "put --threads into"),
        ],
    )
    async def test_bad_ones(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            await ExecutorRuntime({"here": stdio(**config)}).start()

    async def test_a_worker_that_is_started_by_hand_says_so(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "wove.worker.stdio", stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()
        assert process.returncode == 2
        assert b"started by its executor, not by hand" in said

    async def test_a_command_of_ones_own_environment_and_folder(self, tmp_path: Path) -> None:
        command = f"{sys.executable} -W error -m wove.worker.stdio --threads 2"
        config = stdio(command=command, env={"MY_SETTING": "42"}, cwd=str(tmp_path))
        async with ExecutorRuntime({"here": config}) as runtime:
            assert await runtime["here"].run(os.getenv, "MY_SETTING") == "42"
            assert await runtime["here"].run(os.getcwd) == str(tmp_path)
            assert await runtime["here"].run(os.getenv, "WOVE_STDIO_FD") is None

    async def test_no_pickles_with_a_list(self, caplog: pytest.LogCaptureFixture) -> None:
        command = [
            sys.executable,
            "-m",
            "wove.worker.stdio",
            "--allow",
            "wove_tests.tasks:d*",
            "--allow",
            "math:sqrt",
        ]
        path = os.pathsep.join(sys.path)
        caplog.set_level(logging.DEBUG)
        async with ExecutorRuntime({"here": stdio(command=command, env={"PYTHONPATH": path})}) as runtime:
            handle = runtime["here"]
            assert await handle.run(tasks.double, 4) == 8
            assert await handle.run(tasks.double, (1, {2: "x"}.keys().__len__())) == (1, 1, 1, 1)
            from math import sqrt

            assert await handle.run(sqrt, 9) == 3.0
            for refused in (os.getpid, tasks.touch, lambda: 1):
                with pytest.raises(Exception, match=r"not allowed|by name only") as caught:
                    await handle.run(refused)
                assert "PayloadRejectedError" in repr(caught.value)
            with pytest.raises(Exception, match="plain data only"):
                await handle.run(tasks.double, tasks.Point(1, 2))
