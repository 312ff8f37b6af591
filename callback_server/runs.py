"""The runs a listener takes events for, and who was last heard of each."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import normalize_exception
from wove.security import run_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from wove.callback_server.batches import OpenBatch
    from wove.frames import Frame
    from wove.security import SecretRing
    from wove.shared_parts import Part

#: Cancelled runs that are remembered for workers which have yet to hear of it.
MAX_CANCELLED = 4096
#: Ids of runs that have ended, by which work that nobody waits for is told from work that is done.
MAX_ENDED = 4096
#: Seconds that a worker gets to come back after it has lost its connections.
RECONNECT_SECONDS = 1.0
#: Seconds without a word after which nobody waits for an execution any more: beats come every five.
ALIVE_SECONDS = 8.0
#: Seconds after which a run that a worker has begun counts as withdrawn from all others: a copy of it that
#: a broker may hold is to be asked for.
BEGUN_SECONDS = 0.02
#: Executions of one run that are followed: each broker redelivery makes one more.
MAX_EXECUTIONS = 64


#: What most runs have nothing of: replaced, and never changed. Each dictionary is memory that a run in flight holds.
_NOTHING: dict[Any, Any] = {}


class Execution:
    """One execution of a run, as far as it was heard of.

    Attributes:
        attempt: the attempt it belongs to.
        beats: the count of its last beat.
        connections: those of its process that are open, as far as known.
        last_contact: when it was last heard of, in monotonic seconds.
        retry: how often the backend itself had run the payload before.
        suspect_since: when the last of its connections was lost; None while one is open.
        over: it has ended, or nothing that it says counts any more.
    """

    __slots__ = ("attempt", "beats", "connections", "last_contact", "over", "retry", "suspect_since")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.beats = 0
        self.connections: set[Any] = set()
        self.last_contact = time.monotonic()
        self.suspect_since: float | None = None
        self.over = False
        self.retry = 0

    def seems_dead(self, now: float) -> bool:
        """Tell whether it has had its time to come back, or to beat."""
        if self.suspect_since is not None and now - self.suspect_since > RECONNECT_SECONDS:
            return True
        return now - self.last_contact > ALIVE_SECONDS


class OpenRun:
    """One run that workers may report on.

    Args:
        run_id: its id.
        task_id: the task's name.
        environment: the environment's name, part of the key derivation.
        ring: the secrets that events may be signed with.
        nonce: the run's nonce.
        sink: takes verified, decoded events; called in the listener's thread; returns
            False when nobody listens any more.
        max_body: the largest body, in bytes, of a request with an outcome.
        message: what workers may fetch, or None.
        part: what they may fetch that other runs have as well, or None.
        attempt: which attempt workers are to make; events of earlier ones count little.
        heartbeat: seconds of silence allowed, or None.
        on_suspect: called in the listener's thread when a process that runs it is gone.
        plain: whether its outcome may be plain data only, and nothing is unpickled.
    """

    __slots__ = (
        "_keys", "asked_at", "asks", "attempt", "cancelled", "cancelled_at", "closed", "doubtful", "environment", "executions", "heartbeat", "job", "lost", "max_body", "message", "nonce", "obituary",
        "on_suspect", "opened_at", "part", "plain", "ring", "run_id", "sink", "task_id", "watchers", "worker",
    )  # fmt: skip

    def __init__(
        self,
        *,
        run_id: str,
        task_id: str,
        environment: str,
        ring: SecretRing,
        nonce: bytes,
        sink: Callable[[Iterable[Frame]], bool],
        max_body: int,
        message: list[Buffer] | None = None,
        part: Part | None = None,
        attempt: int = 1,
        heartbeat: float | None = None,
        on_suspect: Callable[[OpenRun], None] | None = None,
        plain: bool = False,
    ) -> None:
        self.run_id = run_id
        self.task_id = task_id
        self.environment = environment
        self.ring = ring
        self.nonce = nonce
        self.sink = sink
        self.max_body = max_body
        self.message = message
        self.part = part
        self.attempt = attempt
        self.heartbeat = heartbeat
        self.on_suspect = on_suspect
        self.plain = plain
        self.cancelled = False
        #: When it was cancelled, in monotonic seconds.
        self.cancelled_at = 0.0
        #: When which execution first asked for leave to start, and when one was last told to wait.
        self.asks: dict[str, float] = _NOTHING
        self.asked_at = 0.0
        #: What the backend has said of its end, in the form of an error.
        self.obituary: dict[str, Any] | None = None
        #: The attempt whose worker was reported dead; that is said once.
        self.lost = 0
        #: Whether its backend has it is not known.
        self.doubtful = False
        #: No events are taken for it any more.
        self.closed = False
        #: When the attempt was opened, in monotonic seconds.
        self.opened_at = time.monotonic()
        #: The id by which the backend knows the attempt.
        self.job = run_id if attempt == 1 else f"{run_id}-{attempt}"
        #: What the last worker that spoke of it said of itself.
        self.worker: dict[str, Any] = _NOTHING
        self.executions: dict[str, Execution] = {}
        #: Set when the run is cancelled or closed: wakes the beats that are held for it.
        self.watchers: dict[asyncio.Event, None] = _NOTHING
        self._keys: dict[str, bytes] = _NOTHING

    @property
    def started(self) -> bool:
        """Whether a worker has spoken of the current attempt."""
        return any(self.living())

    def living(self) -> list[Execution]:
        """Return the executions of the current attempt that have not ended."""
        return [e for e in list(self.executions.values()) if not e.over and e.attempt >= self.attempt]

    @property
    def last_contact(self) -> float:
        """When a worker last spoke of the current attempt, or it was opened; monotonic seconds."""
        return max([e.last_contact for e in self.living()], default=self.opened_at)

    @property
    def suspect_since(self) -> float | None:
        """Since when no process that runs it has a connection; None when one has, or none ever had."""
        living = self.living()
        since = [e.suspect_since for e in living if e.suspect_since is not None]
        return max(since) if since and len(since) == len(living) else None

    def execution(self, name: str, attempt: int) -> Execution | None:
        """Return the execution of that name, new or known; None when there are too many."""
        execution = self.executions.get(name)
        if execution is None:
            if len(self.executions) >= MAX_EXECUTIONS:
                for past in [key for key, known in list(self.executions.items()) if known.over]:
                    del self.executions[past]
            if len(self.executions) < MAX_EXECUTIONS:
                execution = self.executions[name] = Execution(attempt)
        return execution

    def renew(self, attempt: int, message: list[Buffer] | None, part: Part | None = None) -> None:
        """Begin another attempt; the executions of earlier ones count no more."""
        self.attempt = attempt
        self.message = message
        self.part = part
        self.job = f"{self.run_id}-{attempt}"
        self.opened_at = time.monotonic()
        self.obituary = None
        self.asks = _NOTHING
        self.forsake()

    def forsake(self) -> None:
        """Expect nothing more of the executions there are, nor of the worker that had them."""
        self.worker = {}
        for execution in list(self.executions.values()):
            execution.over = True

    def asked(self, execution: str, now: float) -> float:
        """Return when an execution first asked for leave to start; that is now when it never did."""
        if execution not in self.asks:
            self.asks = {**self.asks, execution: now}
        return self.asks[execution]

    def watch(self, wake: asyncio.Event, *, ends: bool = False) -> None:
        """Have an event set when the run is cancelled or closed, or not any more."""
        rest = {known: None for known in self.watchers if known is not wake}
        self.watchers = rest if ends else {**rest, wake: None}

    def event(self, kind: str, **fields: Any) -> Frame:
        """Return an event of this run that arises here, not at its worker."""
        return frames.event(kind, self.run_id, self.task_id, self.attempt, 2**31, **fields)

    def reports_to(self, sink: Callable[[Iterable[Frame]], bool]) -> bool:
        """Tell whether its events go to ``sink``."""
        return self.sink == sink

    def key(self, kid: str) -> bytes | None:
        """Return the key of this run's events under the secret ``kid``; None for an unknown one."""
        key = self._keys.get(kid)
        if key is None:
            secret = self.ring.get(kid)
            if secret is None:
                return None
            key = run_key(secret, self.environment, self.run_id, self.nonce)
            self._keys = {**self._keys, kid: key}
        return key


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
            _wake(run)
        if batch is not None:
            batch.leave(run_id, withdrawn=not outcome)
            if not batch.pending:
                self.close(batch.run_id, ended=ended, outcome=outcome)
            elif not outcome:
                _wake(batch)
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

    def wake(self, run: OpenRun) -> None:
        """Let the beats that are held for a run look at it again."""
        _wake(run)

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
        _wake(run)
        batch = self._members.get(run_id)
        if batch is not None:
            batch.withdraw(run_id)
            _wake(batch)


def _wake(run: OpenRun) -> None:
    for watcher in tuple(run.watchers):
        watcher.set()
