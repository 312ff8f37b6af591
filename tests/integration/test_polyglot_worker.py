"""examples/polyglot_worker: runs executed by a program that is not Python, from an RQ and from a Celery queue."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis
from wove_tests.waiting import until, until_states

from wove import DeliveryTimeoutError, EncodeError, EnvironmentExecutionError, ExecutorRuntime
from wove.demo.managed import ManagedProcess
from wove.errors import WorkerLostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove_tests.fleets import Fleets

pytestmark = [pytest.mark.node, pytest.mark.redis]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "polyglot_worker"

# A Redis database that no fleet of the contract tests uses.
DATABASE = 12


class NodeWorker(ManagedProcess):
    """``node worker.mjs``."""

    def __init__(self, backend: str, url: str, queue: str, env: dict[str, str] | None = None) -> None:
        super().__init__(
            ["node", str(EXAMPLE / "worker.mjs"), backend, url, queue], name=f"node-{backend}", env=env
        )

    def _is_ready(self) -> bool:
        return "listening on" in self.log_text()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module that names the worker's functions."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("jobs")
    sys.modules.pop("jobs", None)


@pytest.fixture(params=["rq", "celery"])
def backend(request: pytest.FixtureRequest) -> str:
    """Whose queue the runs go through."""
    name: str = request.param
    return name


@pytest.fixture
def url(fleets: Fleets) -> str:
    """The broker."""
    return fleets.redis_url(DATABASE)


@pytest.fixture
def environment(backend: str, url: str) -> Iterator[dict[str, Any]]:
    """The definition, as the example's README has it."""
    if backend == "celery":
        yield {
            "executor": "celery",
            "executor_config": {"broker_url": url, "queue": "node-celery", "pickle": False},
            "delivery_timeout": 30,
        }
        return
    from rq import Queue

    with Redis.from_url(url) as connection:
        queue = Queue("node-rq", connection=connection, serializer="json")
        yield {
            "executor": "rq",
            "executor_config": {"queue": queue, "pickle": False},
            "delivery_timeout": 30,
        }


async def test_calls_are_awaited(backend: str, url: str, environment: dict[str, Any], jobs: Any) -> None:
    with NodeWorker(backend, url, f"node-{backend}") as worker:
        async with ExecutorRuntime({"node": environment}) as runtime:
            node = runtime["node"]
            assert await node.run(jobs.word_count, "to be or not to be") == {
                "to": 2,
                "be": 2,
                "or": 1,
                "not": 1,
            }
            numbers = list(range(100_000))  # larger than what passes through the broker
            assert await node.run(jobs.sum_of_squares, numbers, scale=2) == 2 * sum(n * n for n in numbers)
            assert await node.run(jobs.word_count, "räder Räder") == {"räder": 2}
            with pytest.raises(EnvironmentExecutionError, match="division by zero, says Node") as caught:
                await node.run(jobs.divide, 1, 0)
            assert "RangeError" in str(caught.value)
            with pytest.raises(EnvironmentExecutionError, match="is not a function of this worker"):
                await node.run(importlib.import_module, "os")
        assert worker.running
    with Redis.from_url(url) as connection:
        left = [key for key in connection.keys() if not key.startswith((b"_kombu", b"rq:queues"))]
        assert left == []


async def test_a_cancelled_call_ends(backend: str, url: str, environment: dict[str, Any], jobs: Any) -> None:
    with NodeWorker(backend, url, f"node-{backend}"):
        async with ExecutorRuntime(
            {"node": {**environment, "delivery_cancel_mode": "require_ack"}}
        ) as runtime:
            node = runtime["node"]
            call = asyncio.ensure_future(node.run(jobs.nap, 25))
            await until_states(node, "started")
            call.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await call
            assert not getattr(caught.value, "__notes__", None), "it was acknowledged"
            assert await node.run(jobs.word_count, "still there") == {"still": 1, "there": 1}


async def test_a_killed_worker_is_noticed(
    backend: str, url: str, environment: dict[str, Any], jobs: Any
) -> None:
    with NodeWorker(backend, url, f"node-{backend}") as worker:
        async with ExecutorRuntime({"node": {**environment, "delivery_heartbeat_seconds": 6}}) as runtime:
            node = runtime["node"]
            call = asyncio.ensure_future(node.run(jobs.nap, 25))
            await until_states(node, "started")
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerLostError):
                await call


async def test_what_is_not_plain_is_refused_before_it_is_sent(
    backend: str, url: str, environment: dict[str, Any], jobs: Any
) -> None:
    async with ExecutorRuntime({"node": environment}) as runtime:
        node = runtime["node"]
        with pytest.raises(
            EncodeError, match=r"argument 0: \[1\]\['path'\] is of type pathlib\.\w*Path.*pickle"
        ):
            await node.run(jobs.word_count, ["x", {"path": EXAMPLE}])
        with pytest.raises(EncodeError, match=r"scale: it is of type .*complex"):
            await node.run(jobs.sum_of_squares, [1], scale=1j)
        with pytest.raises(EncodeError, match="functions go by name only"):
            await node.run(lambda: 1)
    with Redis.from_url(url) as connection:
        assert not connection.llen(f"rq:queue:node-{backend}")
        assert not connection.llen(f"node-{backend}")


async def test_strangers_payloads_are_not_run(
    backend: str, url: str, environment: dict[str, Any], jobs: Any
) -> None:
    with NodeWorker(
        backend, url, f"node-{backend}", {"WOVE_SECRET": "another-secret-of-some-length"}
    ) as worker:
        async with ExecutorRuntime({"node": {**environment, "delivery_start_timeout": 3}}) as runtime:
            with pytest.raises(DeliveryTimeoutError, match="delivery_start_timeout"):
                await runtime["node"].run(jobs.word_count, "text")
        await until(
            lambda: "signed with a secret that this worker does not have" in worker.log_text(), "it says so"
        )
