"""The demo's Redis and its two fleets: a Celery worker and an RQ worker, brought up and taken down."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wove.demo import leftovers
from wove.demo.processes import CeleryWorker, ManagedProcess, ProcessError, RedisServer, RqWorker, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

FLEETS = ("celery", "rq")

_PROCESSES = 2
_CONNECT_SECONDS = 5.0
# An idle worker needs up to three. One that was interrupted in a task has nobody to report to, and is killed.
_STOP_SECONDS = 4.0


@dataclass(frozen=True)
class Fleet:
    """One running worker and how a runtime reaches it."""

    name: str
    worker: CeleryWorker | RqWorker
    environment: dict[str, Any]
    kind: str
    command: str


@dataclass(frozen=True)
class Running:
    """Everything that was started: the Redis at ``url`` (when it is ours) and the fleets on it."""

    url: str
    fleets: list[Fleet]
    processes: list[ManagedProcess]
    folders: list[Path]

    def left_behind(self) -> list[str]:
        """Name what is still there of the processes and their folders; nothing, after the end."""
        processes = [f"process {pid}" for process in self.processes for pid in process.members()]
        return processes + [str(folder) for folder in self.folders if folder.exists()]


@contextmanager
def running(names: Sequence[str], redis_url: str | None, port: int | None = None) -> Iterator[Running]:
    """Bring the named fleets up, on a Redis of our own or on the one given; take them down at the end.

    On a given Redis the workers listen to a queue with a name of its own, and nothing we wrote stays there.
    """
    with ExitStack() as stack:
        processes: list[ManagedProcess] = []
        queue = None
        if redis_url is None:
            server = stack.enter_context(RedisServer(port=port))
            processes.append(server)
            url = server.url
        else:
            url, queue = redis_url, f"wove-demo-{secrets.token_hex(6)}"
            _check_answers(url)
        fleets = [_fleet(name, url, queue) for name in names]
        for fleet in fleets:
            if queue is not None:
                stack.callback(leftovers.remove, fleet.name, url, queue, fleet.worker.node)
        stack.callback(_stop_together, fleets)
        processes += [fleet.worker.start() for fleet in fleets]
        for fleet in fleets:
            fleet.worker.wait_ready()
        try:
            yield Running(url, fleets, processes, [process.folder for process in processes])
        finally:
            # From here on a second Ctrl-C would only leave things behind; each step has its own time limit.
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_IGN)


def _stop_together(fleets: list[Fleet]) -> None:
    stopping = [threading.Thread(target=fleet.worker.stop, args=(_STOP_SECONDS,)) for fleet in fleets]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join()


def port_or_free(preferred: int) -> int:
    """Return the preferred port, or a free one when something listens there already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", preferred))
            return preferred
    return free_port()


def without_password(url: str) -> str:
    """Return a URL fit for a screen."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@", 1) if password else url


def _fleet(name: str, url: str, queue: str | None) -> Fleet:
    config: dict[str, Any] = {"broker_url" if name == "celery" else "redis_url": url}
    if name == "celery":
        if queue is not None:
            config["queue"] = queue
        return Fleet(
            name=name,
            worker=CeleryWorker(url, concurrency=_PROCESSES, queue=queue),
            environment={"executor": name, "executor_config": config},
            kind=f"prefork pool of {_PROCESSES} processes",
            command="celery -A wove.demo.celery_app worker -I wove.worker.celery",
        )
    if queue is not None:
        config["queue_name"] = queue
    return Fleet(
        name=name,
        worker=RqWorker(url, queues=[queue or "default"]),
        environment={"executor": name, "executor_config": config},
        kind="one worker, one fork per job",
        command=f"rq worker {queue or 'default'}",
    )


def _check_answers(url: str) -> None:
    """Celery retries an unreachable broker for ever; say so at once instead."""
    import redis

    try:
        with redis.Redis.from_url(url, socket_connect_timeout=_CONNECT_SECONDS) as client:
            client.ping()
    except (redis.RedisError, ValueError, OSError) as exc:
        raise ProcessError(f"no Redis answers at {without_password(url)}: {exc}") from exc
