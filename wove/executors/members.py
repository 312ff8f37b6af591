"""The batches of an environment that have no outcome yet, and who travels in them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wove.executors.packing import Parcel
    from wove.frames import Frame


class Members:
    """Knows of each run that travels with others in which batch it is. Batches are registered from any thread."""

    def __init__(self) -> None:
        #: How a run was called, and in which batch it travels.
        self._members: dict[str, tuple[Frame, str]] = {}
        #: By batch, how many of its members are wanted; by task, which batches those are.
        self._wanted: dict[str, int] = {}
        self._batches: dict[str, set[str]] = {}
        self._counting = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._members)

    def register(self, parcel: Parcel) -> None:
        """Note who travels in a batch: it may be given back before the broker has answered us."""
        batch = parcel.frame["run_id"]
        self._wanted[batch] = len(parcel.members)
        with self._counting:
            self._batches.setdefault(parcel.frame["task_id"], set()).add(batch)
        self._members.update({waiting.frame["run_id"]: (waiting.frame, batch) for waiting in parcel.members})

    def called(self, run_id: str) -> Frame | None:
        """Return how a member was called; None for a run that is none."""
        member = self._members.get(run_id)
        return member[0] if member is not None else None

    def is_wanted(self, batch: str) -> bool:
        """Tell whether any member of a batch is wanted yet."""
        return batch in self._wanted

    def batches_of(self, task_id: str) -> tuple[str, ...]:
        """Return the batches of that task."""
        return tuple(self._batches.get(task_id, ()))

    def let_go(self, run_id: str) -> bool:
        """Forget a run; tell whether it was the last one of its batch."""
        member = self._members.pop(run_id, None)
        if member is None:
            return False
        frame, batch = member
        left = self._wanted.get(batch, 1) - 1
        if left:
            self._wanted[batch] = left
            return False
        self._wanted.pop(batch, None)
        with self._counting:
            batches = self._batches.get(frame["task_id"], set())
            batches.discard(batch)
            if not batches:
                self._batches.pop(frame["task_id"], None)
        return True

    def clear(self) -> None:
        """Forget all of them."""
        self._members.clear()
        self._wanted.clear()
        self._batches.clear()
