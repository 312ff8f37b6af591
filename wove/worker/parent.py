"""What a worker's parent process reports when the task's own process cannot."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from wove.errors import WoveError
from wove.worker.assignment import Assignment
from wove.worker.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("wove.worker")


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

    threading.Thread(target=report, name="wove-report", daemon=True).start()
