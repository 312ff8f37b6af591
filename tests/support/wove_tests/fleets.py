"""The fleets that contract tests run on, each started once, when a test first asks for it.

Every worker has a queue and a Redis database of its own, so no fleet takes another's work and a test may
look at what its fleet left in the broker.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wove.demo.processes import CeleryWorker, ManagedProcess, RedisServer, RqWorker
from wove_tests.rabbitmq import RabbitServer
from wove_tests.services import Certificates, WorkerService, make_certificates

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

SUPPORT = Path(__file__).resolve().parents[1]

DELIVERY_TIMEOUT = 60


@dataclass(frozen=True)
class Fleet:
    """One way to run tasks: what the submitter configures and what the worker is started with."""

    name: str
    executor: str
    broker: str | None = None
    database: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    service: str | None = None

    @property
    def queue(self) -> str:
        """The name of the fleet's queue, which is the fleet's."""
        return self.name


_ALL = (
    Fleet("local", "local"),
    Fleet("memory", "memory"),
    Fleet("celery-redis-prefork", "celery", "redis", 1, {"pool": "prefork", "concurrency": 2}),
    Fleet("celery-redis-threads", "celery", "redis", 2, {"pool": "threads", "concurrency": 4}),
    Fleet("celery-redis-solo", "celery", "redis", 3, {"pool": "solo", "concurrency": 1}),
    Fleet("celery-rabbitmq-prefork", "celery", "rabbitmq", 0, {"pool": "prefork", "concurrency": 2}),
    Fleet("rq-worker", "rq", "redis", 4),
    Fleet("rq-simple", "rq", "redis", 5, {"worker_class": "rq.SimpleWorker"}),
    Fleet("rq-spawn", "rq", "redis", 6, {"worker_class": "rq.worker.SpawnWorker"}),
    Fleet("rq-json", "rq", "redis", 7, {"serializer": "json"}),
    Fleet("stdio-1", "stdio", options={"processes": 1, "threads": 4}),
    Fleet("stdio-4", "stdio", options={"processes": 4, "threads": 1}),
    Fleet("http", "http", service="http"),
    Fleet("https", "https", service="http", options={"tls": True}),
    Fleet("grpc", "grpc", service="grpc"),
    Fleet("grpc-tls", "grpc", service="grpc", options={"tls": True}),
    Fleet("websocket", "websocket", service="websocket"),
    Fleet("websocket-tls", "websocket", service="websocket", options={"tls": True}),
)
FLEETS = {fleet.name: fleet for fleet in _ALL}

# The fleets that the one contract test body runs on.
CONTRACT_FLEETS = (
    "local",
    "memory",
    "celery-redis-prefork",
    "celery-redis-threads",
    "celery-redis-solo",
    "celery-rabbitmq-prefork",
    "rq-worker",
    "rq-simple",
    "stdio-1",
    "stdio-4",
    "http",
    "https",
    "grpc",
    "grpc-tls",
    "websocket",
    "websocket-tls",
)

#: How many synchronous tasks each worker service of the contract runs at once.
SERVICE_SLOTS = 4


def fleet_params(*names: str) -> list[Any]:
    """Return parameters for ``pytest.mark.parametrize``, each marked with the broker it needs.

    Without names: the fleets of the contract.
    """
    params = []
    for name in names or CONTRACT_FLEETS:
        broker = FLEETS[name].broker
        params.append(pytest.param(name, marks=[getattr(pytest.mark, broker)] if broker else [], id=name))
    return params


class Fleets:
    """Starts servers and workers when they are first needed, and stops them all at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._redis: RedisServer | None = None
        self._rabbitmq_url: str | None = None
        self._workers: dict[str, ManagedProcess] = {}
        self._certificates: Certificates | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Side by side: each takes a second or two to say goodbye. Their servers go after them.
        with self._stack, ThreadPoolExecutor(thread_name_prefix="stop-worker") as pool:
            list(pool.map(ManagedProcess.stop, self._workers.values()))

    def redis(self) -> RedisServer:
        """Return the Redis server of this run."""
        if self._redis is None:
            self._redis = self._stack.enter_context(RedisServer())
        return self._redis

    def redis_url(self, database: int = 0) -> str:
        """Return the URL of one database of the Redis server of this run."""
        return f"redis://127.0.0.1:{self.redis().port}/{database}"

    def rabbitmq_url(self) -> str:
        """Return the URL of the RabbitMQ server of this run: a given one, or a private one."""
        if self._rabbitmq_url is None:
            given = os.environ.get("WOVE_TEST_AMQP_URL")
            self._rabbitmq_url = given or self._stack.enter_context(RabbitServer()).url
        return self._rabbitmq_url

    def broker_url(self, name: str) -> str:
        """Return the URL of a fleet's broker."""
        fleet = FLEETS[name]
        return self.rabbitmq_url() if fleet.broker == "rabbitmq" else self.redis_url(fleet.database)

    def worker(self, name: str) -> ManagedProcess:
        """Return the running worker of a fleet; a test may have killed it, then it is started again."""
        worker = self._workers.get(name)
        if worker is not None and not worker.running:
            worker.stop()
            worker = None
        if worker is None:
            self._workers[name] = worker = self._new_worker(FLEETS[name])
            worker.__enter__()  # left in __exit__ above, together with the others
        return worker

    def executor_definition(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return the environment definition for a fleet whose worker runs.

        ``changes`` are added to the definition; ``executor_config`` is merged into the fleet's own.
        """
        fleet = FLEETS[name]
        definition: dict[str, Any] = {"executor": fleet.executor, "delivery_timeout": DELIVERY_TIMEOUT}
        config: dict[str, Any] = {}
        if fleet.broker:
            self.worker(name)
            config = _SUBMITTER_CONFIG[fleet.executor](self, fleet)
        elif fleet.service:
            service = self.worker(name)
            assert isinstance(service, WorkerService)
            config = service.config
        elif fleet.executor == "stdio":
            config = dict(fleet.options)
        config.update(changes.pop("executor_config", {}))
        if config:
            definition["executor_config"] = config
        return {**definition, **changes}

    def keys_left(self) -> list[str]:
        """Return the keys in Redis that stem from runs: neither a worker's own nor the broker's."""
        if self._redis is None:
            return []
        from redis import Redis
        from rq.registry import FailedJobRegistry

        left = []
        for fleet in _ALL:
            if fleet.broker != "redis":
                continue
            with Redis.from_url(self.redis_url(fleet.database)) as connection:
                if fleet.executor == "rq":
                    # What every RQ worker does every ten minutes.
                    FailedJobRegistry(fleet.queue, connection=connection).cleanup()
                left += [f"{fleet.name}: {key.decode()}" for key in connection.keys() if not _expected(key)]
        return left

    def certificates(self) -> Certificates:
        """Return the certificates of this run, for 127.0.0.1."""
        if self._certificates is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="wove-test-tls-"))
            self._certificates = make_certificates(Path(folder))
        return self._certificates

    def _new_worker(self, fleet: Fleet) -> ManagedProcess:
        if fleet.service:
            slots = ("--processes", "2", "--threads", str(SERVICE_SLOTS // 2))
            tls = self.certificates() if fleet.options.get("tls") else None
            return WorkerService(fleet.service, *slots, certificates=tls)
        # Workers import the helpers of the tests, as a real worker imports the project's code.
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        common: dict[str, Any] = {"env": {"PYTHONPATH": path}, **fleet.options}
        if fleet.executor == "celery":
            return CeleryWorker(self.broker_url(fleet.name), queue=fleet.queue, **common)
        return RqWorker(self.broker_url(fleet.name), queues=[fleet.queue], **common)

    def _rq_queue(self, fleet: Fleet) -> Any:
        """Return a queue object of the user's: the only way to say which serializer a fleet has."""
        from redis import Redis
        from rq import Queue

        connection = Redis.from_url(self.broker_url(fleet.name))
        self._stack.callback(connection.close)
        return Queue(fleet.queue, connection=connection, serializer=fleet.options["serializer"])

    def _celery_config(self, fleet: Fleet) -> dict[str, Any]:
        return {"broker_url": self.broker_url(fleet.name), "queue": fleet.queue}

    def _rq_config(self, fleet: Fleet) -> dict[str, Any]:
        # Failed jobs can be looked at for a while; here only until the end of the run.
        brief = {"enqueue_options": {"failure_ttl": 1}}
        if "serializer" in fleet.options:
            return {"queue": self._rq_queue(fleet), **brief}
        return {"redis_url": self.broker_url(fleet.name), "queue_name": fleet.queue, **brief}


def _expected(key: bytes) -> bool:
    # What a fleet notes of a callback server that was away is forgotten after a while.
    return key.startswith(
        (b"_kombu.", b"rq:worker", b"rq:queues", b"rq:clean_", b"rq:pubsub", b"wove:outage:")
    )


_SUBMITTER_CONFIG: dict[str, Callable[[Fleets, Fleet], dict[str, Any]]] = {
    "celery": Fleets._celery_config,
    "rq": Fleets._rq_config,
}
