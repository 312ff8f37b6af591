"""The threads of a child process that take its commands, one at a time, and run short tasks between two of them.

Handing a task to another thread costs more than most short tasks take themselves: two threads wake, and wait for
each other's turn with the interpreter. So the thread that reads runs a task itself, as long as tasks of that
function are short. A task that is not short after all loses nothing and holds nothing up: within milliseconds
another thread reads on in its place.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from wove import frames

if TYPE_CHECKING:
    from wove.exchange import Packet
    from wove.worker.services.child import Parent
    from wove.worker.services.runner import Run, Runner

logger = logging.getLogger("wove.worker")

#: Seconds that a short task takes at most; those of a function that takes longer belong in threads.
SHORT_SECONDS = 0.0003
#: Seconds between two looks at what the reading thread is in: whoever is in the same task at both is relieved.
LOOK_SECONDS = 0.002
#: Looks without a task until nobody looks any more.
IDLE_LOOKS = 50
#: Runs of a function that are left to threads once it was not short; doubled each time, up to the second.
LEAVE_RUNS = 16
LEAVE_RUNS_AT_MOST = 1_024
#: Functions that are told apart.
MAX_FUNCTIONS = 1_000


class Turns:
    """Takes commands until the parent says that this is the end, or is gone.

    Args:
        parent: where they come from.
        runner: runs them.
    """

    def __init__(self, parent: Parent, runner: Runner) -> None:
        self._parent = parent
        self._runner = runner
        self._packets: deque[Packet | None] = deque()
        self._lock = threading.Lock()
        #: Whose turn it is to read: a thread whose number is another has been relieved.
        self._turn = 0
        #: The task that the reading thread is in, and since when.
        self._inside: Run | None = None
        self._since = 0.0
        self._begun = 0
        self._looking = False
        self._look = threading.Event()
        self._ended = threading.Event()
        self._paces: dict[str, _Pace] = {}

    def run(self) -> None:
        """Take commands until the end. Blocks; they are taken in other threads, for tasks are run in them."""
        threading.Thread(target=self._look_on, name="wove-relief", daemon=True).start()
        self._start(0)
        self._ended.wait()

    def _start(self, turn: int) -> None:
        threading.Thread(
            target=self._read, args=(turn,), name=f"wove-task-reader-{turn}", daemon=True
        ).start()

    # --- in the thread whose turn it is -------------------------------------------

    def _read(self, turn: int) -> None:
        try:
            while self._turn == turn:
                if not self._packets:
                    self._parent.release()
                    self._packets.extend(self._parent.receive())
                    continue
                packet = self._packets.popleft()
                if packet is None or packet.kind == frames.SHUTDOWN:
                    self._ended.set()
                    return
                if packet.kind == frames.RUN_TASK:
                    self._take(packet)
                elif packet.kind == frames.CANCEL_TASK:
                    self._runner.cancel(packet.run_id)
        except BaseException:
            # Without its commands this process is of no use: its parent starts another.
            logger.exception("commands cannot be read any more")
            self._ended.set()

    def _take(self, packet: Packet) -> None:
        run = self._runner.admit(packet, self._parent.emit)
        pace = self._pace(packet.envelope.get("callable"))
        if pace is None or not pace.is_short() or not self._runner.has_room:
            self._runner.start(run)
            return
        if self._packets:
            # What comes of several short tasks leaves together.
            self._parent.hold()
        self._since = since = time.perf_counter()
        self._inside = run
        self._begun += 1
        if not self._looking:
            self._look.set()
        try:
            contextvars.Context().run(run.execute)
        except BaseException as exc:
            # Reported as the run's outcome; in a thread of the pool it would end there, too.
            logger.debug("run %s ended with %s", run.run_id, type(exc).__name__)
        finally:
            with self._lock:
                relieved = self._inside is not run
                if not relieved:
                    self._inside = None
            if relieved:
                run.relieved.set()
            else:
                pace.took(time.perf_counter() - since)

    def _pace(self, described: object) -> _Pace | None:
        if type(described) is not str:
            return None
        pace = self._paces.get(described)
        if pace is None:
            if len(self._paces) >= MAX_FUNCTIONS:
                self._paces.clear()
            pace = self._paces[described] = _Pace()
        return pace

    # --- in the thread that looks on ------------------------------------------------

    def _look_on(self) -> None:
        seen, idle = 0, 0
        before: Run | None = None
        while not self._ended.is_set():
            self._looking = True
            time.sleep(LOOK_SECONDS)
            run = self._inside
            # Seen twice: on a busy machine a short task takes long by the clock, and this thread as long to look.
            if run is not None and run is before:
                self._relieve(run)
            before = run
            idle = idle + 1 if self._begun == seen and self._inside is None else 0
            seen = self._begun
            if idle > IDLE_LOOKS:
                self._look.clear()
                self._looking = False
                if self._begun == seen:
                    self._look.wait()
                idle = 0

    def _relieve(self, run: Run) -> None:
        """Have another thread read on: this one is in a task that takes its time."""
        # The task counts as one of those that run in the pool's threads, however long it takes.
        run.relieved = threading.Event()
        with self._lock:
            if self._inside is not run:
                return
            self._inside = None
            self._turn += 1
        self._runner.occupy(run.relieved)
        pace = self._pace(run.described)
        if pace is not None:
            pace.leave()
        self._parent.release()
        self._start(self._turn)


class _Pace:
    """How long the tasks of one function take."""

    __slots__ = ("_left", "_penalty", "_strikes")

    def __init__(self) -> None:
        self._left = 0
        self._penalty = LEAVE_RUNS
        self._strikes = 0

    def is_short(self) -> bool:
        """Tell whether its next task is to be run by the thread that reads."""
        if not self._left:
            return True
        self._left -= 1
        return False

    def took(self, seconds: float) -> None:
        """Note how long a task took in that thread."""
        if seconds < SHORT_SECONDS:
            self._strikes = max(0, self._strikes - 1)
            return
        # A busy machine makes one task in a few take longer than it does.
        self._strikes += 4
        if self._strikes >= 12:
            self.leave()

    def leave(self) -> None:
        """Leave its next tasks to threads."""
        self._left, self._strikes = self._penalty, 0
        self._penalty = min(2 * self._penalty, LEAVE_RUNS_AT_MOST)
