"""The runs that a listener takes events for."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from wove import frames
from wove.errors import normalize_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from wove.callback_server.batches import OpenBatch
    from wove.callback_server.runs import Execution, OpenRun
    from wove.frames import Frame

#: Cancelled runs that are remembered for workers which have yet to hear of it.
MAX_CANCELLED = 4096
#: Ids of runs that have ended, by which work that nobody waits for is told from work that is done.
MAX_ENDED = 4096
#: Seconds after which a run that a worker has begun counts as withdrawn from all others: a copy of it that
#: a broker may hold is to be asked for.
BEGUN_SECONDS = 0.02


class OpenRuns:
    """The table of a listener. Read in its thread; runs are added from any thread."""

    def __init__(self) -> None:
        self._runs: dict[str, OpenRun] = {}
        #: Runs that travel in a batch; those that were asked for alone are among the runs as well.
        self._members: dict[str, OpenBatch] = {}
        self._lock = threading.Lock()
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        #: Counts what makes payloads that are under way unwanted. It begins anywhere: what another process said
        #: at this address means nothing here.
        self.withdrawn = random.getrandbits(48)
        self._counting = threading.Lock()
        # Runs that a worker is at, since when, and that were not counted yet; the oldest first.
        self._begun: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._runs) + len(self._members)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._runs or run_id in self._members

    def get(self, run_id: str) -> OpenRun | None:
        """Return the open run, or batch, with that id."""
        run = self._runs.get(run_id)
        if run is None and run_id in self._members:
            with self._lock:
                run = self._runs.get(run_id)
                batch = self._members.get(run_id)
                if run is None and batch is not None:
                    run = self._runs[run_id] = batch.member(run_id)
        return run

    def known(self, run_id: str) -> OpenRun | None:
        """Return the open run with that id, when it was asked for alone before."""
        return self._runs.get(run_id)

    def batch_of(self, run_id: str) -> OpenBatch | None:
        """Return the batch in which an open run travels."""
        return self._members.get(run_id)

    def has_ended(self, run_id: str) -> bool:
        """Tell whether a run is known to be done or cancelled, and not merely unknown."""
        return run_id in self._ended

    def add(self, run: OpenRun) -> None:
        """Take events for ``run`` from now on."""
        self._runs[run.run_id] = run

    def withdraw(self) -> None:
        """Let workers ask before they start what was submitted until now. Callable from any thread."""
        with self._counting:
            self.withdrawn += 1

    def add_batch(self, batch: OpenBatch) -> None:
        """Take events for a batch and its members from now on."""
        batch.table = self
        self._members.update(dict.fromkeys(batch.run_ids, batch))
        self._runs[batch.run_id] = batch

    def execution(self, run: OpenRun, name: str, attempt: int) -> Execution | None:
        """Return the execution of a run by its name, as :meth:`OpenRun.execution` does, and note a new one."""
        known = len(run.executions)
        execution = run.execution(name, attempt)
        if len(run.executions) > known:
            self._begun.setdefault(run.run_id, time.monotonic())
        return execution

    def count(self) -> int:
        """Return the count of withdrawals as of now; in the listener's thread."""
        if self._begun:
            before = time.monotonic() - BEGUN_SECONDS
            while self._begun and self._begun[oldest := next(iter(self._begun))] < before:
                del self._begun[oldest]
                self.withdraw()
        return self.withdrawn

    def close(self, run_id: str, *, ended: bool = True, outcome: bool = False) -> OpenRun | None:
        """Take no more events for a run; requests for it are answered 410.

        Args:
            run_id: its id, or that of a batch, which ends all of its members.
            ended: whether it is over, and not only of no interest here any more.
            outcome: whether that is because a worker has ended it.
        """
        batch, run = self._take_out(run_id)
        if run is not None:
            for member in tuple(getattr(run, "pending", ())):
                self._shut(self._take_out(member)[1])
                self._note_end(member, ended)
            self._shut(run)
        if run is not None or batch is not None:
            self._note_end(run_id, ended)
        if run is not None:
            run.wake()
        if batch is not None:
            batch.leave(run_id, withdrawn=not outcome)
            if not batch.pending:
                self.close(batch.run_id, ended=ended, outcome=outcome)
            elif not outcome:
                batch.wake()
        return run

    def close_member(self, batch: OpenBatch, run_id: str) -> bool:
        """Close a run by the word of the worker that has its batch; False when it is not open, or not there."""
        if batch.pending.pop(run_id, None) is None:
            return False
        self._shut(self._take_out(run_id)[1])
        self._note_end(run_id, ended=True)
        if not batch.pending:
            self.close(batch.run_id, outcome=True)
        return True

    def part(self, run_id: str) -> None:
        """Let an open run go its way without the batch in which it travelled."""
        with self._lock:
            batch = self._members.pop(run_id, None)
        if batch is not None:
            batch.leave(run_id, withdrawn=True)
            if not batch.pending:
                self.close(batch.run_id, ended=False, outcome=True)  # whoever renews has said so

    def _take_out(self, run_id: str) -> tuple[OpenBatch | None, OpenRun | None]:
        self._cancelled.pop(run_id, None)
        self._begun.pop(run_id, None)
        with self._lock:
            return self._members.pop(run_id, None), self._runs.pop(run_id, None)

    @staticmethod
    def _shut(run: OpenRun | None) -> None:
        if run is not None:
            run.closed = True
            run.message = run.part = None
            run.forsake()
            run.executions.clear()

    def _note_end(self, run_id: str, ended: bool) -> None:
        if ended:
            self._ended[run_id] = None
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    def forgive(self) -> None:
        """Nobody could be heard for a while: that silence is not the workers'."""
        now = time.monotonic()
        for run in list(self._runs.values()):
            living = run.living()
            for execution in living:
                execution.last_contact = now
            if living and not run.cancelled:
                run.sink([run.event(frames.HEARTBEAT)])

    def fail_all(self, exc: BaseException) -> None:
        """End every run with an error: nobody listens for them any more."""
        error = normalize_exception(exc, source="executor")
        error["message"] = f"the callback listener failed: {error['kind']}: {error['message']}"
        for run in list(self._runs.values()):
            run.sink([run.event(frames.TASK_ERROR, error=error)])
            self.close(run.run_id)

    def of(self, sink: Callable[[Iterable[Frame]], bool]) -> list[OpenRun]:
        """Return the open runs whose events go to ``sink``. Callable from any thread."""
        return [run for run in list(self._runs.values()) if run.reports_to(sink)]

    def cancel(self, run_id: str) -> None:
        """Tell the run's worker, when it next asks or at once over its open beat, to stop."""
        run = self.get(run_id)
        if run is None or run.cancelled:
            return
        run.cancelled = True
        run.cancelled_at = time.monotonic()
        run.message = run.part = None
        # Most workers acknowledge; one that died never does, and is forgotten in the end.
        self._cancelled[run_id] = None
        if len(self._cancelled) > MAX_CANCELLED:
            oldest, _ = self._cancelled.popitem(last=False)
            self.close(oldest)
        run.wake()
        batch = self._members.get(run_id)
        if batch is not None:
            batch.withdraw(run_id)
            batch.wake()
