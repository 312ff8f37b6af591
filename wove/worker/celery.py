"""The Celery side: importing this module gives every app in the process the task ``wove.run``.

Start the workers you have with ``celery -A proj worker -I wove.worker.celery``, or set
``CELERY_WORKER_INCLUDE=wove.worker.celery``; the project's code does not change.
"""

from __future__ import annotations

import base64
import logging
import os
import socket
import sys
import threading
from typing import Any

from billiard import current_process
from celery import shared_task, signals
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded, WorkerLostError

import wove
from wove.errors import WoveError, is_time_limit
from wove.keyring import current_secrets
from wove.wire import PARKED, PARKED_SUFFIX
from wove.worker.execution import run
from wove.worker.hooks import BackendHooks
from wove.worker.parent import payload_in, report_cancel, report_loss

#: The name that submitters send to, unless ``executor_config["task_name"]`` says otherwise.
TASK_NAME = "wove.run"

logger = logging.getLogger("wove.worker")


class TaskOutOfMemory(RuntimeError):
    """A task raised MemoryError; it was reported to the submitter as such."""


class TaskExited(RuntimeError):
    """A task raised SystemExit in a worker's main process; it was reported to the submitter as such."""


class CeleryHooks(BackendHooks):
    """Celery retries what the task's settings say; its result backend, if it has one, keeps outcomes."""

    # A message is acknowledged as soon as it is at work, and then nobody but the worker knows of it.
    unseen = True

    def __init__(self, task: Any) -> None:
        self._task = task

    def runs_again(self, ending: Any) -> bool:
        """``Retry``, ``Reject(requeue=True)``, and what ``autoretry_for`` names, while retries are left."""
        if isinstance(ending, Retry):
            return True
        task = self._task
        if isinstance(ending, Reject):
            return bool(ending.requeue and task.acks_late)  # else it was acknowledged, and is gone
        wanted = tuple(getattr(task, "autoretry_for", ()))
        # Celery wraps a task that retries by itself, and keeps what it was.
        if not hasattr(task, "_orig_run") or not isinstance(ending, wanted):
            return False
        if isinstance(ending, (Ignore, *getattr(task, "dont_autoretry_for", ()))):
            return False
        most = getattr(task, "retry_kwargs", {}).get("max_retries", task.max_retries)
        return most is None or task.request.retries < most

    def park(self, outcome: bytes) -> None:
        """Keep a signed outcome in the result backend, under an id of its own."""
        if not self._keeps_results("outcome"):
            return
        if self._task.app.conf.result_serializer != "json":
            # Other formats would be decoded by the submitter before anything is verified.
            logger.error(
                "the outcome of task %s is lost: nobody took it, and it is kept only with result_serializer = "
                "'json'", self._task.request.id,
            )  # fmt: skip
            return
        kept = {PARKED: base64.b64encode(outcome).decode("ascii")}
        self._task.backend.store_result(f"{self._task.request.id}{PARKED_SUFFIX}", kept, "SUCCESS")

    def keep(self, result: Any, failure: BaseException | None) -> None:
        """Keep the outcome as Celery keeps any task's, for ``AsyncResult`` to fetch."""
        if not self._keeps_results("result"):
            return
        backend, task_id = self._task.backend, self._task.request.id
        if failure is not None:
            backend.store_result(task_id, failure, "FAILURE")
            return
        try:
            backend.store_result(task_id, result, "SUCCESS")
        except Exception as exc:
            if is_time_limit(exc):
                raise
            logger.warning("the result of task %s is kept as text: %s", task_id, exc)
            backend.store_result(task_id, repr(result)[:10_000], "SUCCESS")

    def _keeps_results(self, what: str) -> bool:
        from celery.backends.base import DisabledBackend

        if isinstance(self._task.backend, DisabledBackend):
            logger.error(
                "the %s of task %s is lost: nobody took it, and this fleet has no result backend to keep it in",
                what, self._task.request.id,
            )  # fmt: skip
            return False
        return True


@shared_task(name=TASK_NAME, bind=True, ignore_result=True)
def run_payload(self: Any, payload: bytes | str) -> None:
    """Execute a payload; its outcome goes to the submitter, not to a result backend."""
    execute(self, payload)


def execute(task: Any, payload: bytes | str) -> None:
    """Execute a payload in a bound Celery task: for tasks of your own, with ``task_name`` in the environment.

    Args:
        task: the bound task, ``self``; its ``autoretry_for`` and retries apply.
        payload: the task's argument.

    Raises:
        BaseException: what the user's function raised, so that Celery counts the task as failed.
    """
    request = task.request
    info = request.delivery_info or {}
    again = request.retries or bool(info.get("redelivered"))
    worker = {
        "backend": "celery",
        "job": request.id,
        "node": request.hostname or "",
        "answers": _parent_answers() and bool(task.app.conf.worker_enable_remote_control),
        "parent": os.getpid() if current_process().name == "MainProcess" else os.getppid(),
        "requeues": bool(task.acks_late and task.reject_on_worker_lost),
    }
    try:
        completed = run(payload, backend=worker, redelivered=again, hooks=CeleryHooks(task))
    except SystemExit as exc:
        # In a pool process this ends the process, as Celery expects; in the solo and threads
        # pools it would end the whole worker. Celery's own shutdown requests are subclasses.
        if type(exc) is SystemExit and current_process().name == "MainProcess":
            raise TaskExited(f"the task called sys.exit({exc.code!r})") from exc
        raise
    except MemoryError as exc:
        # Celery's parent process raises it anew, and the whole worker goes down with one task.
        raise TaskOutOfMemory(f"the task raised MemoryError: {exc}") from exc
    if not completed:
        raise Ignore  # cancelled: neither a success nor a failure of the task


def _parent_answers() -> bool:
    """Tell whether the worker answers remote control commands while this task runs."""
    if current_process().name != "MainProcess":
        return True  # a pool process: its parent is free
    if threading.current_thread() is threading.main_thread():
        return False  # the solo pool
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    patched = (gevent is not None and gevent.is_module_patched("threading")) or (
        eventlet is not None and eventlet.is_monkey_patched("thread")
    )
    return not patched


@signals.task_failure.connect(weak=False)
def _on_failure(sender: Any = None, exception: Any = None, args: Any = None, **_: Any) -> None:
    # Celery's parent process tells of a pool process that died or was killed for its time
    # limit: there, nobody else is left to report it.
    payload = payload_in(args)
    if payload is not None and isinstance(exception, (WorkerLostError, TimeLimitExceeded)):
        report_loss(payload, "celery", f"the worker process was lost: {exception}")


@signals.task_revoked.connect(weak=False)
def _on_revoked(sender: Any = None, request: Any = None, expired: Any = None, **_: Any) -> None:
    payload = payload_in(getattr(request, "args", None))
    if payload is None:
        return
    if expired:
        report_loss(payload, "celery", "the task expired in the queue before a worker took it")
    else:
        report_cancel(payload, "celery")


@signals.worker_init.connect(weak=False)
def _import_from_project_folder(**_: Any) -> None:
    # `celery -A proj` looks for the project in the folder it was started in, and nowhere else
    # afterwards; functions that go by name are looked for there as well, last of all.
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


@signals.worker_ready.connect(weak=False)
def _offer_status(**_: Any) -> None:
    # Imported here: a worker has it loaded, whoever else imports this module need not.
    from celery.worker.control import inspect_command

    inspect_command(name="wove_status")(_status)
    inspect_command(name="wove_runs", variadic="ids")(_runs)


def _runs(state: Any, ids: list[str], **_: Any) -> dict[str, Any]:
    """Say where tasks are: ``active``, ``reserved`` or ``died``, with a word about it, and who says so.

    Celery's own ``query_task`` calls a task active until the death of its process was dealt
    with, which can take seconds.
    """
    return {"pid": os.getpid(), "host": socket.gethostname(), "runs": _where(ids)}


def _where(ids: list[str]) -> dict[str, list[str]]:
    from celery.worker import state as tasks

    wanted = set(ids)
    found = {}
    for task_id in wanted.intersection(tasks.requests):
        found[task_id] = ["reserved", ""]
    # Celery knows one task per id. Of a message that came twice, the one at work counts.
    for request in _active(tasks):
        if request.id not in wanted or found.get(request.id, [""])[0] == "active":
            continue
        death = _death(request.worker_pid)
        found[request.id] = ["died", death] if death else ["active", _activity(request.worker_pid)]
    return found


def _active(tasks: Any) -> list[Any]:
    while True:
        try:
            return list(tasks.active_requests)
        except RuntimeError:
            continue  # a thread has begun another task meanwhile


def _activity(pid: int | None) -> str:
    """Say what a process is at by the kernel's letter, R for running, where the kernel can be asked."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _death(pid: int | None) -> str:
    """Say how a pool process ended; nothing of one that lives, or is not a process of ours."""
    if not pid or pid == os.getpid():
        return ""
    try:
        # Only looks: Celery is to reap it.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (OSError, AttributeError):
        return ""
    if ended is None:
        return ""
    return f"{'exit code' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status}"


def _status(state: Any) -> dict[str, Any]:
    """Say which Wove this worker has, and which secret by its key id: ``wove doctor`` asks."""
    try:
        ring = current_secrets()
    except WoveError as exc:
        return {"version": wove.__version__, "kids": [], "source": str(exc)}
    return {"version": wove.__version__, "kids": ring.kids, "source": ring.source}
