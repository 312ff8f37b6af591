"""What a backend's side of a worker adds to an execution."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from wove.errors import is_time_limit

if TYPE_CHECKING:
    from wove.worker.session import Session

logger = logging.getLogger("wove.worker")


class BackendHooks:
    """The backend's part in how an execution ends. This one has none: nothing is retried or kept.

    Attributes:
        passed: what the task returned, when it is the backend that it speaks to.
        unseen: whether the backend forgets a task that a worker has taken, should that die as a whole.
    """

    passed: Any = None
    unseen: bool = False

    def refused(self, session: Session) -> None:
        """The run is not started: it is not wanted any more, or another worker is at it."""

    def begins(self, session: Session) -> None:
        """The run is about to start."""

    def ends(self, result: Any, failure: BaseException | None, *, source: str = "task") -> None:
        """The outcome is final, and will be delivered when this returns."""

    def runs_again(self, ending: Any) -> bool:
        """Tell whether the backend will run the payload again.

        Args:
            ending: the exception that the task raised, or what it returned.
        """
        return False

    def park(self, outcome: bytes) -> None:
        """Keep a signed outcome that could not be delivered, for the submitter's ``probe`` to find."""

    def keep(self, result: Any, failure: BaseException | None) -> None:
        """Keep the outcome of work that nobody waits for, as the backend keeps results of its own."""


def keep(
    session: Session, hooks: BackendHooks, *, result: Any = None, failure: BaseException | None = None
) -> None:
    """Let the backend keep an outcome that nobody took."""
    for attempt in (1, 2):
        try:
            if session.parked is not None:
                hooks.park(session.parked)
            if session.unclaimed:
                hooks.keep(result, failure)
        except Exception as exc:
            if attempt == 1 and is_time_limit(exc):
                continue  # it strikes but once
            logger.exception("the outcome of run %s was not kept by the backend", session.assignment.run_id)
        return
