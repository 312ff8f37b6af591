"""A batch's conversation with the callback server: the outcomes of its runs are reported together."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import EncodeError, is_time_limit
from wove.tables import CANCELLED, ERROR, MAX_VALUE, RETURNED, encode_small, pack_table
from wove.wire import pack_message
from wove.worker.batch_news import News
from wove.worker.batch_places import Places
from wove.worker.context import Cancellable, RunContext
from wove.worker.offering import offer, patience
from wove.worker.outcomes import encode_error
from wove.worker.session import MAX_FRAMES, REPORT_AGAIN, REPORT_TIMEOUT, Session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

    from wove.tables import Row
    from wove.worker.assignment import Assignment
    from wove.worker.connection import Reply

logger = logging.getLogger("wove.worker")

#: Seconds that an outcome waits for others, and after which the submitter is asked what is still wanted.
FLUSH_AFTER = 0.025
#: Seconds after which the submitter is told that the batch has started.
ANNOUNCE_AFTER = 0.25
#: Seconds after which runs that were not begun are given back: others may be free for them.
GIVE_BACK_AFTER = 0.5


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
        self._news = News()
        self._exchange_again = 0.0
        #: Outcomes that nobody has taken, and that the backend is to keep.
        self._unclaimed_rows: list[Row] = []
        self._places = Places()
        self._current: tuple[int, Cancellable] | None = None
        self._exchanged = self.begun

    # --- what comes next --------------------------------------------------------

    def may_start(self, *, redelivered: bool | int = False, unseen: bool = False) -> bool:
        """Ask whether any of the runs is still wanted; see :meth:`Session.may_start`."""
        wanted = super().may_start(redelivered=redelivered, unseen=unseen)
        # That a worker has the batch is no news yet to those who wait for its runs.
        self._started = False
        self._places.settle()
        self._exchanged = time.monotonic()
        return wanted

    def expect(self, count: int) -> None:
        """The batch has that many runs."""
        with self._lock:
            self._places.expect(count)

    def next_place(self) -> int | None:
        """Return the place of the next run to execute; None when there is none left."""
        now = time.monotonic()
        if now - self._exchanged > FLUSH_AFTER:
            self.exchange()
        if now - self.begun > GIVE_BACK_AFTER:
            self.give_back()
        with self._lock:
            for place, wanted in self._places.draw():
                if wanted:
                    return place
                self._news.add(place, CANCELLED, b"")
        return None

    def give_back(self) -> None:
        """Let the submitter send those runs again that were not begun."""
        with self._lock:
            for place, wanted in self._places.draw():
                self._news.add(place, RETURNED if wanted else CANCELLED, b"")

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
        with self._lock:
            self._news.add_time(seconds)

    def _emit_of(self, run_id: str, kind: str, **fields: Any) -> None:
        self._queue(lambda: self._frame_of(run_id, kind, fields))

    def _frame_of(self, run_id: str, kind: str, fields: dict[str, Any]) -> frames.Frame:
        self._seq += 1
        task = self.assignment
        return frames.event(kind, run_id, task.task_id, task.attempt, self._seq, **fields)

    def withdraw(self, text: str) -> None:
        """Take in which runs are not wanted any more: their number so far, and places."""
        self._places.withdraw(text)
        current = self._current
        if current is not None and self._places.is_withdrawn(current[0]):
            current[1].cancel()

    # --- after a run ------------------------------------------------------------

    def add_result(self, place: int, run_id: str, result: Any) -> None:
        """Keep a result to be delivered with others; a large one is delivered at once.

        Raises:
            BaseException: a time limit has struck meanwhile, and was not reported; or encoding it exits, which was.
        """
        try:
            found = encode_small(result)
        except BaseException as exc:
            if not is_time_limit(exc):
                # Its pickling exits: that ends this process, and is said of this run.
                self.add_error(place, run_id, exc, source="worker")
            raise
        if found is None or (self.assignment.plain and found[0] == "pickle"):
            alone = self._alone(run_id)
            alone.succeed(result)
            self._explain_parked(place, alone)
            return
        with self._lock:
            self._news.add(place, *found)

    def add_error(self, place: int, run_id: str, exc: BaseException, *, source: str = "task") -> None:
        """Keep an error to be delivered with others; for a time limit meanwhile see :meth:`fail`."""
        try:
            error, described, attachments = encode_error(exc, source=source, plain=self.assignment.plain)
        except Exception as struck:
            if is_time_limit(struck) and not is_time_limit(exc):
                self.add_error(place, run_id, struck)
            raise
        data = b"".join(pack_message({"error": error, "exception": described}, attachments))
        if len(data) > MAX_VALUE:
            alone = self._alone(run_id)
            alone.fail(exc, source=source)
            self._explain_parked(place, alone)
            return
        with self._lock:
            self._news.add(place, ERROR, data)

    def _explain_parked(self, place: int, alone: Session) -> None:
        """What nobody took has no place with the backend beside the batch's own outcomes: say so among those."""
        if alone.parked is None:
            return
        error = EncodeError(
            f"the outcome has {len(alone.parked)} bytes; it could not be delivered, and is too large to be kept by the "
            "backend with those of the runs that travelled with it"
        )
        with self._lock:
            self._news.add_undeliverable(place, error)

    def add_cancelled(self, place: int) -> None:
        """Keep the word that a run was cancelled, to be delivered with others."""
        with self._lock:
            self._news.add(place, CANCELLED, b"")

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
        return f" {self._places.heard}"

    def attend(self, now: float) -> float:
        """Deliver what waits while a run takes its time; return when to look again."""
        if self._places.are_left and now >= self.begun + GIVE_BACK_AFTER:
            self.give_back()
        due = float("inf")
        news = self._news  # it is another one once a request has taken it
        if news.rows:
            due = max(news.since + FLUSH_AFTER, self._exchange_again)
            if due <= now:
                self.exchange()
                due = now + FLUSH_AFTER
        if self._places.are_left:
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
            news = self._take_news()
            body = self._packed(news)
            try:
                reply = self._send(body, final=bool(news.rows), timeout=REPORT_TIMEOUT)
                taken = reply.status < 300 or reply.status == 410
            except Exception as exc:
                if is_time_limit(exc):
                    self._put_back(news)
                    raise
                logger.info("outcomes of batch %s wait: %s", self.assignment.run_id, exc)
                taken = False
            self._exchanged = time.monotonic()
            if not taken:
                self._exchange_again = self._exchanged + REPORT_AGAIN
                self._put_back(news)
        finally:
            self._sending.release()

    def _put_back(self, news: News) -> None:
        with self._lock:
            self._news.put_back(news)
            self._pending[:0] = news.frames

    def deliver(self) -> None:
        """Deliver what is left, however long the callback server is away."""
        struck = self._send_surplus()
        with self._sending:
            news = self._take_news()
            if struck is not None:
                self._park_news(news)
                raise struck
            if news.rows:
                self._deliver(news)

    def _deliver(self, news: News) -> None:
        task, body = self.assignment, self._packed(news)
        try:
            reply = offer(
                lambda: self._send(body, final=True),
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

    def _deliver_parts(self, news: News) -> None:
        """Deliver outcomes that are too large together."""
        rows = news.rows
        if len(rows) == 1:
            error = EncodeError(
                f"the outcome has {len(rows[0][2])} bytes, more than the callback server takes: raise "
                'executor_config["callback_max_body"], or return less'
            )
            told = News()
            told.add_undeliverable(rows[0][0], error)
            self._send(self._packed(told), final=True)
            return
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]):
            self._deliver(News(part))

    def _park_news(self, news: News) -> None:
        # A backend keeps one blob: with this goes what could not be delivered before.
        self._unclaimed_rows.extend(news.rows)
        self.parked = self._sealed(self._packed(News(self._unclaimed_rows)))

    def _take_news(self) -> News:
        with self._lock:
            news, self._news = self._news, News()
            news.frames, self._pending = self._pending[: MAX_FRAMES - 4], self._pending[MAX_FRAMES - 4 :]
        return news

    def _packed(self, news: News) -> list[Buffer]:
        more: dict[str, Any] = {"heard": self._places.heard}
        if news.executed:
            more["timing"] = [self._slot, news.executed, news.busy]
        if news.rows:
            more["outcomes"] = True
        return self._body(news.frames, [pack_table(news.rows)] if news.rows else [], **more)

    def _heed(self, reply: Reply, tag: bytes) -> None:
        given = reply.headers.get("wove-unwanted")
        if given is None:
            return
        text = bytes(reply.body)
        if self._is_signed(given, tag, b"unwanted " + text):
            self.withdraw(text.decode("ascii"))
