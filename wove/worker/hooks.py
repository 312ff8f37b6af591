"""What a backend's side of a worker adds to an execution."""

from __future__ import annotations

from typing import Any


class BackendHooks:
    """The backend's part in how an execution ends. This one has none: nothing is retried or kept.

    Attributes:
        passed: what the task returned, when it is the backend that it speaks to.
    """

    passed: Any = None

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
