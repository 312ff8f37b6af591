"""Workers that a test may kill, and calls that tell what was executed.

Each worker has a queue of its own, and in Redis a database, on brokers that only the crew uses. It is started
when it is first asked for; one that a test has killed is replaced when it is asked for again.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Celery
from redis import Redis

from wove.demo.processes import CeleryWorker, ManagedProcess, RedisServer, RqWorker
from wove_tests import deeds
from wove_tests.callbacks import child_environment
from wove_tests.chaos.fleet import Slot
from wove_tests.configured_celery import VARIABLE
from wove_tests.rabbitmq import RabbitServer
from wove_tests.waiting import until, until_states

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Self

    from wove.handle import EnvironmentHandle

DELIVERY_TIMEOUT = 60

#: Whether rows are tested with all they are to bear, which takes minutes more: ``make matrix``.
FULL = bool(os.environ.get("WOVE_TEST_MATRIX"))

#: Seconds after which a broker gives a message to another worker that nobody has confirmed.
VISIBILITY = 1
#: Seconds for which an impatient worker offers an outcome.
IMPATIENT = {"WOVE_RESULT_RETRY_SECONDS": "1"}

_LATE = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
}
_VISIBLE_SOON = {
    "task_acks_late": True,
    "broker_transport_options": {
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 0.5,
        "unacked_restore_throttle": 1,
    },
}


@dataclass(frozen=True)
class Post:
    """One worker: what it is started with, and what its submitter configures."""

    name: str
    executor: str
    options: dict[str, Any] = field(default_factory=dict)
    #: Celery settings.
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    #: Whether the fleet has a result backend that its submitter knows.
    results: bool = False
    broker: str = "redis"


_PREFORK = {"pool": "prefork", "concurrency": 2}
_THREADS = {"pool": "threads", "concurrency": 4}
_SIMPLE = {"worker_class": "rq.SimpleWorker"}

POSTS = {
    post.name: post
    for post in (
        Post("celery-prefork", "celery", _PREFORK),
        Post("celery-threads", "celery", _THREADS),
        Post("rq-worker", "rq"),
        Post("rq-simple", "rq", _SIMPLE),
        # The broker gives the message of a killed process to the next one.
        Post("celery-late", "celery", _PREFORK, _LATE),
        # The broker gives a message to somebody else while its task runs.
        Post("celery-visible", "celery", _THREADS, _VISIBLE_SOON),
        Post("celery-retrying", "celery", _PREFORK, _LATE, {"WOVE_TESTS_AUTORETRY": "1"}),
        # They leave outcomes with the backend that nobody takes.
        Post("celery-impatient", "celery", _PREFORK, {}, IMPATIENT, results=True),
        Post("celery-forgetful", "celery", _THREADS, {}, IMPATIENT),
        Post("rq-impatient", "rq", {}, {}, IMPATIENT),
    )
}


#: What Celery logs of a task's beginning, and of how it ended.
_RECEIVED = re.compile(r"Task \S+\[([0-9a-f-]+)\] received")
_ENDED = re.compile(r"[tT]ask:? \S+\[([0-9a-f-]+)\](?! received)")


def _spoiled(log: str) -> bool:
    """Tell whether a Celery worker has lost a process, or is still at something, by its log."""
    return "exited with" in log or bool({*_RECEIVED.findall(log)} - {*_ENDED.findall(log)})


class Crew:
    """Starts brokers and workers when they are asked for, and stops them all at the end.

    Args:
        posts: the workers by name.
        redis: the Redis server; one that keeps nothing unless it is given.
        rabbitmq: the RabbitMQ server, where a worker needs one.
    """

    #: Those whose workers run.
    at_work: ClassVar[list[Crew]] = []

    def __init__(
        self,
        posts: Mapping[str, Post] = POSTS,
        redis: RedisServer | None = None,
        rabbitmq: RabbitServer | None = None,
    ) -> None:
        self._posts = posts
        self._numbers = {name: number for number, name in enumerate(posts)}
        self._stack = ExitStack()
        self._redis = redis or RedisServer()
        self._rabbitmq = rabbitmq
        self._brokers: dict[str, RedisServer | RabbitServer] = {}
        self._slots: dict[str, Slot] = {}

    def __enter__(self) -> Self:
        Crew.at_work.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        Crew.at_work.remove(self)
        for slot in self._slots.values():
            # They are private, and nothing in them is worth an orderly shutdown.
            slot.worker.stop(0.0)
        self._stack.close()

    def broker(self, name: str) -> RedisServer | RabbitServer:
        """Return the broker of a worker."""
        kind = self._posts[name].broker
        if kind not in self._brokers:
            server = self._redis if kind == "redis" else self._rabbitmq
            assert server is not None
            self._brokers[kind] = self._stack.enter_context(server)
        return self._brokers[kind]

    def url(self, name: str, port: int | None = None) -> str:
        """Return the URL of a worker's broker; by another port, of a proxy."""
        broker = self.broker(name)
        if isinstance(broker, RabbitServer):
            return broker.url
        return f"redis://127.0.0.1:{port or broker.port}/{self._numbers[name]}"

    def slot(self, name: str) -> Slot:
        """Return the place of a worker, which runs."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = Slot(name, lambda: self.new_worker(name))
            slot.worker.start()
            slot.worker.wait_ready()
        elif not slot.worker.running:
            self._forget_its_work(name)
            slot.replace()
        return slot

    def dismiss_spoiled(self) -> None:
        """Stop the Celery workers that a test has left with a killed pool process, or with work that has not ended.

        Celery may lose the next message of a pool one of whose processes was killed a moment ago: it goes down a pipe
        that nobody reads. The next test gets a worker of its own.
        """
        for name, slot in self._slots.items():
            post = self._posts[name]
            if post.executor != "celery" or post.broker != "redis":
                continue
            with Redis.from_url(self.url(name)) as client:
                # What a killed worker had taken, and had not acknowledged, would be given to others in an hour.
                if (
                    not client.hlen("unacked")
                    and slot.worker.running
                    and not _spoiled(slot.worker.log_text())
                ):
                    continue
                slot.worker.stop(0.0)
                client.delete("unacked", "unacked_index", "unacked_mutex", name)

    def _forget_its_work(self, name: str) -> None:
        """Take what a killed RQ worker was at for over, as RQ does after minutes."""
        if self._posts[name].executor == "rq":
            with Redis.from_url(self.url(name)) as client:
                client.delete(f"rq:wip:{name}")

    def new_worker(self, name: str) -> ManagedProcess:
        """Return one more worker for that place's queue, not started yet."""
        post = self._posts[name]
        env = child_environment(**post.env)
        if post.executor == "rq":
            return RqWorker(self.url(name), queues=[name], env=env, **post.options)
        settings = dict(post.settings)
        if post.results:
            settings["result_backend"] = self.url(name)
        return CeleryWorker(
            self.url(name),
            app="wove_tests.configured_celery",
            queue=name,
            env={**env, VARIABLE: json.dumps(settings)},
            **post.options,
        )

    def idle(self, name: str) -> bool:
        """Whether nothing waits in a worker's queue, in Redis, nor is in its hands and not begun."""
        with Redis.from_url(self.url(name)) as client:
            if self._posts[name].executor == "rq":
                return not client.llen(f"rq:queue:{name}") and not client.zcard(f"rq:wip:{name}")
            return not client.llen(name) and not client.hlen("unacked")

    def at_rest(self, name: str) -> bool:
        """Whether a worker has nothing to do, and is at nothing."""
        if not self.idle(name):
            return False
        if self._posts[name].executor == "rq":
            return True
        with Celery("reader", broker=self.url(name), set_as_current=False) as app:
            answers = app.control.inspect(timeout=1.0).active()
        return bool(answers) and not any(answers.values())

    def definition(self, name: str, *, port: int | None = None, **changes: Any) -> dict[str, Any]:
        """Return the environment definition of a worker, which runs; ``executor_config`` is merged.

        ``port``: of a proxy in front of the broker.
        """
        post = self._posts[name]
        self.slot(name)
        if post.executor == "rq":
            config = {"redis_url": self.url(name, port), "queue_name": name}
        else:
            config = {"broker_url": self.url(name, port), "queue": name}
        if post.results:
            config["result_backend"] = self.url(name)
        config.update(changes.pop("executor_config", {}))
        definition = {"executor": post.executor, "delivery_timeout": DELIVERY_TIMEOUT}
        return {**definition, "executor_config": config, **changes}


class Job:
    """One call whose executions are noted; :func:`deeds.hold` unless another function is given."""

    #: What a test has begun and may not have ended, should it fail: workers are shared.
    begun_here: ClassVar[list[Job]] = []

    def __init__(
        self,
        handle: EnvironmentHandle,
        folder: Path,
        name: str = "job",
        func: Callable[..., Any] | None = None,
        *args: Any,
    ) -> None:
        self.handle = handle
        self.log = folder / f"{name}.log"
        self._release = folder / f"{name}.release"
        arguments = args if func is not None else (str(self._release),)
        self.call = asyncio.create_task(
            handle.run(func or deeds.hold, str(self.log), *arguments), name=f"call-{name}"
        )
        self.begun_here.append(self)

    @property
    def executions(self) -> list[deeds.Line]:
        """What was begun, in order."""
        return deeds.notes(self.log)

    async def begun(self, executions: int = 1) -> deeds.Line:
        """Wait until so many executions have begun, and return the last of them."""
        await until(
            lambda: len(self.executions) >= executions,
            f"{self.log.stem} was begun {executions} times",
        )
        return self.executions[-1]

    async def running(self) -> deeds.Line:
        """Wait until the submitter, too, knows that the work has begun; for an environment with one open run."""
        line = await self.begun()
        await until_states(self.handle, "started")
        return line

    async def ended(self) -> None:
        """Wait until an execution has ended well, whoever hears of it."""
        await until(lambda: deeds.notes(self.log, "end"), f"{self.log.stem} has ended")

    def release(self) -> None:
        """Let it end."""
        self._release.touch()


def kill(pid: int) -> None:
    """Kill one process."""
    os.kill(pid, signal.SIGKILL)
