"""``make kills``: how soon a caller learns that the worker of its task was killed, and whether it ever learns it wrongly.

KILLS (20) kills of each kind, CHAOS_SEED (random), HEALTHY_SECONDS (as long as the kills take) of tasks that
keep a processor busy on workers that nobody kills.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wove import ExecutorRuntime, WorkerLostError
from wove.demo.processes import CeleryWorker, RedisServer, RqWorker
from wove_tests.callbacks import child_environment
from wove_tests.chaos import tasks
from wove_tests.chaos.fleet import Slot, new_seed
from wove_tests.private import private_environment
from wove_tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove.handle import EnvironmentHandle

#: Seconds that a task to be killed would take, and the latest moment of its kill.
TASK_SECONDS, LATEST_KILL = 4.0, 2.0
#: Seconds within which 95 of 100 callers must have heard of it.
LIMIT = 3.0
#: Seconds that a healthy task keeps a processor busy.
HEALTHY_TASK = 10.0
DELIVERY_TIMEOUT = 60.0
#: Seconds until a task must have started.
START_SECONDS = 40.0

CELERY, RQ = "celery", "rq"
HEALTHY = {"healthy-celery": CELERY, "healthy-rq": RQ}


class Kind(NamedTuple):
    """What is killed: the process that runs the task, or its worker with everything that belongs to it."""

    name: str
    environment: str
    whole: bool


KINDS = (
    Kind("celery pool child", CELERY, whole=False),
    Kind("celery worker", CELERY, whole=True),
    Kind("rq work horse", RQ, whole=False),
    Kind("rq worker with its horse", RQ, whole=True),
)


@dataclass
class Kills:
    """What was measured of one kind."""

    kind: Kind
    #: Seconds from the kill to the caller's WorkerLostError.
    seconds: list[float] = field(default_factory=list)
    #: Calls that ended with something else.
    others: list[str] = field(default_factory=list)

    @property
    def p95(self) -> float:
        """The 95th percentile of the seconds."""
        ordered = sorted(self.seconds)
        return ordered[max(0, -(-95 * len(ordered) // 100) - 1)]

    @property
    def passed(self) -> bool:
        """Whether each caller heard of it, and nearly all within the limit."""
        return bool(self.seconds) and not self.others and self.p95 <= LIMIT

    def __str__(self) -> str:
        total = len(self.seconds) + len(self.others)
        text = f"{self.kind.name:<26}{len(self.seconds):3} of {total:<4}"
        if self.seconds:
            figures = (statistics.median(self.seconds), self.p95, max(self.seconds))
            text += "".join(f"{figure:8.3f}" for figure in figures)
        return text + ("" if self.passed else "   FAILED")


@dataclass
class Health:
    """What became of tasks whose workers were left alone."""

    done: int = 0
    seconds: float = 0.0
    alarms: list[str] = field(default_factory=list)

    async def watch(self, handle: EnvironmentHandle, enough: asyncio.Event) -> None:
        """Keep a worker busy, task after task."""
        while not enough.is_set():
            begun = time.monotonic()
            try:
                await handle.run(tasks.busy, HEALTHY_TASK)
                self.done += 1
            except Exception as exc:
                after = time.monotonic() - begun
                self.alarms.append(f"{handle.name}, after {after:.1f} s: {type(exc).__name__}: {exc}")
            self.seconds += time.monotonic() - begun


class Slots:
    """A Redis server and four workers: two to be killed, two to be left alone."""

    def __init__(self, stack: ExitStack) -> None:
        self._redis = stack.enter_context(RedisServer())
        self.definitions: dict[str, dict[str, Any]] = {}
        self.slots: dict[str, Slot] = {}
        for database, (name, backend) in enumerate({CELERY: CELERY, RQ: RQ, **HEALTHY}.items()):
            url = f"redis://127.0.0.1:{self._redis.port}/{database}"
            self.slots[name] = slot = Slot(name, lambda b=backend, u=url: _worker(b, u))
            stack.callback(lambda s=slot: s.worker.stop())
            slot.worker.start()
            broker = {"broker_url": url} if backend == CELERY else {"redis_url": url}
            self.definitions[name] = {
                "executor": backend,
                "executor_config": broker,
                "delivery_timeout": DELIVERY_TIMEOUT,
            }
        for slot in self.slots.values():
            slot.worker.wait_ready()


def _worker(backend: str, url: str) -> CeleryWorker | RqWorker:
    if backend == CELERY:
        return CeleryWorker(url, concurrency=1, env=child_environment())
    return RqWorker(url, env=child_environment())


async def kill_once(
    kills: Kills, handle: EnvironmentHandle, slot: Slot, started: Path, delay: float, *, cpu: bool
) -> None:
    """Start a task, kill it after ``delay`` seconds, and note when and how its caller hears of it."""
    call = asyncio.create_task(handle.run(tasks.be_killed, str(started), TASK_SECONDS, cpu=cpu))
    await until(lambda: started.exists() or call.done(), f"a task on {handle.name} starts", START_SECONDS)
    if started.exists():
        await asyncio.sleep(delay)
        killed_at = time.monotonic()
        if kills.kind.whole:
            await asyncio.to_thread(slot.worker.kill)
        else:
            os.kill(int(started.read_text()), signal.SIGKILL)
    else:
        killed_at = time.monotonic()
    (ended,) = await asyncio.gather(call, return_exceptions=True)
    seconds = time.monotonic() - killed_at
    if isinstance(ended, WorkerLostError):
        kills.seconds.append(seconds)
    else:
        kills.others.append(f"killed {delay:.2f} s after its start, {seconds:.1f} s later: {ended!r}")
    if kills.kind.whole:
        await asyncio.to_thread(slot.replace)


async def measure(slots: Slots, folder: Path, seed: int, count: int) -> tuple[list[Kills], Health]:
    """Kill, kind after kind, while the healthy workers work."""
    pick, health, enough = random.Random(f"kills {seed}"), Health(), asyncio.Event()
    measured = [Kills(kind) for kind in KINDS]
    least = time.monotonic() + float(os.environ.get("HEALTHY_SECONDS") or 0)
    async with ExecutorRuntime(slots.definitions) as runtime, asyncio.TaskGroup() as group:
        for name in HEALTHY:
            group.create_task(health.watch(runtime[name], enough))
        for kills in measured:
            slot = slots.slots[kills.kind.environment]
            for number in range(count):
                started = folder / f"{kills.kind.name}-{number}"
                delay = pick.uniform(0.0, LATEST_KILL)
                await kill_once(kills, runtime[slot.environment], slot, started, delay, cpu=bool(number % 2))
            print(kills, flush=True)
        await asyncio.sleep(max(0.0, least - time.monotonic()))
        enough.set()
    return measured, health


def report(measured: list[Kills], health: Health) -> Iterator[str]:
    """Yield what there is to say beyond the lines of the kinds."""
    for kills in measured:
        for other in kills.others:
            yield f"    - {kills.kind.name}: {other}"
    yield (
        f"healthy workers: {health.done} tasks of {HEALTHY_TASK:g} s in {health.seconds:.0f} s of two workers, "
        f"{len(health.alarms)} false alarms"
    )
    for alarm in health.alarms:
        yield f"    - {alarm}"


def main() -> int:
    """Print the measurements; 1 when a caller heard anything else, too late, or without cause."""
    seed, count = new_seed(), int(os.environ.get("KILLS") or 20)
    print(f"{count} kills of each kind, CHAOS_SEED={seed}; seconds from the kill to WorkerLostError")
    print(f"{'':<26}{'WorkerLost':>11}{'median':>7}{'p95':>8}{'max':>8}", flush=True)
    with (
        private_environment(),
        tempfile.TemporaryDirectory(prefix="wove-kills-") as folder,
        ExitStack() as stack,
    ):
        slots = Slots(stack)
        measured, health = asyncio.run(measure(slots, Path(folder), seed, count))
    print("\n".join(report(measured, health)))
    passed = all(kills.passed for kills in measured) and not health.alarms
    print(
        f"{'passed' if passed else 'FAILED'}; p95 is to be within {LIMIT:g} s; again with CHAOS_SEED={seed}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
