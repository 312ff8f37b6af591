"""The Celery side: importing this module gives every app in the process the task ``wove.run``.

Start the workers you have with ``celery -A proj worker -I wove.worker.celery``, or set
``CELERY_WORKER_INCLUDE=wove.worker.celery``; the project's code does not change.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from billiard import current_process
from celery import shared_task, signals
from celery.exceptions import Ignore, TimeLimitExceeded, WorkerLostError

import wove
from wove.errors import WoveError
from wove.security import find_secrets
from wove.worker.execution import run
from wove.worker.parent import report_cancel, report_loss

#: The name that submitters send to, unless ``executor_config["task_name"]`` says otherwise.
TASK_NAME = "wove.run"


class TaskExited(RuntimeError):
    """A task raised SystemExit in a worker's main process; it was reported to the submitter as such."""


@shared_task(name=TASK_NAME, bind=True, ignore_result=True)
def run_payload(self: Any, payload: bytes | str) -> None:
    """Execute a payload; its outcome goes to the submitter, not to a result backend."""
    request = self.request
    info = request.delivery_info or {}
    again = bool(info.get("redelivered")) or bool(request.retries)
    try:
        completed = run(payload, backend={"backend": "celery", "job": request.id}, redelivered=again)
    except SystemExit as exc:
        # In a pool process this ends the process, as Celery expects; in the solo and threads
        # pools it would end the whole worker. Celery's own shutdown requests are subclasses.
        if type(exc) is SystemExit and current_process().name == "MainProcess":
            raise TaskExited(f"the task called sys.exit({exc.code!r})") from exc
        raise
    if not completed:
        raise Ignore  # cancelled: neither a success nor a failure of the task


@signals.task_failure.connect(weak=False)
def _on_failure(sender: Any = None, exception: Any = None, args: Any = None, **_: Any) -> None:
    # Celery's parent process tells of a pool process that died or was killed for its time
    # limit: there, nobody else is left to report it.
    if getattr(sender, "name", None) != TASK_NAME or not args:
        return
    if isinstance(exception, (WorkerLostError, TimeLimitExceeded)):
        report_loss(args[0], "celery", f"the worker process was lost: {exception}")


@signals.task_revoked.connect(weak=False)
def _on_revoked(sender: Any = None, request: Any = None, expired: Any = None, **_: Any) -> None:
    args = getattr(request, "args", None)
    if getattr(sender, "name", None) != TASK_NAME or not args:
        return
    if expired:
        report_loss(args[0], "celery", "the task expired in the queue before a worker took it")
    else:
        report_cancel(args[0], "celery")


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


def _status(state: Any) -> dict[str, Any]:
    """Say which Wove this worker has, and which secret by its key id: ``wove doctor`` asks."""
    try:
        ring = find_secrets()
    except WoveError as exc:
        return {"version": wove.__version__, "kids": [], "source": str(exc)}
    return {"version": wove.__version__, "kids": ring.kids, "source": ring.source}
