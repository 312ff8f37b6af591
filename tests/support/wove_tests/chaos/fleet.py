"""The brokers and workers of the chaos test, which may be killed and started again."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wove.demo.processes import CeleryWorker, ManagedProcess, RedisServer, RqWorker
from wove_tests.callbacks import child_environment
from wove_tests.chaos.tasks import LOG_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PREFORK, THREADS, RQ = "celery-prefork", "celery-threads", "rq"

#: Seconds after which Celery's workers give a message to another one when nobody has confirmed it: what a
#: killed worker had taken and not begun, or not ended where messages are confirmed late. The default is an hour.
VISIBILITY_SECONDS = 8


class PersistentRedis(RedisServer):
    """A Redis server that can be killed and comes back with its data, on the same port."""

    def __init__(self) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="wove-redis-data-"))
        super().__init__(extra_args=("--dir", str(self.data), "--appendonly", "yes"))

    def revive(self) -> None:
        """Start again after :meth:`kill`."""
        self.stop()
        self.start()
        self.wait_ready()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        shutil.rmtree(self.data, ignore_errors=True)


class Slot:
    """A place for a worker: when one has died, another takes it. The new one has a new name."""

    def __init__(self, environment: str, make: Callable[[], ManagedProcess]) -> None:
        self.environment = environment
        self._make = make
        self.worker = make()

    def begin(self) -> None:
        """End the worker, if it still runs, and start another without waiting for it."""
        self.worker.stop()
        self.worker = self._make()
        self.worker.start()

    def replace(self) -> None:
        """End the worker, if it still runs, and start another."""
        self.begin()
        self.worker.wait_ready()

    def children(self) -> list[int]:
        """Return the pids of the worker's own processes: pool processes, or the work horse."""
        return [pid for pid in self.worker.members() if pid != self.worker.pid]


class ChaosFleet:
    """Two brokers; a Celery environment with pool processes, one with threads, and one of RQ.

    Args:
        log: the file that executions are noted in.
        workers: how many workers each environment has.
    """

    def __init__(self, log: Path, workers: Mapping[str, int]) -> None:
        self._env = child_environment(**{LOG_VARIABLE: str(log), "CHAOS_VISIBILITY": str(VISIBILITY_SECONDS)})
        self._stack = ExitStack()
        self.celery_broker = PersistentRedis()
        self.rq_broker = PersistentRedis()
        self.slots = [Slot(name, self._maker(name)) for name, count in workers.items() for _ in range(count)]

    def __enter__(self) -> Self:
        with self._stack as stack:
            for broker in (self.celery_broker, self.rq_broker):
                stack.enter_context(broker)
            stack.callback(self._stop_workers)
            for slot in self.slots:
                slot.worker.start()
            for slot in self.slots:
                slot.worker.wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _stop_workers(self) -> None:
        with ThreadPoolExecutor(thread_name_prefix="stop-worker") as pool:
            list(pool.map(lambda slot: slot.worker.stop(), self.slots))

    def _maker(self, name: str) -> Callable[[], ManagedProcess]:
        if name == RQ:
            return lambda: RqWorker(self.rq_broker.url, queues=[name], env=self._env)
        pool, concurrency = ("prefork", 2) if name == PREFORK else ("threads", 6)
        return lambda: CeleryWorker(
            self.celery_broker.url,
            pool=pool,
            concurrency=concurrency,
            app="wove_tests.chaos.celery_app",
            queue=name,
            # Late, so that the broker runs a killed worker's tasks again.
            env={**self._env, "CHAOS_ACKS_LATE": "1" if name == THREADS else "0"},
        )

    def of(self, *environments: str) -> list[Slot]:
        """Return the slots of these environments."""
        return [slot for slot in self.slots if slot.environment in environments]

    def dead(self) -> list[Slot]:
        """Return the slots whose worker does not run."""
        return [slot for slot in self.slots if not slot.worker.running]

    def replace(self, slots: Sequence[Slot]) -> None:
        """Replace several workers, which start side by side."""
        for slot in slots:
            slot.begin()
        for slot in slots:
            slot.worker.wait_ready()

    def definitions(self, callback_url: str, callback_port: int) -> dict[str, dict[str, Any]]:
        """Return the environment definitions of a submitter whose callbacks come by that address."""
        common = {"callback_url": callback_url, "callback_port": callback_port}
        celery = {"broker_url": self.celery_broker.url, **common}
        rq = {"redis_url": self.rq_broker.url, "queue_name": RQ, **common}
        every = {
            PREFORK: {"executor": "celery", "executor_config": {**celery, "queue": PREFORK, "batch": "auto"}},
            THREADS: {"executor": "celery", "executor_config": {**celery, "queue": THREADS, "batch": 8}},
            RQ: {"executor": "rq", "executor_config": {**rq, "batch": "auto"}},
        }
        served = {slot.environment for slot in self.slots}
        return {name: definition for name, definition in every.items() if name in served}


def new_seed() -> int:
    """Return the seed of this run: CHAOS_SEED, or a random one."""
    return int(os.environ.get("CHAOS_SEED") or secrets.randbelow(1_000_000))
