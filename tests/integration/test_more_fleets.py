"""Fleets and configurations beside those of the contract: serializers, apps, RQ's other workers."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from wove_tests import tasks
from wove_tests.fleets import SUPPORT, fleet_params
from wove_tests.waiting import until_exists

from wove import ExecutorRuntime
from wove.demo.processes import CeleryWorker, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.handle import EnvironmentHandle


async def does_its_work(handle: EnvironmentHandle) -> None:
    """Results, coroutines, values and errors cross the fleet."""
    assert await handle.run(tasks.double, 21) == 42
    assert await handle.run(tasks.double_async, 21) == 42
    assert await handle.run(lambda value: (value, {2**100}), b"\x00") == (b"\x00", {2**100})
    assert await handle.run(os.getpid) != os.getpid()
    with pytest.raises(tasks.TwoArguments, match="seven"):
        await handle.run(tasks.fail_custom)


@pytest.mark.parametrize("fleet", fleet_params("rq-spawn", "rq-json"))
async def test_rq_spawn_worker_and_json_queue(fleet: str, fleets: Fleets, tmp_path: Path) -> None:
    async with ExecutorRuntime({"fleet": fleets.executor_definition(fleet)}) as runtime:
        handle = runtime["fleet"]
        await does_its_work(handle)
        started, seen = tmp_path / "started", tmp_path / "seen"
        call = asyncio.create_task(handle.run(tasks.until_cancelled, str(started), str(seen)))
        await until_exists(started)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until_exists(seen)


@pytest.mark.redis
class TestCeleryApps:
    """The fleet's own app decides how messages are written."""

    @pytest.fixture
    def worker(self, fleets: Fleets, request: pytest.FixtureRequest) -> Any:
        serializer = getattr(request, "param", "json")
        url = f"redis://127.0.0.1:{fleets.redis().port}/9"
        environment = {"PYTHONPATH": str(SUPPORT), "WOVE_TESTS_SERIALIZER": serializer, "C_FORCE_ROOT": "1"}
        with CeleryWorker(url, app="wove_tests.celery_project:app", env=environment) as running:
            yield url, serializer, running

    @pytest.mark.parametrize("worker", ["json", "msgpack", "pickle"], indirect=True)
    async def test_an_app_object_with_any_serializer(self, worker: Any) -> None:
        url, serializer, _ = worker
        app = Celery("project", broker=url, set_as_current=False)
        app.conf.update(task_serializer=serializer, accept_content=[serializer])
        definition = {"executor": "celery", "executor_config": {"app": app}, "delivery_timeout": 30}
        async with ExecutorRuntime({"fleet": definition}) as runtime:
            await does_its_work(runtime["fleet"])
        # A user's app is used and never closed.
        with app.connection_for_write() as connection:
            assert connection.ensure_connection(max_retries=1)

    async def test_an_app_by_its_name(self, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        url, _, _ = worker
        monkeypatch.setenv("WOVE_TESTS_BROKER_URL", url)
        config = {"app": "wove_tests.celery_project:make_app()"}
        with pytest.raises(Exception, match=r"make_app\(\)"):
            await ExecutorRuntime({"fleet": {"executor": "celery", "executor_config": config}}).start()
        config = {"app": "wove_tests.celery_project:app_from_environment"}
        definition = {"executor": "celery", "executor_config": config, "delivery_timeout": 30}
        async with ExecutorRuntime({"fleet": definition}) as runtime:
            await does_its_work(runtime["fleet"])

    async def test_a_broker_url_of_the_environment_leads_nowhere_else(
        self, worker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url, _, _ = worker
        for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
            monkeypatch.setenv(name, f"redis://127.0.0.1:{free_port()}/0")
        definition = {"executor": "celery", "executor_config": {"broker_url": url}, "delivery_timeout": 30}
        async with ExecutorRuntime({"fleet": definition}) as runtime:
            assert await runtime["fleet"].run(tasks.double, 21) == 42
