"""What runs on the other side: execute a payload, report its outcome.

Kept light: a forking RQ worker pays these imports once per job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove.worker.context import RunContext, current

if TYPE_CHECKING:
    from wove.worker.execution import arun, run

__all__ = ["RunContext", "arun", "current", "run"]


def __getattr__(name: str) -> Any:
    if name in ("run", "arun"):
        from wove.worker import execution

        return getattr(execution, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
