"""What a worker's parent process reports when the task's own process cannot."""

from __future__ import annotations

import base64
import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from wove.errors import WoveError
from wove.security import PAYLOAD_MAGIC
from wove.worker.assignment import Assignment
from wove.worker.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("wove.worker")

#: How payloads begin that travel as base64 text; its last character depends on what follows.
_MAGIC_TEXT = base64.b64encode(PAYLOAD_MAGIC).decode("ascii").rstrip("=")[:-1]

#: What a report imports where it is first needed elsewhere.
_NEEDED_BY_REPORTS = (
    "encodings.idna",
    "fnmatch",
    "http.client",
    "ssl",
    "urllib.parse",
    "wove.no_pickle",
    "wove.tables",
    "wove.worker.allowed",
    "wove.worker.early",
    "wove.worker.origins",
)


def payload_in(args: Any) -> bytes | str | None:
    """Return the payload among a task's arguments, whatever the task is called; None of another task."""
    value = args[0] if isinstance(args, (list, tuple)) and args else None
    if isinstance(value, (bytes, bytearray)) and value.startswith(PAYLOAD_MAGIC):
        return bytes(value)
    if isinstance(value, str) and value.startswith(_MAGIC_TEXT):
        return value
    return None


def report_loss(payload: bytes | str, backend: str, reason: str) -> None:
    """Tell the submitter that the task's process died. Returns at once."""
    _in_background(payload, backend, lambda session: session.lost(reason))


def report_cancel(payload: bytes | str, backend: str) -> None:
    """Tell the submitter that the task was stopped, or never started. Returns at once."""

    def acknowledge(session: Session) -> None:
        session.cancel()
        session.acknowledge_cancel()

    _in_background(payload, backend, acknowledge)


def _in_background(payload: bytes | str, backend: str, tell: Callable[[Session], None]) -> None:
    # The parent's own loop must not wait for HTTP.
    def report() -> None:
        try:
            assignment = Assignment(payload)
            if assignment.attended:
                tell(Session(assignment, {"backend": backend, "job": assignment.job}))
        except WoveError as exc:
            logger.warning("the end of a task could not be reported: %s", exc)
        except Exception:
            logger.exception("the end of a task could not be reported")

    # The parent forks the next pool process while this thread runs. A module that is being imported
    # at that moment stays locked in the new process for good, and its first task hangs.
    for module in _NEEDED_BY_REPORTS:
        importlib.import_module(module)
    threading.Thread(target=report, name="wove-report", daemon=True).start()
