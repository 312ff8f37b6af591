"""What somebody meets who has a project folder, a fleet, and the README."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import tasks
from wove_tests.fleets import SUPPORT
from wove_tests.waiting import until

from wove import DeliveryTimeoutError, ExecutorRuntime
from wove.demo.processes import CeleryWorker, RedisServer

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = """
import os
from celery import Celery
app = Celery("acme", broker=os.environ["ACME_BROKER"])
app.conf.broker_connection_retry_on_startup = True
"""
WORK = """
def square(number):
    return number * number
"""
MANY = """
import asyncio, sys
from wove import ExecutorRuntime

async def main():
    names = [f"e{n}" for n in range(6)]
    config = {"executor": "celery", "executor_config": {"broker_url": sys.argv[1]}}
    async with ExecutorRuntime({name: config for name in names}):
        pass

asyncio.run(main())
"""


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


@pytest.mark.redis
async def test_several_celery_environments_start_together_in_a_new_process(redis_server: RedisServer) -> None:
    for _ in range(6):
        result = await asyncio.to_thread(run_python, "-c", MANY, redis_server.url)
        assert result.returncode == 0, result.stderr


@pytest.mark.redis
class TestProjectFolder:
    """Modules lie side by side in a folder that is on nobody's PYTHONPATH."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        (tmp_path / "acme_celery.py").write_text(PROJECT)
        (tmp_path / "acme_work.py").write_text(WORK)
        return tmp_path

    async def test_workers_and_doctor_find_them_as_celery_does(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with RedisServer() as redis:
            environment = {"ACME_BROKER": redis.url}
            with CeleryWorker(redis.url, app="acme_celery:app", cwd=project, env=environment):
                monkeypatch.syspath_prepend(str(project))
                import acme_work

                config = {"broker_url": redis.url}
                definition = {"executor": "celery", "executor_config": config, "delivery_timeout": 30}
                async with ExecutorRuntime({"acme": definition}) as runtime:
                    assert await runtime["acme"].run(acme_work.square, 3) == 9
                result = await asyncio.to_thread(
                    run_python,
                    *("-m", "wove", "doctor", "--app", "acme_celery:app"),
                    cwd=project,
                    env={**os.environ, **environment},
                )
                assert result.returncode == 0, result.stdout + result.stderr
                assert "came back" in result.stdout

    def test_an_app_that_cannot_be_imported_is_said_to_be_that(self, project: Path) -> None:
        result = run_python("-m", "wove", "doctor", "--app", "acme_cellery:app", cwd=project)
        assert result.returncode == 1
        assert "cannot find the Celery app 'acme_cellery:app'" in result.stdout
        assert "mend: run it in the project's folder" in result.stdout


@pytest.mark.redis
async def test_work_whose_caller_gave_up_and_left_is_not_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Deadlines count from when they are over; the worker allows for clocks that differ a little.
    never, later = tmp_path / "never", tmp_path / "later"
    with RedisServer() as redis:
        config = {"broker_url": redis.url}
        async with ExecutorRuntime({"fleet": {"executor": "celery", "executor_config": config}}) as runtime:
            with pytest.raises(DeliveryTimeoutError, match="wove doctor"):
                await runtime["fleet"].options(delivery_timeout=1).run(tasks.touch, str(never))
            # The worker's tolerance, by a worker whose clock is ahead of ours.
            environment = {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{tmp_path}"}
        (tmp_path / "sitecustomize.py").write_text(
            "import time\nreal = time.time\ntime.time = lambda: real() + 60\n"
        )
        with CeleryWorker(redis.url, env=environment, pool="threads") as worker:
            async with ExecutorRuntime(
                {"fleet": {"executor": "celery", "executor_config": config, "delivery_timeout": 30}}
            ) as runtime:
                # Behind the stale one in the queue, and on a clock that is wrong by a minute.
                await runtime["fleet"].run(tasks.touch, str(later))
            await until(lambda: "its deadline is over" in worker.log_text(), "it was looked at")
        assert later.exists()
        assert not never.exists()


async def test_a_runtime_in_this_process_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())  # clients of gRPC share a loop that stays
    for _ in range(5):
        async with ExecutorRuntime({"memory": {"executor": "memory", "delivery_timeout": 30}}) as runtime:
            assert await runtime["memory"].run(tasks.double, 21) == 42
    await until(
        lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("wove-")],
        "all its threads have ended",
        patience=5,
    )


async def test_a_handle_of_another_event_loop_is_named_as_such() -> None:
    async with ExecutorRuntime({"here": {}}) as runtime:
        handle = runtime["here"]

        def elsewhere() -> None:
            asyncio.run(handle.run(tasks.double, 1))

        with pytest.raises(RuntimeError, match="started in another event loop"):
            await asyncio.to_thread(elsewhere)
