"""P17: a worker whose wall clock is an hour wrong, or is set while it works, does what it would do otherwise."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import deeds, tasks
from wove_tests.services import SUPPORT
from wove_tests.waiting import until

from wove import ExecutorRuntime
from wove.demo.processes import CeleryWorker, RqWorker
from wove.errors import PayloadRejectedError

if TYPE_CHECKING:
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.demo.managed import ManagedProcess

pytestmark = pytest.mark.redis

# Redis databases that no fleet of the contract tests uses.
DATABASES = {"celery": 8, "rq": 9}
HOUR = 3600
BACKENDS = pytest.mark.parametrize("backend", ["celery", "rq"])


class Skewed:
    """A worker, and the clock that it goes by."""

    def __init__(self, backend: str, fleets: Fleets, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0)
        url = fleets.redis_url(DATABASES[backend])
        path = os.pathsep.join([str(SUPPORT / "skewed"), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": path.rstrip(os.pathsep), "WOVE_TESTS_CLOCK": str(self._file)}
        self.process: ManagedProcess
        if backend == "celery":
            self.process = CeleryWorker(url, queue="skewed", concurrency=1, env=env)
            place: dict[str, Any] = {"broker_url": url, "queue": "skewed"}
        else:
            self.process = RqWorker(url, queues=["skewed"], env=env)
            options = {"failure_ttl": 1}
            place = {"redis_url": url, "queue_name": "skewed", "enqueue_options": options}
        self.definition = {"executor": backend, "executor_config": place, "delivery_timeout": 60}

    def set(self, seconds: float) -> None:
        """Put the clock wrong by so many seconds from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._file)

    def expiring(self, seconds: float) -> dict[str, Any]:
        """Return the environment's definition with ``payload_expires``."""
        config = {**self.definition["executor_config"], "payload_expires": seconds}
        return {**self.definition, "executor_config": config}


@pytest.fixture
def skewed(backend: str, fleets: Fleets, tmp_path: Path) -> Skewed:
    return Skewed(backend, fleets, tmp_path)


@BACKENDS
@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_nothing_is_lost_or_refused(skewed: Skewed, seconds: int, tmp_path: Path) -> None:
    skewed.set(seconds)
    async with ExecutorRuntime({"plain": skewed.definition, "expiring": skewed.expiring(60)}) as runtime:
        # Some wait for longer than a moment, as there is no worker yet.
        calls = [
            asyncio.ensure_future(runtime[name].run(tasks.double, n))
            for name in ("plain", "expiring")
            for n in range(4)
        ]
        with skewed.process as worker:
            assert await asyncio.gather(*calls) == [0, 2, 4, 6] * 2
            assert abs(await runtime["plain"].run(time.time) - time.time() - seconds) < 60, "it is so"
            # It is set while one runs, and another one waits.
            log, release = tmp_path / "log", tmp_path / "release"
            running = asyncio.ensure_future(runtime["plain"].run(deeds.hold, str(log), str(release)))
            await until(lambda: deeds.notes(log), "it runs")
            waiting = [
                asyncio.ensure_future(runtime[name].run(tasks.double, 4)) for name in ("plain", "expiring")
            ]
            await asyncio.sleep(0.2)
            skewed.set(-seconds)
            release.touch()
            assert await running == "done"
            assert await asyncio.gather(*waiting) == [8, 8]
            # And while it is idle, so that nobody has told it since.
            for again in (seconds, -seconds, 0, seconds):
                skewed.set(again)
                for name in ("plain", "expiring"):
                    assert await runtime[name].options(delivery_timeout=20).run(tasks.double, 5) == 10
            assert len(deeds.notes(log)) == 1, "nothing ran twice"
        for words in ("rejected", "skipped", "not started", "expired"):
            assert words not in worker.log_text()


@BACKENDS
async def test_a_payload_expires_by_its_submitters_clock(
    skewed: Skewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker's clock makes it look fresh.
    skewed.set(-HOUR)
    async with ExecutorRuntime({"expiring": skewed.expiring(60)}) as runtime:
        call = asyncio.ensure_future(runtime["expiring"].run(tasks.double, 1))
        await asyncio.sleep(0.2)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 100)  # which are over before a worker comes
        with skewed.process:
            with pytest.raises(PayloadRejectedError, match=r"it has expired: it was signed 1\d\d s ago"):
                await call
