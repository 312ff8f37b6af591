"""Which connections belong to which executions: a process that dies loses all of its own.

A worker holds a connection open while its task runs (the open beat, or the one by which it
said that the task has started). A connection that is lost makes its executions suspect, when
they have no other; whether their process is dead is for others to find out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wove.callback_server.runs import Execution, OpenRun


class Contacts:
    """The connections of one listener that are known to belong to executions."""

    def __init__(self) -> None:
        self._by_connection: dict[Any, dict[Execution, OpenRun]] = {}

    def __len__(self) -> int:
        return len(self._by_connection)

    def heard(self, connection: Any, run: OpenRun, execution: Execution) -> None:
        """An execution has spoken over a connection; None for one that is not its own."""
        execution.last_contact = time.monotonic()
        execution.suspect_since = None
        if execution.over or connection is None:
            return
        execution.connections.add(connection)
        held = self._by_connection.setdefault(connection, {})
        if execution not in held and len(held) > 16:
            # A connection outlives many short tasks.
            for past in [e for e in held if e.over or not e.connections]:
                del held[past]
        held[execution] = run

    def lost(self, connection: Any) -> None:
        """A connection has ended; whoever has no other is suspect."""
        now = time.monotonic()
        for execution, run in self._by_connection.pop(connection, {}).items():
            execution.connections.discard(connection)
            if execution.connections or execution.over or execution not in run.executions.values():
                continue
            execution.suspect_since = now
            if run.on_suspect is not None and run.suspect_since is not None:
                run.on_suspect(run)
