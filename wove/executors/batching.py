"""How many runs travel together: as many as keep a worker busy for a moment, and leave the others theirs.

Grows and shrinks by what workers say of how long runs took, as joblib's ``batch_size="auto"`` does.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError
from wove.tables import MAX_RUNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wove.frames import Frame

AUTO = "auto"

#: Seconds that a worker should be busy with one message.
TARGET_SECONDS = 0.05
#: How much larger the next batch may be than the last one: one lucky measurement is none.
GROWTH = 4
#: Runs in one batch at most, where nobody asks for more.
MAX_AUTO = 256
#: Messages that each worker should find, so that it need not wait for the next.
SHARES = 2
#: Runs of a callable whose pace is not known that wait for a worker; more when as many are at work already.
SCOUTS = 8
#: Seconds for which runs wait for others while every worker has something to do, and while it has enough to do.
LINGER_SECONDS = 0.01
ENOUGH_SECONDS = 0.5
#: Seconds after which a worker of which nothing was heard is not counted any more.
SLOT_SECONDS = 30.0
#: Callables whose durations are remembered.
MAX_CALLABLES = 1_000


class Batching:
    """Decides which runs travel together. Callable from any thread.

    Args:
        mode: ``"auto"``, a number of runs, or None: ``"auto"`` for the runs of a ``map``, and 1 for others.
    """

    def __init__(self, mode: str | int | None) -> None:
        self._mode = mode
        self._pace: OrderedDict[str, _Pace] = OrderedDict()
        self._slots: dict[str, float] = {}
        self._lock = threading.Lock()

    @classmethod
    def read(cls, config: Mapping[str, Any], *, plain: bool) -> Batching:
        """Read ``executor_config["batch"]``.

        Args:
            config: the ``executor_config``.
            plain: whether only plain data is sent: then workers may not be Python, and know single runs only,
                unless somebody says otherwise.

        Raises:
            ConfigurationError: it is neither ``"auto"`` nor a usable number.
        """
        mode = config.get("batch")
        if mode is not None and mode != AUTO and not (type(mode) is int and 1 <= mode <= MAX_RUNS):
            raise ConfigurationError(
                f'executor_config["batch"] is "auto", or how many runs travel in one message, from 1 to {MAX_RUNS}; '
                f"got {mode!r}"
            )
        return cls(1 if mode is None and plain else mode)

    def takes(self, frame: Frame) -> bool:
        """Tell whether a run may travel with others."""
        delivery = frame["delivery"]
        if self._mode == 1 or not (self._mode or delivery.get("mapped")):
            return False
        # What is to outlive its submitter, what others share, and what was submitted before goes alone.
        alone = delivery.get("keep") or "key" in delivery or delivery.get("alone") or delivery.get("repeated")
        return not alone and delivery.get("attempt", 1) == 1 and delivery.get("attended", True)

    def plan(
        self,
        task_id: str,
        waiting: int,
        in_flight: int,
        open_runs: int,
        waited: float,
        count_unstarted: Callable[[], int],
    ) -> list[int]:
        """Return how many runs of a callable leave now, message by message; others wait a moment.

        Args:
            task_id: the callable's name.
            waiting: its runs that wait to leave.
            in_flight: messages with others that were sent and are not done.
            open_runs: runs that are open: no worker is to get more than its share of them.
            waited: for how many seconds the first of them has waited.
            count_unstarted: returns how many of the messages no worker has begun, as far as known.
        """
        if type(self._mode) is int:
            return _split(waiting, self._mode)
        with self._lock:
            pace = self._pace.get(task_id)
            size = pace.size if pace is not None else 1
            slots = self._count_slots()
        if pace is None:
            # Where they take their time, whoever is free soon has one; where nobody is free, more are of no use.
            unstarted = count_unstarted()
            return [1] * max(0, min(waiting, max(SCOUTS, in_flight - unstarted) - unstarted))
        if size == 1:
            return [1] * waiting  # they take their time: whoever is free takes one
        size = max(1, min(size, open_runs // (SHARES * slots)))
        if waited >= ENOUGH_SECONDS:
            return _split(waiting, size)  # there may be workers of which nothing was heard yet
        room = SHARES * slots - in_flight
        if room <= 0 or (waiting < size and in_flight >= slots and waited < LINGER_SECONDS):
            return []
        return _split(min(waiting, room * size), size)

    def _count_slots(self) -> int:
        now = time.monotonic()
        for slot in [slot for slot, seen in self._slots.items() if now - seen > SLOT_SECONDS]:
            del self._slots[slot]
        return max(1, len(self._slots))

    def listener(self, task_id: str) -> Callable[[str, int, float], None]:
        """Return what takes a worker's word on how long runs of a callable took."""
        return partial(self._heard, task_id)

    def _heard(self, task_id: str, slot: str, count: int, seconds: float) -> None:
        with self._lock:
            self._slots[slot] = time.monotonic()
            pace = self._pace.get(task_id)
            if pace is None:
                pace = self._pace[task_id] = _Pace()
                if len(self._pace) > MAX_CALLABLES:
                    self._pace.popitem(last=False)
            pace.note(count, seconds)


def _split(count: int, size: int) -> list[int]:
    """Split runs into messages of about equal size, none of them beyond it."""
    messages = -(-count // size)
    return [count // messages + (i < count % messages) for i in range(messages)] if count else []


class _Pace:
    """How long runs of one callable take, and how many of them make a batch."""

    __slots__ = ("seconds", "size")

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.size = 1

    def note(self, count: int, seconds: float) -> None:
        """Take in that ``count`` runs took so many seconds."""
        latest = seconds / count
        self.seconds = latest if self.seconds is None else (self.seconds + latest) / 2
        fitting = int(TARGET_SECONDS / self.seconds) if self.seconds > 0 else MAX_AUTO
        self.size = max(1, min(fitting, self.size * GROWTH, MAX_AUTO))
