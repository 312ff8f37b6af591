"""Runs that travel together: what the listener knows of a batch, and of its members.

A batch is to workers what a run is: it has an id, a key, executions, beats. What is said of the batch is said of
each of its members that has no outcome yet. Members are entries of a table until somebody asks for one alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wove import frames
from wove.callback_server.runs import OpenRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from wove.callback_server.run_table import OpenRuns
    from wove.frames import Frame
    from wove.shared_parts import Part

    #: Takes the slot of the worker, how many runs it has executed, and in how many seconds.
    OnTiming = Callable[[str, int, float], None]


class OpenBatch(OpenRun):
    """Several runs of one callable in one payload.

    Args:
        run_ids: its members, in the order of the payload.
        on_timing: called in the listener's thread when a worker says how long members took.
        settings: those of an :class:`OpenRun`; ``run_id`` is the batch's own.
    """

    __slots__ = (
        "_outlet",
        "_settings",
        "last_worker",
        "on_timing",
        "pending",
        "run_ids",
        "table",
        "withdrawn",
    )

    def __init__(self, *, run_ids: Sequence[str], on_timing: OnTiming, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings = settings
        self._outlet = settings["sink"]
        # Whoever speaks of the batch speaks of its members.
        self.sink = self._speak
        self.run_ids = run_ids
        self.on_timing = on_timing
        #: Members without an outcome, and their places.
        self.pending = {run_id: place for place, run_id in enumerate(run_ids)}
        #: Places of members that were cancelled, or are of no interest any more, in this order.
        self.withdrawn: list[int] = []
        #: The worker that had it, also when nothing more is expected of that.
        self.last_worker: dict[str, Any] = {}
        self.table: OpenRuns | None = None

    def reports_to(self, sink: Callable[[Iterable[Frame]], bool]) -> bool:
        """Tell whether its events go to ``sink``."""
        return bool(self._outlet == sink)

    def member(self, run_id: str) -> Member:
        """Return a member as a run of its own."""
        return Member(self, run_id, self._settings)

    def leave(self, run_id: str, *, withdrawn: bool) -> None:
        """Forget a member; ``withdrawn`` tells whether its worker has yet to hear of that."""
        place = self.pending.pop(run_id, None)
        if place is not None and withdrawn and place not in self.withdrawn:
            self.withdrawn.append(place)

    def withdraw(self, run_id: str) -> None:
        """Let the worker hear that a member is not wanted any more."""
        place = self.pending.get(run_id)
        if place is not None and place not in self.withdrawn:
            self.withdrawn.append(place)

    def _speak(self, batch: Iterable[Frame]) -> bool:
        spoken: list[Frame] = []
        for frame in batch:
            if frame["run_id"] != self.run_id:
                spoken.append(frame)
                continue
            for run_id in tuple(self.pending):
                if self.last_worker and _is_loss(frame):
                    # So that the error can name the worker that had it.
                    spoken.append(
                        frames.event(frames.TASK_STARTED, run_id, self.task_id, 1, 1, worker=self.last_worker)
                    )
                spoken.append({**frame, "run_id": run_id})
        return self._outlet(spoken) if spoken else True


class Member(OpenRun):
    """A run of a batch; shares the batch's executions as long as it is not submitted again by itself."""

    __slots__ = ("_batch",)

    def __init__(self, batch: OpenBatch, run_id: str, settings: dict[str, Any]) -> None:
        super().__init__(**{**settings, "run_id": run_id})
        self._batch: OpenBatch | None = batch
        self.opened_at = batch.opened_at
        self.executions = batch.executions
        self.worker = batch.worker
        self.job = batch.job

    def forsake(self) -> None:
        """Expect nothing more of the batch, which is expected to end its other members."""
        self.worker = {}
        if self._batch is not None:
            self._batch = None
            self.executions = {}
        super().forsake()

    def renew(self, attempt: int, message: list[Buffer] | None, part: Part | None = None) -> None:
        """Begin another attempt, outside of the batch."""
        if self._batch is not None and self._batch.table is not None:
            self._batch.table.part(self.run_id)
        super().renew(attempt, message, part)


def _is_loss(frame: Frame) -> bool:
    return bool(frame["type"] == frames.TASK_ERROR and frame["error"].get("source") == "backend")
