"""The Celery adapter: payloads travel as one task, ``wove.run``, through the fleet's own broker."""

from __future__ import annotations

import base64
import logging
import math
import threading
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wove.adapters.base import BackendAdapter, BackendState
from wove.adapters.default_timeout import keep_default_timeout
from wove.backend import as_text, job_id, summarize_call
from wove.errors import ConfigurationError, SubmitError
from wove.security import scrub, without_passwords
from wove.wire import PARKED, PARKED_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wove.frames import Frame

logger = logging.getLogger("wove.adapters")

#: Seconds after its ``delivery_timeout`` in which a task that was never started is dropped by Celery.
EXPIRES_AFTER = 24 * 3600
#: Connections that an app made here holds at most.
POOL_LIMIT = 8
#: Seconds that an app made here waits for its broker before a submission fails.
BROKER_TIMEOUT = 5.0
#: Seconds that workers get to say whether they are at a task.
INSPECT_SECONDS = 0.7
#: Messages that go to Redis in one round trip: meanwhile other threads have their turns, first of all the caller's.
TOGETHER = 10
#: How often those are asked that do not answer.
INSPECT_TIMES = 2


_importing = threading.Lock()
#: Hashes of broker URLs that were looked at: of what starting an environment costs, that is the most.
_usable: set[int] = set()


class CeleryAdapter(BackendAdapter):
    """Submits to Celery workers that were started with ``-I wove.worker.celery``.

    ``executor_config``: ``app`` (a Celery app, or ``"proj.celery:app"``) or ``broker_url``;
    ``result_backend``, ``app_name``, ``task_name`` (``"wove.run"``), ``queue``,
    ``send_task_options`` (passed to ``send_task``), ``terminate_on_cancel``.

    Equal ``delivery_idempotency_key`` share a run within one process only: a broker cannot be
    asked whether it holds a message with some id, nor be made to refuse a second one.
    """

    required_modules = ("celery", "aiohttp", "cloudpickle", "msgpack")
    install_hint = 'pip install "wove[celery]"'
    submits_blocking = True
    config_keys = (
        "app", "app_name", "broker_url", "queue", "result_backend", "send_task_options",
        "task_name", "terminate_on_cancel",
    )  # fmt: skip

    async def start(self) -> None:
        """Find or make the app."""
        config = self.config
        if bool(config.get("app")) == bool(config.get("broker_url")):
            both = " and not both" if config.get("app") else ""
            raise ConfigurationError(
                'the celery executor needs either executor_config["app"] (a Celery app or "proj.celery:app") '
                f'or executor_config["broker_url"], for example "redis://localhost:6379/0"{both}'
            )
        self._task_name = config.get("task_name") or "wove.run"
        self.stops_running = bool(config.get("terminate_on_cancel"))
        options = config.get("send_task_options") or {}
        if not hasattr(options, "items"):
            raise ConfigurationError('executor_config["send_task_options"] is a mapping')
        self._options = dict(options)
        if config.get("queue") is not None:
            self._options["queue"] = config["queue"]
        # It blocks while it imports, here in the adapter's own thread: nothing else is to be done in it yet.
        self._app = self._find_app()

    def _find_app(self) -> Any:
        # Celery's package loads its parts on first use, and not safely from several threads.
        with _importing:
            keep_default_timeout()
            return self._find_app_alone()

    def _find_app_alone(self) -> Any:
        app = self.config.get("app")
        if app is None:
            app = self._make_app()
        elif isinstance(app, str):
            app = import_app(app)
        if not hasattr(app, "send_task"):
            raise ConfigurationError(
                f'executor_config["app"] is a Celery app or its "module:attribute", not {type(app).__name__}'
            )
        # Once, here: finalizing an app from several threads at a time is not safe.
        app.finalize()
        url = self.config.get("broker_url")
        if hash(url) not in _usable:
            _check_broker_url(app)
        if url is not None:
            _usable.add(hash(url))
        # Where the fleet routes tasks, a router may choose for each message anew.
        self._one_queue = url is not None or not app.conf.task_routes
        # JSON text unless the fleet's own serializer carries bytes. That of an app made here is Celery's default;
        # an app's settings take a while to be read the first time.
        serializer = self._options.get("serializer") or ("json" if url else app.conf.task_serializer)
        self._binary = serializer in ("msgpack", "pickle")
        return app

    def _make_app(self) -> Any:
        config = self.config
        self._owned = make_app(
            config["broker_url"], name=config.get("app_name") or "wove", backend=config.get("result_backend")
        )
        return self._owned

    async def submit(self, payload: bytes, frame: Frame) -> str:
        """Send one task."""
        return str(await self.submit_alone(payload, frame))

    async def submit_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Send tasks by one producer, held for the batch."""
        results: list[Any] = await self.blocking(self.submit_blocking, batch)
        return results

    def submit_blocking(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Send tasks by one producer, held for all of them, and on Redis in one pipeline."""
        results: list[Any] = []
        try:
            with self._app.producer_or_acquire() as producer:
                # The first by itself: it brings a connection back that went stale meanwhile.
                results.append(self._send(producer, *batch[0]))
                together = TOGETHER if _pipelines(producer) else 1
                while len(results) < len(batch):
                    self._send_together(producer, batch[len(results) :][:together], results)
        except Exception as exc:
            # The broker is out: trying each of the others would take its retries again.
            results.extend(self._submit_error(exc) for _ in range(len(batch) - len(results)))
        return results

    def _send_together(self, producer: Any, batch: Sequence[tuple[bytes, Frame]], results: list[Any]) -> None:
        """Send tasks in one round trip, and note what became of them; of none it is known before the end."""
        if len(batch) == 1:
            results.append(self._send(producer, *batch[0]))
            return
        with producer.batch():
            sent = [self._send(producer, *item, prompt=self._one_queue) for item in batch]
        results.extend(sent)

    def _send(self, producer: Any, payload: bytes, frame: Frame, *, prompt: bool = False) -> Any:
        """Send a task; promptly where its queue was declared this moment, and where a pipeline waits for it."""
        from kombu.exceptions import OperationalError

        task_id = job_id(frame)
        delivery = frame.get("delivery") or {}
        timeout = None if delivery.get("keep") else delivery.get("timeout")
        # What it costs to be ready for another try, and to look each declaration up, is a third of all.
        known: dict[str, Any] = {"declare": [], "retry": False} if prompt else {}
        try:
            self._app.send_task(
                self._task_name,
                args=[payload if self._binary else as_text(payload)],
                task_id=task_id,
                producer=producer,
                **{
                    # No result is stored: the outcome comes back to the callback server.
                    "ignore_result": True,
                    # The name and the arguments that logs, events and Flower show.
                    "shadow": frame["task_id"],
                    "argsrepr": summarize_call(frame),
                    "kwargsrepr": "{}",
                    # Litter is dropped in the end. Not sooner: this is an absolute time, which
                    # a worker compares with a clock that may differ from ours.
                    "expires": math.ceil(timeout) + EXPIRES_AFTER if timeout else None,
                    # The fleet's own task_routes match the function, not "wove.run".
                    "route_name": frame["task_id"],
                    **known,
                    **self._options,
                },
            )
        except OperationalError:
            raise
        except Exception as exc:
            return self._submit_error(exc)
        return task_id

    def _submit_error(self, exc: Exception) -> SubmitError:
        setting = "broker_url" if self.config.get("broker_url") else "app"
        broker = str(self.config.get("broker_url") or self._app.connection_for_write().as_uri())
        error = SubmitError(
            f"environment {self.name!r}: the Celery broker {scrub(broker)} did not accept the run: "
            f'{type(exc).__name__}: {scrub(str(exc))}; is it running? (executor_config["{setting}"])',
            maybe_accepted=True,
        )
        error.__cause__ = without_passwords(exc)
        return error

    async def cancel(self, run_id: str, submission: Any, frame: Frame) -> bool:
        """Revoke the task; ``terminate_on_cancel`` also ends its process (prefork pools)."""
        terminate = bool(frame.get("escalate"))
        if frame.get("started") and not terminate:
            return False  # its worker has been told, and a revocation would only litter its log
        task_id = submission or job_id(frame)
        await self.blocking(lambda: self._app.control.revoke(task_id, terminate=terminate, signal="SIGTERM"))
        return False  # a broadcast: whom it reached is not known

    async def probe(self, run_ids: Sequence[str]) -> dict[str, BackendState]:
        """Ask the workers that were at the runs, and the result backend for parked outcomes."""
        states: dict[str, BackendState] = await self.asking(self._probe, list(run_ids))
        return states

    def _probe(self, run_ids: list[str]) -> dict[str, BackendState]:
        states = self._ask_workers(run_ids)
        # Running or queued work has no outcome yet.
        over = [run_id for run_id, state in states.items() if state.state not in ("running", "queued")]
        for run_id, parked in self._parked(over).items():
            states[run_id] = replace(states[run_id], outcome=parked)
        return states

    def _ask_workers(self, run_ids: list[str]) -> dict[str, BackendState]:
        unknown = BackendState("unknown")
        states = dict.fromkeys(run_ids, unknown)
        by_node: dict[str, list[str]] = {}
        for run_id in run_ids:
            worker = self.worker_of(run_id)
            # A solo or green worker is busy with the task and answers nobody.
            if worker.get("node") and worker.get("answers") is True:
                by_node.setdefault(str(worker["node"]), []).append(run_id)
        if not by_node:
            return states
        answers: dict[tuple[str, Any], Any] = {}
        for _ in range(INSPECT_TIMES):
            silent = {
                node: mine
                for node, mine in by_node.items()
                if any((node, self.worker_of(run_id).get("parent")) not in answers for run_id in mine)
            }
            if silent:
                answers.update(self._inspect(silent))
        for node, mine in by_node.items():
            for run_id in mine:
                worker = self.worker_of(run_id)
                answer = answers.get((node, worker.get("parent")))
                if answer is None and (node, None) in answers:
                    continue  # it does not know the command
                states[run_id] = _state(node, run_id, answer, worker.get("requeues") is True)
        return states

    def _inspect(self, by_node: dict[str, list[str]]) -> dict[tuple[str, Any], Any]:
        """Ask workers about runs; return their answers by node name and pid, for names may be taken twice."""
        asked = [run_id for mine in by_node.values() for run_id in mine]
        # The command is that of wove.worker.celery.
        replies = self._app.control.broadcast(
            "wove_runs",
            arguments={"ids": asked},
            destination=list(by_node),
            reply=True,
            timeout=INSPECT_SECONDS,
        )
        found: dict[tuple[str, Any], Any] = {}
        for reply in replies or ():
            for node, answer in reply.items():
                if isinstance(answer, dict):
                    found[node, answer.get("pid")] = answer
        return found

    def _parked(self, run_ids: list[str]) -> dict[str, bytes]:
        """Return the outcomes that were left in the result backend."""
        from celery.backends.base import DisabledBackend

        backend = self._app.backend
        # Other formats than JSON would be decoded before anything is verified.
        if not run_ids or isinstance(backend, DisabledBackend) or self._app.conf.result_serializer != "json":
            return {}
        found = {}
        try:
            metas = _metas(backend, [f"{run_id}{PARKED_SUFFIX}" for run_id in run_ids])
            for run_id, meta in zip(run_ids, metas, strict=True):
                kept = meta.get("result") if meta.get("status") == "SUCCESS" else None
                text = kept.get(PARKED) if isinstance(kept, dict) else None
                if isinstance(text, str):
                    found[run_id] = _decoded(text)
        except Exception as exc:  # a result backend that is out must not void the workers' words
            logger.info("environment %r: the result backend was not asked: %s", self.name, exc)
        return found

    async def close(self) -> None:
        """Close an app that was made here; never a user's."""
        app, self._owned = self._owned, None
        if app is not None:
            await self.blocking(app.close)

    #: The app made from ``broker_url``.
    _owned: Any = None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""  # which is no outcome: whoever reads it says so


def _metas(backend: Any, task_ids: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what a result backend has on tasks, fetched in one round trip where it can."""
    values: Any = None
    if hasattr(backend, "get_key_for_task"):
        try:
            values = backend.mget([backend.get_key_for_task(task_id) for task_id in task_ids])
        except NotImplementedError:
            pass
    if values is None or hasattr(values, "items"):
        for task_id in task_ids:
            yield backend.get_task_meta(task_id, cache=False)
        return
    for value in values:
        yield backend.decode_result(value) if value else {}


def _pipelines(producer: Any) -> bool:
    """Tell whether messages of this producer can be sent in one round trip: kombu 5.7 and newer, on Redis."""
    if not hasattr(producer, "batch"):
        return False
    channel = producer.channel
    return hasattr(channel, "create_publish_batch") and getattr(channel, "supports_batch_publish", True)


def _state(node: str, run_id: str, answer: Any, requeues: bool) -> BackendState:
    """Read a worker's answer to ``wove_runs``."""
    if answer is None:
        return BackendState("lost", f"the Celery worker {node} does not answer any more")
    runs = answer.get("runs")
    found = runs.get(run_id) if isinstance(runs, dict) else None
    word, detail = found if isinstance(found, (list, tuple)) and len(found) == 2 else ("", "")
    if word == "active":
        return BackendState("running", f"active on {node}", busy=detail == "R")
    if word == "reserved":
        return BackendState("queued", f"reserved on {node}")
    if requeues:
        return BackendState("queued", f"not on {node} any more; acks_late puts it back on the queue")
    if word == "died":
        return BackendState("lost", f"the pool process on {node} ended with {detail}")
    return BackendState("gone", f"the Celery worker {node} is not at it any more")


def make_app(broker_url: str, *, name: str, backend: str | None = None) -> Any:
    """Return a Celery app on ``broker_url`` that gives up on a broker which does not answer.

    ``CELERY_BROKER_URL`` in the environment, which Celery prefers to any configuration,
    belongs to the user's own apps and does not lead this one elsewhere.
    """
    from celery import Celery
    from celery.app.amqp import AMQP
    from kombu.pools import ProducerPool

    # Pools of the app's own: Celery's are shared by all apps of the process on one broker,
    # so that closing them would close connections of the user's apps.
    # Celery has no types, and so no base class that mypy could check, here and below.
    class WoveAMQP(AMQP):  # type: ignore[misc]
        @cached_property
        def producer_pool(self) -> Any:
            return ProducerPool(connections=self.app.pool, limit=POOL_LIMIT)

    # As above.
    class WoveApp(Celery):  # type: ignore[misc]
        amqp_cls = WoveAMQP

        @cached_property
        def pool(self) -> Any:
            return self.connection_for_write().Pool(POOL_LIMIT)

        def finalize(self, auto: bool = False) -> None:
            # It executes no tasks: binding Celery's own ones is most of what an app costs.
            self.finalized = True

        def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
            return super().connection_for_write(url or broker_url, **options)

        def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
            return super().connection_for_read(url or broker_url, **options)

        def close(self) -> None:
            if "producer_pool" in vars(self.amqp):
                self.amqp.producer_pool.force_close_all()
            if "pool" in vars(self):
                self.pool.force_close_all()
            super().close()

    app = WoveApp(name, broker=broker_url, backend=backend, set_as_current=False)
    app.conf.update(
        broker_connection_timeout=BROKER_TIMEOUT,
        broker_transport_options={
            "socket_timeout": BROKER_TIMEOUT,
            "socket_connect_timeout": BROKER_TIMEOUT,
            "read_timeout": BROKER_TIMEOUT,
            "write_timeout": BROKER_TIMEOUT,
        },
    )
    return app


def _check_broker_url(app: Any) -> None:
    try:
        app.connection_for_write().get_transport_cls()
    except (KeyError, ImportError, ValueError, AttributeError) as exc:
        # Not the library's words: they may repeat the password.
        raise ConfigurationError(
            f'executor_config["broker_url"] is no broker URL that Celery can use ({type(exc).__name__}); one reads '
            "redis://:password@host:6379/0 or amqp://user:password@host:5672//, with special characters of the "
            "password percent-encoded"
        ) from None


def import_app(reference: str) -> Any:
    """Return the Celery app named ``"module:attribute"``.

    Raises:
        ConfigurationError: there is none; says how the name is written.
    """
    module, _, attribute = reference.partition(":")
    try:
        return getattr(import_module(module), attribute or "app")
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(
            f'executor_config["app"]: cannot find the Celery app {reference!r} ({exc}); it is written '
            '"module:attribute", and the module has to be importable here'
        ) from exc
