"""When each open run of an environment has to be looked at next, and why."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from wove.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.run_state import Run


class Deadlines:
    """The deadlines of open runs, by the clock that the runs' own times are of.

    A run is watched again when it gets a deadline that is nearer than those it had; one that moves away,
    as each sign of life moves it, is found out when the earlier time has come.

    Args:
        open_runs: the open runs by their ids, as they are at any time: whoever owns them changes them.
    """

    def __init__(self, open_runs: Mapping[str, Run]) -> None:
        self._open = open_runs
        self._times: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._times)

    def watch(self, run: Run) -> None:
        """Take note of the run's next deadline."""
        due, _ = _due(run)
        if due is None:
            return
        heapq.heappush(self._times, (due, run.run_id))
        if len(self._times) > 64 + 4 * len(self._open):
            # Mostly entries of runs that have ended: kept until their time they would pile up.
            live = {run_id: _due(open_run)[0] for run_id, open_run in self._open.items()}
            self._times = [(when, run_id) for run_id, when in live.items() if when is not None]
            heapq.heapify(self._times)

    def next(self) -> float | None:
        """Return when something may be due; None while nothing ever is."""
        while self._times and self._times[0][1] not in self._open:
            heapq.heappop(self._times)
        return self._times[0][0] if self._times else None

    def take(self, now: float) -> tuple[Run, str] | None:
        """Return a run of which a deadline has passed, which is watched no more, and what it was the deadline of.

        That is ``cancel``, ``timeout``, ``start`` or ``heartbeat``.
        """
        while self._times and self._times[0][0] <= now:
            _, run_id = heapq.heappop(self._times)
            run = self._open.get(run_id)
            if run is None:
                continue
            due, reason = _due(run)
            if due is not None and due <= now:
                return run, reason
            self.watch(run)
        return None


def _due(run: Run) -> tuple[float | None, str]:
    policy = run.policy
    candidates = []
    if run.cancel_by is not None:
        candidates.append((run.cancel_by, "cancel"))
    if policy.timeout is not None:
        candidates.append((run.opened_at + policy.timeout, "timeout"))
    if policy.start_timeout is not None and not run.ever_started and run.state is not RunState.LOST:
        candidates.append((run.opened_at + policy.start_timeout, "start"))
    if run.last_seen is not None and policy.heartbeat_seconds is not None:
        candidates.append((run.last_seen + policy.heartbeat_seconds, "heartbeat"))
    return min(candidates) if candidates else (None, "")
