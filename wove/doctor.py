"""``wove doctor``: why does my task hang?

Looks at what a call needs, in the order in which it needs it: the secret, the broker, a
worker that listens on the queue and knows Wove, the same secret there, and a callback URL
that the worker can reach. Then makes one call.
"""

from __future__ import annotations

import asyncio
import platform
import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wove.adapters.rq_states import WITHOUT_WOVE
from wove.errors import ConfigurationError, PayloadRejectedError, WorkerLostError, WoveError
from wove.runtime import ExecutorRuntime
from wove.security import cookie_path, find_secrets, is_cookie, scrub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: Seconds that workers get to answer Celery's remote control.
INSPECT_SECONDS = 2.0

_ONE_FOR_BOTH = "give the submitter and its workers the same WOVE_SECRET"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``ok``, ``problem`` or ``unknown``, and what mends it."""

    state: str
    text: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as plain data."""
        return asdict(self)


def examine(executor: str, config: Mapping[str, Any], timeout: float) -> Iterator[Finding]:
    """Yield what is found out about an environment, until a problem stops the examination.

    Args:
        executor: ``"celery"`` or ``"rq"``.
        config: its ``executor_config``.
        timeout: seconds that the trial call may take.
    """
    steps: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _secret(config),
        lambda: _workers(executor, config),
        lambda: _callback_host(config),
        lambda: _trial(executor, config, timeout),
    )
    for step in steps:
        for finding in step():
            yield finding
            if finding.state == "problem":
                return


def _secret(config: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        ring = find_secrets(config.get("security"))
    except WoveError as exc:
        yield Finding("problem", f"no usable secret: {exc}")
        return
    if is_cookie(ring):
        yield Finding(
            "ok",
            f"secret: this user's cookie {cookie_path()} (key id {ring.primary.kid}); workers of other users and "
            "hosts need WOVE_SECRET instead",
        )
    else:
        yield Finding("ok", f"secret: {ring.source} (key id {ring.primary.kid})")


def _workers(executor: str, config: Mapping[str, Any]) -> Iterator[Finding]:
    look = _celery_workers if executor == "celery" else _rq_workers
    try:
        yield from look(config)
    except ConfigurationError as exc:
        yield Finding("problem", str(exc), "run it in the project's folder, or set PYTHONPATH to it")
    except ModuleNotFoundError as exc:
        yield Finding(
            "problem", f"{executor} is not installed here: {exc}", f'pip install "wove[{executor}]"'
        )
    except Exception as exc:
        where = scrub(str(config.get("broker_url") or config.get("redis_url") or config.get("app")))
        yield Finding(
            "problem",
            f"the broker {where} does not answer: {type(exc).__name__}: {scrub(str(exc))}",
            "start it, or correct the URL: one reads redis://:password@host:6379/0 or amqp://user:password@host:5672//",
        )


# --- Celery -------------------------------------------------------------------


def _celery_workers(config: Mapping[str, Any]) -> Iterator[Finding]:
    app = _celery_app(config)
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        yield Finding("ok", f"broker: {_shown(config, connection)} answers")
    inspect = app.control.inspect(timeout=INSPECT_SECONDS)
    registered = inspect.registered() or {}
    if not registered:
        yield Finding(
            "problem",
            "no Celery worker answers on this broker (a busy solo worker does not answer either)",
            "start one: celery -A proj worker -I wove.worker.celery",
        )
        return
    queues = inspect.active_queues() or {}
    wanted = config.get("queue") or app.conf.task_default_queue
    task = config.get("task_name") or "wove.run"
    usable = []
    for worker, names in sorted(registered.items()):
        listens = [queue["name"] for queue in queues.get(worker, ())]
        knows = any(name.split(" ")[0] == task for name in names)
        if knows and wanted in listens:
            usable.append(worker)
        else:
            yield _unusable(worker, task, knows, wanted, listens)
    if not usable:
        yield Finding(
            "problem",
            f"no worker both knows the task {task!r} and listens on the queue {wanted!r}",
            f"start one: celery -A proj worker -I wove.worker.celery -Q {wanted}",
        )
        return
    # Only those that know the question: others would log an error.
    status = app.control.inspect(destination=usable, timeout=INSPECT_SECONDS)._request("wove_status") or {}
    for worker in usable:
        yield _same_secret(worker, status.get(worker), config)


def _celery_app(config: Mapping[str, Any]) -> Any:
    from wove.adapters.celery import import_app, make_app

    app = config.get("app")
    if app is None:
        return make_app(config["broker_url"], name="wove-doctor")
    return import_app(app) if isinstance(app, str) else app


def _shown(config: Mapping[str, Any], connection: Any) -> str:
    return scrub(str(config.get("broker_url") or connection.as_uri()))


def _unusable(worker: str, task: str, knows: bool, wanted: str, listens: list[str]) -> Finding:
    if not knows:
        return Finding(
            "unknown",
            f"worker {worker} does not know the task {task!r}",
            "start it with -I wove.worker.celery, or with CELERY_WORKER_INCLUDE=wove.worker.celery",
        )
    return Finding("unknown", f"worker {worker} listens on {', '.join(listens)}, not on {wanted}")


def _same_secret(worker: str, status: Any, config: Mapping[str, Any]) -> Finding:
    kids = status.get("kids") if isinstance(status, dict) else None
    if not kids:
        return Finding("unknown", f"worker {worker} knows Wove, and does not tell which secret it has")
    ring = find_secrets(config.get("security"))
    if ring.primary.kid in kids:
        return Finding("ok", f"worker {worker}: Wove {status.get('version')}, the same secret")
    return Finding(
        "problem",
        f"worker {worker} has another secret (key ids {', '.join(kids)}, from {status.get('source')})",
        _ONE_FOR_BOTH,
    )


# --- RQ -----------------------------------------------------------------------


def _rq_workers(config: Mapping[str, Any]) -> Iterator[Finding]:
    from redis import Redis
    from rq import Queue, Worker

    with Redis.from_url(config["redis_url"], socket_timeout=5, socket_connect_timeout=5) as connection:
        connection.ping()
        yield Finding("ok", f"broker: {scrub(config['redis_url'])} answers")
        name = config.get("queue_name") or "default"
        queue = Queue(name, connection=connection)
        workers = Worker.all(connection=connection)
        listening = [worker for worker in workers if name in worker.queue_names()]
        if not listening:
            others = sorted({other for worker in workers for other in worker.queue_names()})
            heard = f"; workers listen on {', '.join(others)}" if others else ""
            yield Finding(
                "problem",
                f"no RQ worker listens on the queue {name!r}{heard}",
                f"start one: rq worker {name}",
            )
            return
        idle = sum(worker.get_state() == "idle" for worker in listening)
        waiting = len(queue)
        yield Finding(
            "ok", f"{len(listening)} worker(s) on the queue {name!r}, {idle} idle; {waiting} jobs wait"
        )


# --- the way back -------------------------------------------------------------


def _callback_host(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Say so where the host that workers are to call has no address here; it may have one where they are."""
    url = str(config.get("callback_url") or "")
    host = urlsplit(url.replace("{hostname}", socket.gethostname()).replace("{port}", "1")).hostname
    if not host:
        return
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as exc:
        yield Finding(
            "unknown",
            f"callback URL: {host} has no address here ({exc}), and workers call {url}",
            "name a host that they find, in callback_url",
        )


# --- one call -----------------------------------------------------------------


def _trial(executor: str, config: Mapping[str, Any], timeout: float) -> Iterator[Finding]:
    try:
        node = asyncio.run(_call(executor, config, timeout))
    except TimeoutError as exc:
        yield Finding(
            "problem",
            f"a trial call had no outcome: {exc}",
            "workers may all be busy; or they cannot reach the callback URL (on another host, set callback_host and "
            "callback_url); or the worker's log says 'payload rejected'",
        )
    except WorkerLostError as exc:
        mend = _ONE_FOR_BOTH if PayloadRejectedError.__name__ in str(exc) else "the worker's log says why"
        if WITHOUT_WOVE in str(exc):
            mend = 'pip install "wove[worker]" where the worker runs, and start it again'
        yield Finding("problem", f"a trial call was lost: {exc}", mend)
    except Exception as exc:
        yield Finding("problem", f"a trial call failed: {type(exc).__name__}: {scrub(str(exc))}")
    else:
        yield Finding("ok", f"a trial call ran on {node}, and its result came back")


async def _call(executor: str, config: Mapping[str, Any], seconds: float) -> str:
    if executor == "rq":
        config = {**config, "enqueue_options": {"failure_ttl": 1}}  # no trace of the trial stays
    definition = {"executor": executor, "executor_config": config, "delivery_timeout": seconds}
    async with ExecutorRuntime({"doctor": definition}) as runtime:
        return await runtime["doctor"].run(platform.node)
