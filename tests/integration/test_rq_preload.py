"""What an RQ worker has imported before it forks, by itself and with ``rq worker -c wove.worker.rq_preload``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis
from rq import Queue
from wove_tests import tasks
from wove_tests.callbacks import child_environment

from wove import ExecutorRuntime, WorkerLostError
from wove.demo.processes import RqWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove_tests.fleets import Fleets

DATABASE = 13
QUEUE = "preloaded"

#: What the parent of a worker is left with.
SCRIPT = """
import json, logging, os, sys, threading
import redis.utils
import rq.cli
logging.basicConfig(level=logging.INFO)
from rq.cli.helpers import read_config_file
settings = read_config_file("wove.worker.rq_preload")
from wove.worker import connection, courier
from wove.worker.rehearsal import rehearse
sockets = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
print(json.dumps({
    "settings": sorted(settings),
    "threads": [thread.name for thread in threading.enumerate()],
    "known": [len(kept) for kept in (connection.clock_offsets, connection.withdrawals, connection.down_since)],
    "couriers": len(courier._couriers),
    "sockets": [name for name in sockets if name.startswith("socket:")],
    "loaded": sorted({"cloudpickle", "wove.worker.batch", "wove.worker.beats"} & set(sys.modules)),
    "rehearses": rehearse(),
    # By now it need not be looked up.
    "redis": vars(redis.utils).pop("metadata") and redis.utils.get_lib_version(),
}))
"""


def prepared(**variables: str) -> tuple[dict[str, Any], str]:
    """Return what a process looks like that has imported the module, and what it has logged."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT],
        env={**os.environ, "WOVE_SECRET": "a-secret-of-this-test-" + "s" * 20, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done.stderr


def test_nothing_of_the_rehearsal_stays() -> None:
    found, log = prepared()
    assert found == {
        "settings": [],
        "threads": ["MainThread"],
        "known": [0, 0, 0],
        "couriers": 0,
        "sockets": [],
        "loaded": ["cloudpickle", "wove.worker.batch", "wove.worker.beats"],
        "rehearses": True,
        "redis": version("redis"),
    }
    assert log == ""


@pytest.mark.parametrize(
    "setting",
    [
        {"WOVE_ALLOW": "myapp.tasks:*"},
        {"WOVE_CALLBACK_ALLOW": "https://reports.example:8443"},
        {"WOVE_ENVIRONMENTS": "reports"},
        {"WOVE_PROXY": "http://127.0.0.1:1"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_worker_whose_settings_would_refuse_it_leaves_it_out(setting: dict[str, str]) -> None:
    found, log = prepared(**setting)
    assert found["rehearses"] is False
    assert found["threads"] == ["MainThread"]
    assert "refused" not in log
    assert "rejected" not in log


def test_without_a_secret_it_says_so_and_goes_on() -> None:
    found, log = prepared(WOVE_SECRET="short")
    assert found["rehearses"] is False
    assert "WOVE_SECRET" in log


@pytest.fixture(scope="module")
def worker(fleets: Fleets) -> Iterator[str]:
    """A worker that has imported it; the URL of its Redis."""
    url = fleets.redis_url(DATABASE)
    with RqWorker(url, queues=[QUEUE], env=child_environment(), extra_args=["-c", "wove.worker.rq_preload"]):
        yield url


@pytest.mark.redis
async def test_its_work_horses_do_what_others_do(worker: str) -> None:
    config = {"redis_url": worker, "queue_name": QUEUE}
    definition = {"executor": "rq", "executor_config": config, "delivery_timeout": 60}
    async with ExecutorRuntime({"rq": definition}) as runtime:
        fleet = runtime["rq"]
        assert await asyncio.gather(*(fleet.run(tasks.double, n) for n in range(5))) == [0, 2, 4, 6, 8]
        assert await fleet.run(lambda number: -number, 3) == -3
        assert [result async for result in fleet.map(tasks.double, range(20))] == [2 * n for n in range(20)]
        with pytest.raises(ZeroDivisionError):
            await fleet.run(divmod, 1, 0)
        with pytest.raises(WorkerLostError):
            await fleet.run(os._exit, 3)
        assert await fleet.run(tasks.double, 4) == 8


@pytest.mark.redis
@pytest.mark.parametrize(("serializer", "forks_with"), [(None, "Wove"), ("json", "RQ alone")])
async def test_every_worker_has_imported_it_with_the_first_job(
    fleets: Fleets, serializer: str | None, forks_with: str
) -> None:
    url, name = fleets.redis_url(DATABASE), f"{QUEUE}-{serializer}"
    with (
        RqWorker(
            url,
            queues=[name],
            worker_class="wove_tests.watched_worker.WatchedWorker",
            serializer=serializer,
            env=child_environment(),
        ) as plain,
        closing(Redis.from_url(url)) as client,
    ):
        queue = Queue(name, connection=client, serializer=serializer)
        definition = {"executor": "rq", "executor_config": {"queue": queue}, "delivery_timeout": 60}
        async with ExecutorRuntime({"rq": definition}) as runtime:
            assert await asyncio.gather(*(runtime["rq"].run(tasks.double, n) for n in range(3))) == [0, 2, 4]
        assert plain.log_text().count(f"it forks with {forks_with}") == 3
