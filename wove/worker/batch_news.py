"""What is to be said of a batch's runs, collected until a request says it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from wove.errors import normalize_exception
from wove.tables import ERROR
from wove.wire import pack_message

if TYPE_CHECKING:
    from wove.errors import EncodeError
    from wove.frames import Frame
    from wove.tables import Row


class News:
    """Outcomes, frames, and how long runs took. Without a lock.

    Attributes:
        rows: the outcomes.
        since: when the first of them came, in monotonic seconds.
        frames: what the runs said of themselves.
        executed: how many runs were executed.
        busy: the seconds they took together.
    """

    __slots__ = ("busy", "executed", "frames", "rows", "since")

    def __init__(self, rows: list[Row] | None = None) -> None:
        self.rows: list[Row] = [] if rows is None else rows
        self.since = 0.0
        self.frames: list[Frame] = []
        self.executed = 0
        self.busy = 0.0

    def add(self, place: int, codec: str, data: bytes) -> None:
        """Add the outcome of the run at a place."""
        if not self.rows:
            self.since = time.monotonic()
        self.rows.append((place, codec, data))

    def add_undeliverable(self, place: int, error: EncodeError) -> None:
        """Add what stands for an outcome that cannot be delivered."""
        data = pack_message({"error": normalize_exception(error, source="worker")}, [])
        self.add(place, ERROR, b"".join(data))

    def add_time(self, seconds: float) -> None:
        """Count a run that was executed."""
        self.executed += 1
        self.busy += seconds

    def put_back(self, earlier: News) -> None:
        """Say once more, before the rest, the outcomes and times that a request has said in vain."""
        if earlier.rows:
            self.rows[:0] = earlier.rows
            self.since = earlier.since
        self.executed += earlier.executed
        self.busy += earlier.busy
