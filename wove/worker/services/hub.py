"""The open runs of a network service, and who listens to each.

A run outlives the connection it came by: for a while it goes on, and its outcome is kept, so that a caller
whose connection broke can come back for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from wove import frames
from wove.exchange import PING, Packet, encode_note, lost_frame
from wove.wire import pack_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from wove.worker.services.engine import Engine

logger = logging.getLogger("wove.worker")

#: Seconds that a run goes on, or its outcome is kept, when nobody is connected to hear of it.
RETENTION_SECONDS = 60.0
#: Bytes of outcomes that are kept for callers who are away.
MAX_KEPT = 256 * 1024 * 1024
#: Ids of ended runs that are remembered, so that no command is executed twice.
MAX_REMEMBERED = 20_000
#: Events that wait for a slow reader; beyond it news is dropped, outcomes never.
MAX_WAITING = 1_000
#: Seconds between two looks at runs that nobody listens to.
SWEEP_SECONDS = 1.0


class Listener:
    """One connection's end: events of its runs, in order, to be written by :meth:`take`."""

    def __init__(self) -> None:
        self._events: deque[Sequence[Buffer]] = deque()
        self._ready = asyncio.Event()
        self.open: set[str] = set()
        self.ended: list[str] = []
        self.closed = False
        #: Whether anything has come from its caller since somebody last looked.
        self.heard = False
        #: Takes what waits once the last open run has ended, if it can take that at once; and whether it may now.
        self.deliver_now: Callable[[Sequence[Sequence[Buffer]]], bool] | None = None
        self._idle = False

    def put(self, run_id: str, kind: str, parts: Sequence[Buffer]) -> None:
        """Take an event of a run."""
        if kind in frames.TERMINAL:
            self.open.discard(run_id)
            self.ended.append(run_id)
        elif len(self._events) > MAX_WAITING:
            return
        self.say(parts)
        if self.deliver_now is not None and self._idle and not self.open:
            if self.deliver_now(self._events):
                self._events.clear()
                self.ended.clear()  # such a caller says itself which outcomes have arrived

    def say(self, parts: Sequence[Buffer]) -> None:
        """Take a packet that belongs to no run."""
        self._events.append(parts)
        self._ready.set()

    async def take(self, seconds: float) -> list[Sequence[Buffer]]:
        """Return what waits; after so many seconds without anything a ping.

        Meanwhile what ``deliver_now`` can take goes there.
        """
        until = time.monotonic() + seconds
        self._idle = True
        try:
            while (rest := until - time.monotonic()) > 0:
                # It may wake for what was delivered before its turn came.
                if waiting := await self.take_within(rest):
                    return waiting
            return [encode_note(PING)]
        finally:
            self._idle = False

    async def take_within(self, seconds: float) -> list[Sequence[Buffer]]:
        """Return what waits, or comes within so many seconds."""
        if not self._events and seconds > 0:
            self._ready.clear()
            # An event that is set in vain costs less than the machinery of a timeout.
            limit = asyncio.get_running_loop().call_later(seconds, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                limit.cancel()
        waiting = list(self._events)
        self._events.clear()
        return waiting

    async def take_quick(self, seconds: float) -> list[Sequence[Buffer]]:
        """Return what comes until all runs have ended, or so many seconds are over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        taken: list[Sequence[Buffer]] = []
        while not self.done and (rest := until - loop.time()) > 0:
            taken += await self.take_within(rest)
        return taken + await self.take_within(0)

    @property
    def done(self) -> bool:
        """Whether all its runs have ended."""
        return not self.open


class _OpenRun:
    __slots__ = (
        "abandoned",
        "away_since",
        "begun",
        "keep",
        "listener",
        "outcome",
        "size",
        "started",
        "task_id",
    )

    def __init__(self, task_id: str, listener: Listener, *, keep: bool) -> None:
        self.task_id = task_id
        self.listener: Listener | None = listener
        self.keep = keep
        self.begun = time.monotonic()
        self.away_since = 0.0
        self.abandoned = False
        self.started: Sequence[Buffer] | None = None
        self.outcome: tuple[str, Sequence[Buffer]] | None = None
        self.size = 0


class Hub:
    """All methods are called in the service's event loop.

    Args:
        engine: runs the tasks.
        retention: seconds that a run whose caller is away goes on, and its outcome is kept.
    """

    def __init__(self, engine: Engine, *, retention: float = RETENTION_SECONDS) -> None:
        self._engine = engine
        self._retention = retention
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._runs: dict[str, _OpenRun] = {}
        self._remembered: OrderedDict[str, None] = OrderedDict()
        self._inbox: deque[tuple[str, str, Sequence[Buffer]]] = deque()
        self._woken = False
        self._kept = 0
        self._sweeping: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self.draining = False
        self.finished = 0

    def __len__(self) -> int:
        return sum(run.outcome is None for run in self._runs.values())

    # --- commands -------------------------------------------------------------

    def take(self, packet: Packet, listener: Listener) -> None:
        """Take a command of somebody who listens.

        Raises:
            ProtocolError: it is malformed.
        """
        if packet.kind == frames.RUN_TASK:
            self._start(packet, listener)
        elif packet.kind == frames.CANCEL_TASK:
            self.cancel(packet.run_id)

    def _start(self, packet: Packet, listener: Listener) -> None:
        run_id, task_id = packet.run_id, packet.task_id
        listener.open.add(run_id)
        if run_id in self._runs:
            # Sent again because its connection broke: it runs once, and is listened to anew.
            self._attach(run_id, listener)
        elif run_id in self._remembered:
            self._refuse(
                run_id, task_id, listener, "this run was executed before, and its outcome handed over"
            )
        elif self.draining:
            self._refuse(run_id, task_id, listener, "the worker service is shutting down")
        else:
            self._runs[run_id] = _OpenRun(task_id, listener, keep=packet.envelope.get("keep") is True)
            self._settled.clear()

            def emit(kind: str, parts: Sequence[Buffer]) -> None:
                self._post(run_id, kind, parts)

            self._engine.run(packet, emit)

    def _refuse(self, run_id: str, task_id: str, listener: Listener, why: str) -> None:
        listener.put(run_id, frames.TASK_ERROR, pack_message(lost_frame(run_id, task_id, why), []))

    def cancel(self, run_id: str) -> None:
        """Cancel a run; an unknown one is ignored."""
        run = self._runs.get(run_id)
        if run is not None and run.outcome is None:
            self._engine.cancel(run_id)

    # --- connections that come and go -------------------------------------------

    def attach(self, run_ids: Iterable[str], listener: Listener) -> list[str]:
        """Listen to runs again; return those that are not known here."""
        unknown = []
        for run_id in run_ids:
            if run_id in self._runs:
                listener.open.add(run_id)
                self._attach(run_id, listener)
            else:
                unknown.append(run_id)
        return unknown

    def _attach(self, run_id: str, listener: Listener) -> None:
        run = self._runs[run_id]
        if run.listener is not None and run.listener is not listener:
            run.listener.open.discard(run_id)
        run.listener = listener
        if run.started is not None:
            listener.put(run_id, frames.TASK_STARTED, run.started)
        if run.outcome is not None:
            listener.put(run_id, *run.outcome)

    def detach(self, listener: Listener, *, retention: float | None = None) -> None:
        """Its connection is gone: its runs wait for somebody else, for a while."""
        listener.closed = True
        away_since = time.monotonic() - (0 if retention is None else self._retention - retention)
        for run in self._runs.values():
            if run.listener is listener:
                run.listener = None
                run.away_since = away_since
        if self._sweeping is None and self._runs:
            self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def delivered(self, run_ids: Iterable[str]) -> None:
        """The outcomes of these runs have arrived: forget them."""
        for run_id in run_ids:
            run = self._runs.get(run_id)
            if run is not None and run.outcome is not None:
                self._forget(run_id, run)

    def _forget(self, run_id: str, run: _OpenRun) -> None:
        del self._runs[run_id]
        self._kept -= run.size
        self._remembered[run_id] = None
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _sweep(self) -> None:
        now = time.monotonic()
        away = [(run_id, run) for run_id, run in self._runs.items() if run.listener is None]
        for run_id, run in away:
            if now - run.away_since < self._retention:
                continue
            if run.outcome is not None:
                self._forget(run_id, run)
            elif not run.keep and not run.abandoned:
                run.abandoned = True
                logger.info("run %s of %s: its caller is gone; cancelled", run_id, run.task_id)
                self._engine.cancel(run_id)
        # A caller who never says that an outcome has arrived does not fill the memory.
        while self._kept > MAX_KEPT:
            run_id, run = next((i, r) for i, r in self._runs.items() if r.outcome is not None)
            logger.warning("the outcome of run %s of %s was kept for too long", run_id, run.task_id)
            self._forget(run_id, run)
        again = any(run.listener is None for run in self._runs.values())
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep) if again else None

    # --- events -----------------------------------------------------------------

    def _post(self, run_id: str, kind: str, parts: Sequence[Buffer]) -> None:
        if not self._inbox and threading.get_ident() == self._thread:
            # As they come from child processes: not past those that another thread has posted.
            self._event(run_id, kind, parts)
            if self.draining and not len(self):
                self._settled.set()
            return
        # From any thread; however many events come while the loop is busy, it is woken once.
        self._inbox.append((run_id, kind, parts))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._read)
            except RuntimeError:
                pass  # the loop has ended, and the service with it

    def _read(self) -> None:
        self._woken = False
        while self._inbox:
            self._event(*self._inbox.popleft())
        if self.draining and not len(self):
            self._settled.set()

    def _event(self, run_id: str, kind: str, parts: Sequence[Buffer]) -> None:
        run = self._runs.get(run_id)
        if run is None:
            return
        if kind == frames.TASK_STARTED:
            run.started = parts
        elif kind in frames.TERMINAL:
            run.outcome = (kind, parts)
            run.size = sum(memoryview(part).nbytes for part in parts)
            self._kept += run.size
            self.finished += 1
            if logger.isEnabledFor(logging.INFO):
                logger.info(
                    "run %s of %s: %s after %.3f s", run_id, run.task_id, kind, time.monotonic() - run.begun
                )
        if run.listener is not None:
            run.listener.put(run_id, kind, parts)
        elif run.outcome is not None and run.abandoned:
            self._forget(run_id, run)

    # --- the end ------------------------------------------------------------------

    async def drain(self, seconds: float) -> bool:
        """Take no more runs and wait for the open ones; tell whether all have ended."""
        self.draining = True
        if not len(self):
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def cancel_all(self) -> None:
        """Cancel what runs."""
        for run_id in list(self._runs):
            self.cancel(run_id)

    def close(self) -> None:
        """Stop looking after runs."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
