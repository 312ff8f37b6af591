"""Executes the runs of a batch one after another, and reports their outcomes together."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import EncodeError, is_cancellation, normalize_exception
from wove.security import event_tag, reply_tag, same
from wove.tables import CANCELLED, ERROR, MAX_VALUE, RETURNED, encode_small, pack_table
from wove.wire import pack_message, park
from wove.worker.calls import cancelled_itself, explain_failed_load, load
from wove.worker.context import Cancellable, RunContext, bind
from wove.worker.courier import courier_for
from wove.worker.hooks import keep
from wove.worker.offering import offer, patience
from wove.worker.outcomes import encode_error
from wove.worker.pace import measured
from wove.worker.session import CONTENT_TYPE, MAX_FRAMES, REPORT_AGAIN, REPORT_TIMEOUT, Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from wove.tables import Row
    from wove.worker.assignment import Assignment
    from wove.worker.connection import Reply
    from wove.worker.hooks import BackendHooks

logger = logging.getLogger("wove.worker")

#: Seconds that an outcome waits for others, and after which the submitter is asked what is still wanted.
FLUSH_AFTER = 0.025
#: Seconds after which the submitter is told that the batch has started.
ANNOUNCE_AFTER = 0.25
#: Seconds after which runs that were not begun are given back: others may be free for them.
GIVE_BACK_AFTER = 0.5

#: Exceptions by which a backend says that the time of the whole message is up.
_TIME_LIMITS = frozenset({"SoftTimeLimitExceeded", "TimeLimitExceeded", "JobTimeoutException"})


class BatchSession(Session):
    """Reports the runs of one batch; what the base class says, it says of all of them.

    Args:
        assignment: the verified payload.
        backend: as for :class:`Session`.
    """

    def __init__(self, assignment: Assignment, backend: Mapping[str, str] | None = None) -> None:
        super().__init__(assignment, backend)
        self._backend = backend
        # RQ forks a process for each message: that is no other worker.
        process = self.worker.get("rq_worker") or self.worker["pid"]
        self._slot = f"{self.worker['host']}:{process}:{threading.get_ident()}"
        self._rows: list[Row] = []
        self._row_since = 0.0
        self._exchange_again = 0.0
        #: Outcomes that nobody has taken, and that the backend is to keep.
        self._unclaimed_rows: list[Row] = []
        #: Places that are not wanted any more, and how many the callback server has told us of.
        self._withdrawn: set[int] = set()
        self._heard = 0
        #: Places that must not be started, and whose runs have ended: nothing is to be said of them.
        self._over: set[int] = set()
        self._next = self._end = 0
        self._current: tuple[int, Cancellable] | None = None
        self._exchanged = self.begun
        self._executed, self._busy = 0, 0.0

    # --- what comes next --------------------------------------------------------

    def may_start(self, *, redelivered: bool | int = False, unseen: bool = False) -> bool:
        """Ask whether any of the runs is still wanted; see :meth:`Session.may_start`."""
        wanted = super().may_start(redelivered=redelivered, unseen=unseen)
        # That a worker has the batch is no news yet to those who wait for its runs.
        self._started = False
        self._over, self._withdrawn = self._withdrawn, set()
        self._exchanged = time.monotonic()
        return wanted

    def expect(self, count: int) -> None:
        """The batch has that many runs."""
        with self._lock:
            self._end = count

    def next_place(self) -> int | None:
        """Return the place of the next run to execute; None when there is none left."""
        now = time.monotonic()
        if now - self._exchanged > FLUSH_AFTER:
            self.exchange()
        if now - self.begun > GIVE_BACK_AFTER:
            self.give_back()
        with self._lock:
            while self._next < self._end:
                place = self._next
                self._next += 1
                if place in self._over:
                    continue
                if place not in self._withdrawn:
                    return place
                self._add(place, CANCELLED, b"")
        return None

    def give_back(self) -> None:
        """Let the submitter send those runs again that were not begun."""
        with self._lock:
            rest = range(self._next, self._end)
            self._end = self._next
            for place in rest:
                if place not in self._over:
                    self._add(place, CANCELLED if place in self._withdrawn else RETURNED, b"")

    # --- during a run -----------------------------------------------------------

    def begin(self, place: int, run_id: str) -> Cancellable:
        """Return the run that is executed from now on."""
        task = self.assignment
        item = Cancellable(RunContext(run_id, task.task_id, task.attempt, partial(self._emit_of, run_id)))
        self._current = place, item
        return item

    def end(self, seconds: float) -> None:
        """The run that was begun last has ended."""
        self._current = None
        self._executed += 1
        self._busy += seconds

    def _emit_of(self, run_id: str, kind: str, **fields: Any) -> None:
        self._queue(lambda: self._frame_of(run_id, kind, fields))

    def _frame_of(self, run_id: str, kind: str, fields: dict[str, Any]) -> frames.Frame:
        self._seq += 1
        task = self.assignment
        return frames.event(kind, run_id, task.task_id, task.attempt, self._seq, **fields)

    def withdraw(self, text: str) -> None:
        """Take in which runs are not wanted any more: their number so far, and places."""
        heard, *places = map(int, text.split())
        self._heard = max(self._heard, heard)
        self._withdrawn.update(places)
        current = self._current
        if current is not None and current[0] in self._withdrawn:
            current[1].cancel()

    # --- after a run ------------------------------------------------------------

    def add_result(self, place: int, run_id: str, result: Any) -> None:
        """Keep a result to be delivered with others; a large one is delivered at once."""
        try:
            found = encode_small(result)
        except BaseException as exc:
            # Its pickling exits: that ends this process, and is said of this run.
            self.add_error(place, run_id, exc, source="worker")
            raise
        if found is None or (self.assignment.plain and found[0] == "pickle"):
            alone = self._alone(run_id)
            alone.succeed(result)
            self._explain_parked(place, alone)
            return
        with self._lock:
            self._add(place, *found)

    def add_error(self, place: int, run_id: str, exc: BaseException, *, source: str = "task") -> None:
        """Keep an error to be delivered with others."""
        error, described, attachments = encode_error(exc, source=source, plain=self.assignment.plain)
        data = b"".join(pack_message({"error": error, "exception": described}, attachments))
        if len(data) > MAX_VALUE:
            alone = self._alone(run_id)
            alone.fail(exc, source=source)
            self._explain_parked(place, alone)
            return
        with self._lock:
            self._add(place, ERROR, data)

    def _explain_parked(self, place: int, alone: Session) -> None:
        """What nobody took has no place with the backend beside the batch's own outcomes: say so among those."""
        if alone.parked is None:
            return
        error = EncodeError(
            f"the outcome has {len(alone.parked)} bytes; it could not be delivered, and is too large to be kept by the "
            "backend with those of the runs that travelled with it"
        )
        data = b"".join(pack_message({"error": normalize_exception(error, source="worker")}, []))
        with self._lock:
            self._add(place, ERROR, data)

    def add_cancelled(self, place: int) -> None:
        """Keep the word that a run was cancelled, to be delivered with others."""
        with self._lock:
            self._add(place, CANCELLED, b"")

    def _add(self, place: int, codec: str, data: bytes) -> None:
        if not self._rows:
            self._row_since = time.monotonic()
        self._rows.append((place, codec, data))

    def _alone(self, run_id: str) -> Session:
        """Return a session by which one run is reported."""
        return Session(self.assignment.member(run_id), self._backend)

    # --- the courier's part -----------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether frames wait to be sent, or it is time to say that the batch has started."""
        now = time.monotonic()
        announce = not self._started and now >= self.begun + ANNOUNCE_AFTER
        return (bool(self._pending) or announce) and now >= self._report_again

    @property
    def beat_word(self) -> str:
        """How the line of a beat begins."""
        return "batch"

    @property
    def beat_rest(self) -> str:
        """How the line of a beat ends."""
        return f" {self._heard}"

    def attend(self, now: float) -> float:
        """Deliver what waits while a run takes its time; return when to look again."""
        if self._end > self._next and now >= self.begun + GIVE_BACK_AFTER:
            self.give_back()
        due = float("inf")
        if self._rows:
            due = max(self._row_since + FLUSH_AFTER, self._exchange_again)
            if due <= now:
                self.exchange()
                due = now + FLUSH_AFTER
        if self._end > self._next:
            due = min(due, self.begun + GIVE_BACK_AFTER)
        if not self._started:
            due = min(due, max(now + FLUSH_AFTER, self.begun + ANNOUNCE_AFTER))
        return due

    # --- on the wire --------------------------------------------------------------

    def exchange(self) -> None:
        """Deliver the outcomes there are, and hear what is not wanted any more; without insisting."""
        if time.monotonic() < self._exchange_again or not self._sending.acquire(blocking=False):
            return
        try:
            body = self._take_news()
            try:
                reply = self._send(body.parts, final=bool(body.rows), timeout=REPORT_TIMEOUT)
                taken = reply.status < 300 or reply.status == 410
            except Exception as exc:
                logger.info("outcomes of batch %s wait: %s", self.assignment.run_id, exc)
                taken = False
            self._exchanged = time.monotonic()
            if not taken:
                self._exchange_again = self._exchanged + REPORT_AGAIN
                with self._lock:
                    self._rows[:0] = body.rows
                    self._pending[:0] = body.frames
                    self._executed += body.executed
                    self._busy += body.busy
        finally:
            self._sending.release()

    def deliver(self) -> None:
        """Deliver what is left, however long the callback server is away."""
        # What one request does not hold goes ahead, as long as somebody listens.
        while len(self._pending) > MAX_FRAMES - 4 and self.report():
            pass
        with self._sending:
            body = self._take_news()
            if body.rows:
                self._deliver(body)

    def _deliver(self, news: _News) -> None:
        task = self.assignment
        try:
            reply = offer(
                lambda: self._send(news.parts, final=True),
                task,
                patience(task, self.begun, cancelled=False),
            )
        except BaseException:
            self._park_news(news)
            raise
        if reply is None:
            self._park_news(news)
        elif reply.status == 413:
            self._deliver_parts(news)

    def _deliver_parts(self, news: _News) -> None:
        """Deliver outcomes that are too large together."""
        rows = news.rows
        if len(rows) == 1:
            error = EncodeError(
                f"the outcome has {len(rows[0][2])} bytes, more than the callback server takes: raise "
                'executor_config["callback_max_body"], or return less'
            )
            data = b"".join(pack_message({"error": normalize_exception(error, source="worker")}, []))
            self._send(self._news([(rows[0][0], ERROR, data)]).parts, final=True)
            return
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            self._deliver(self._news(part))

    def _park_news(self, news: _News) -> None:
        # A backend keeps one blob: with this goes what could not be delivered before.
        self._unclaimed_rows.extend(news.rows)
        parts = self._news(self._unclaimed_rows).parts
        task = self.assignment
        self.parked = park(task.kid, event_tag(task.key, task.run_id, CONTENT_TYPE, True, parts), parts)

    def _take_news(self) -> _News:
        with self._lock:
            rows, self._rows = self._rows, []
            said, self._pending = self._pending[: MAX_FRAMES - 4], self._pending[MAX_FRAMES - 4 :]
            executed, self._executed = self._executed, 0
            busy, self._busy = self._busy, 0.0
        return self._news(rows, said, executed, busy)

    def _news(
        self,
        rows: list[Row],
        said: Sequence[frames.Frame] = (),
        executed: int = 0,
        busy: float = 0.0,
    ) -> _News:
        envelope: dict[str, Any] = {
            "v": 1,
            "execution": self.execution,
            "worker": self.worker,
            "frames": list(said),
            "heard": self._heard,
        }
        if executed:
            envelope["timing"] = [self._slot, executed, busy]
        if rows:
            envelope["outcomes"] = True
        return _News(rows, said, executed, busy, pack_message(envelope, [pack_table(rows)] if rows else []))

    def _heed(self, reply: Reply, tag: bytes) -> None:
        given = reply.headers.get("wove-unwanted")
        if given is None:
            return
        text = bytes(reply.body)
        expected = reply_tag(self.assignment.key, tag, b"unwanted " + text).hex().encode()
        if same(expected, given.encode("ascii", "replace")):
            self.withdraw(text.decode("ascii"))


class _News:
    """What one request says of a batch."""

    __slots__ = ("busy", "executed", "frames", "parts", "rows")

    def __init__(
        self,
        rows: list[Row],
        said: Sequence[frames.Frame],
        executed: int,
        busy: float,
        parts: list[Buffer],
    ) -> None:
        self.rows = rows
        self.frames = said
        self.executed = executed
        self.busy = busy
        self.parts = parts


def run_batch(
    assignment: Assignment,
    backend: Mapping[str, Any] | None,
    hooks: BackendHooks,
    *,
    redelivered: bool | int,
) -> bool:
    """Execute the runs of a batch; as :func:`wove.worker.execution.run` for a single one.

    Returns:
        True when at least one of them was executed.

    Raises:
        BaseException: what the first of them that failed has raised, after all were executed and
            reported, so that the backend counts the message as failed.
    """
    session = BatchSession(assignment, backend)
    if not session.may_start(redelivered=redelivered, unseen=hooks.unseen):
        logger.info("batch %s is not wanted (any more): skipped", assignment.run_id)
        hooks.refused(session)
        return False
    hooks.begins(session)
    with courier_for(assignment.origin).caring_for(session):
        loaded = load(session, assignment.load_batch, hooks)
        if loaded is None:
            keep(session, hooks)
            return False
        func, rows = loaded
        session.expect(len(rows))
        work = _Work(session, func, rows, hooks)
        try:
            work.execute()
        finally:
            # Also when a time limit strikes, or a task ends the process: nothing that is done is lost.
            session.give_back()
            session.deliver()
            keep(session, hooks)
        if work.again is not None:
            # Those runs are open, and the fence keeps the others from being executed again.
            session.retried(
                work.again if isinstance(work.again, BaseException) else type(work.again).__name__
            )
    if isinstance(work.again, BaseException):
        raise work.again
    hooks.passed = work.again
    if work.failure is not None:
        raise work.failure
    return work.executed > 0


class _Work:
    """The execution of a batch."""

    def __init__(self, session: BatchSession, func: Any, rows: list[Row], hooks: BackendHooks) -> None:
        self._session = session
        self._func = func
        self._rows = rows
        self._hooks = hooks
        self.executed = 0
        #: What the first run that failed has raised.
        self.failure: BaseException | None = None
        #: What a run has raised or returned that the backend will retry.
        self.again: Any = None

    def execute(self) -> None:
        """Execute one run after another."""
        session = self._session
        with measured(session.assignment.function):
            while (place := session.next_place()) is not None:
                row = self._rows[place]
                item = session.begin(place, row[0])
                begun = time.monotonic()
                try:
                    self._run(place, row, item)
                finally:
                    session.end(time.monotonic() - begun)
                    self.executed += 1

    def _run(self, place: int, row: Row, item: Cancellable) -> None:
        session = self._session
        try:
            positional, keywords = session.assignment.decode_row(row)
            func = session.assignment.another(self._func) if self.executed else self._func
        except BaseException as exc:
            explain_failed_load(session, exc)
            self._fail(place, row[0], exc, source="worker")
            return
        try:
            with bind(item.context):
                result = func(*positional, **keywords)
                if hasattr(result, "__await__"):
                    from wove.worker.coroutines import drive

                    result = drive(result, item)
        except BaseException as exc:
            self._end_badly(place, row[0], item, exc)
            return
        if self._hooks.runs_again(result):
            self.again = result
            return
        session.add_result(place, row[0], result)

    def _end_badly(self, place: int, run_id: str, item: Cancellable, exc: BaseException) -> None:
        if is_cancellation(exc):
            if item.context.cancelled:
                self._session.add_cancelled(place)
                return
            exc = cancelled_itself(exc)
        if self._hooks.runs_again(exc):
            self.again = exc
            return
        self._fail(place, run_id, exc)

    def _fail(self, place: int, run_id: str, exc: BaseException, *, source: str = "task") -> None:
        self._session.add_error(place, run_id, exc, source=source)
        if self.failure is None:
            self.failure = exc
        if not isinstance(exc, Exception) or type(exc).__name__ in _TIME_LIMITS:
            raise exc  # the process, or the time of the message, is at its end
