"""One execution's conversation with the callback server."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import EncodeError, is_time_limit, lost, normalize_exception
from wove.security import event_tag, reply_tag, same
from wove.wire import pack_message, park
from wove.worker import offering, starting
from wove.worker.connection import Reply, clock_offset, request
from wove.worker.context import Cancellable, RunContext
from wove.worker.offering import offer, patience
from wove.worker.outcomes import encode_error, encode_result
from wove.worker.pace import is_short

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from wove.worker.assignment import Assignment

logger = logging.getLogger("wove.worker")

#: Bytes of an outcome that a backend is asked to keep at most.
MAX_PARKED = 64 * 1024 * 1024
#: Seconds for which the refusal of a payload is offered.
REFUSAL_PATIENCE = 2.0
#: Seconds that a progress report may take.
REPORT_TIMEOUT = 5.0
#: Seconds after which a report that failed is followed by another.
REPORT_AGAIN = 0.5
#: Frames and characters that one report holds at most.
MAX_FRAMES = 48
MAX_CHARACTERS = 40_000
#: Bytes of a request beside its values, at most.
ENVELOPE_ALLOWANCE = 64 * 1024
#: Progress and log frames that wait at most; then the oldest are dropped.
MAX_PENDING = 1_000

CONTENT_TYPE = "application/msgpack"


class Session(Cancellable):
    """Numbers, signs and sends the events of one execution of a run.

    Args:
        assignment: the verified payload.
        backend: ``{"backend": "celery", "job": ...}``, for errors that name them.
    """

    def __init__(self, assignment: Assignment, backend: Mapping[str, str] | None = None) -> None:
        super().__init__(RunContext(assignment.run_id, assignment.task_id, assignment.attempt, self.emit))
        self.assignment = assignment
        self.execution = os.urandom(8).hex()
        self.begun = time.monotonic()
        self.beats = 0
        #: The callback server does not know the run (any more): no beats for it.
        self.unwanted = False
        #: An outcome that could not be delivered, signed, for the backend to keep.
        self.parked: bytes | None = None
        #: Nobody waits for the outcome, and the work was kept: the backend is to keep what it returns.
        self.unclaimed = False
        #: Another worker is at the run: this one has nothing to do with it.
        self.elsewhere = False
        #: Called when a frame waits to be sent; set by the courier.
        self.notify: Callable[[], None] | None = None
        self.worker: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), **(backend or {})}
        self._path = f"{assignment.path}/wove/v1/events/{assignment.run_id}"
        #: The first number is that of the news that the task has started, whenever that is sent.
        self._seq = 1
        self._retry = 0
        #: When a report that failed is tried again, in monotonic seconds.
        self._report_again = 0.0
        self._pending: list[frames.Frame] = []
        self._lock = threading.Lock()
        # Held while a report is under way, so that the outcome does not overtake it.
        self._sending = threading.Lock()
        self._started = False
        self._finished = False
        self._patience: float | None = None

    # --- before the task ------------------------------------------------------

    def may_start(self, *, redelivered: bool | int = False, unseen: bool = False) -> bool:
        """Ask whether the run is still wanted, where it may not be.

        A run that waited long enough to be cancelled, or that the broker delivers again,
        is asked for; one that was submitted this moment is not, to save the round trip, nor one
        of many that were submitted together when none of them was cancelled.
        Without an answer the task is run: a callback server that is out for a moment
        must not lose work. But not when the caller's deadline is over, too: then it has
        given up, and gone.

        Args:
            redelivered: whether the payload is delivered again, or how often it was executed before.
            unseen: nobody would notice if the whole worker died before it has spoken of the run. So it asks,
                unless the task is known to be over by the time at which it would speak.
        """
        if not self.assignment.attended:
            return True
        # How often the backend itself has run the payload before, where it counts that.
        self._retry = redelivered if type(redelivered) is int else 0
        offset = clock_offset(self.assignment.origin)
        unseen = unseen and not is_short(self.assignment.function)
        if starting.is_wanted(self.assignment, offset, doubted=bool(redelivered) or unseen):
            return True
        told = starting.ask(self._ask, self.assignment, offset)
        self._started, self.elsewhere = told.noted, told.elsewhere
        return told.given

    def _ask(self, timeout: float) -> Reply:
        frame = self._frame(frames.TASK_STARTED, fence=True, retry=self._retry)
        return self._post([frame], [], final=False, timeout=timeout)

    # --- during the task ------------------------------------------------------

    def emit(self, kind: str, **fields: Any) -> None:
        """Queue a progress or log frame; a courier thread sends it soon."""
        self._queue(lambda: self._frame(kind, **fields))

    def _queue(self, make: Callable[[], frames.Frame]) -> None:
        with self._lock:
            if self._finished:
                return
            if len(self._pending) >= MAX_PENDING:
                del self._pending[0]
            self._pending.append(make())
        if self.notify is not None:
            self.notify()

    def withdraw(self, text: str) -> None:
        """Take in which runs of a batch are not wanted any more; this is none."""

    @property
    def started(self) -> bool:
        """Whether the callback server was told that the task has started."""
        return self._started

    @property
    def has_news(self) -> bool:
        """Whether frames wait to be sent (the first of all says that the task has started)."""
        return (bool(self._pending) or not self._started) and time.monotonic() >= self._report_again

    @property
    def beat_word(self) -> str:
        """How the line of a beat begins; a task that takes its time to stop has been told already."""
        return "stopping" if self.context.cancelled else "run"

    @property
    def beat_rest(self) -> str:
        """How the line of a beat ends."""
        return ""

    def attend(self, now: float) -> float:
        """Do what is due beside reports and beats, in the courier's thread; return when something else will be."""
        return float("inf")

    def report(self) -> bool:
        """Send frames that wait, as many as one request holds.

        Returns:
            False when they could not be delivered: then they are lost, being news and no outcome.
        """
        with self._sending:
            batch = self._take_pending()
            if not batch or self._finished:
                return True
            try:
                return self._post(batch, [], final=False, timeout=REPORT_TIMEOUT).status < 300
            except Exception as exc:
                if is_time_limit(exc):
                    raise
                logger.info("progress of run %s was not delivered: %s", self.assignment.run_id, exc)
                with self._lock:
                    # Who is at it has to be known; progress may be lost.
                    self._started = self._started and batch[0]["type"] != frames.TASK_STARTED
                    self._report_again = time.monotonic() + REPORT_AGAIN
                return False

    def _take_pending(self) -> list[frames.Frame]:
        with self._lock:
            if not self._started:
                self._started = True
                self._pending.insert(0, self._started_frame())
            count = characters = 0
            for frame in self._pending[:MAX_FRAMES]:
                characters += len(frame.get("message", ""))
                if count and characters > MAX_CHARACTERS:
                    break
                count += 1
            batch, self._pending = self._pending[:count], self._pending[count:]
            return batch

    # --- after the task -------------------------------------------------------

    def succeed(self, result: Any) -> None:
        """Deliver a result; raises as :meth:`encoded`."""
        self.encoded(result)()

    def encoded(self, result: Any) -> Callable[[], None]:
        """Return what delivers a result; one that cannot be encoded is delivered as an error naming its type.

        Raises:
            Exception: a time limit has struck meanwhile, and was not reported.
        """
        attachments: list[Buffer] = []
        try:
            described = encode_result(result, attachments, plain=self.assignment.plain)
        except BaseException as exc:
            if is_time_limit(exc):
                raise
            return partial(self._fail_to_encode, exc)
        return partial(self.deliver_result, described, attachments)

    def _fail_to_encode(self, exc: BaseException) -> None:
        self.fail(exc, source="worker")
        if not isinstance(exc, Exception):
            raise exc

    def deliver_result(self, described: Any, attachments: list[Buffer]) -> None:
        """Deliver a result as :func:`wove.wire.encode_value` has described it."""
        size = sum(memoryview(part).nbytes for part in attachments)
        too_large = size + ENVELOPE_ALLOWANCE > (self.assignment.max_body or size + ENVELOPE_ALLOWANCE)
        if too_large or self._finish(frames.TASK_RESULT, attachments, result=described) == 413:
            self.fail(
                EncodeError(
                    f"the result has {size} bytes, more than the callback server takes: raise "
                    'executor_config["callback_max_body"], or return less'
                ),
                source="worker",
            )

    def refuse(self, exc: BaseException) -> None:
        """Report that the payload is not taken here, to whoever still listens: its submitter may be long gone."""
        self._started = True  # nothing has, and nothing will
        self._patience = REFUSAL_PATIENCE
        self.fail(exc, source="worker")

    def fail(self, exc: BaseException, *, source: str = "task") -> None:
        """Deliver an error; a time limit that strikes while it is encoded is delivered instead, and raised."""
        try:
            told = encode_error(exc, source=source, plain=self.assignment.plain)
        except Exception as struck:
            if is_time_limit(struck) and not is_time_limit(exc):
                self.fail(struck)
            raise
        self.deliver_error(*told)

    def deliver_error(self, error: Mapping[str, Any], described: Any, attachments: list[Buffer]) -> None:
        """Deliver an error as :func:`wove.worker.outcomes.encode_error` has described it."""
        if self._finish(frames.TASK_ERROR, attachments, error=error, exception=described) == 413:
            self._finish(frames.TASK_ERROR, [], error=error)

    def acknowledge_cancel(self) -> None:
        """Report that the task was cancelled."""
        self._finish(frames.TASK_CANCELLED, [])

    def lost(self, message: str) -> None:
        """Report, from another process than the task's, that its process died."""
        self._started = True  # or not; nothing of this process says so
        self._finish(frames.TASK_ERROR, [], error=lost(message))

    def retried(self, why: BaseException | str) -> None:
        """Report that this execution came to nothing, and that the backend will run the payload again."""
        if isinstance(why, BaseException):
            error = normalize_exception(why, retryable=True)
        else:
            error = {"kind": "Retry", "message": why, "traceback": "", "retryable": True, "source": "backend"}
        if self.assignment.attended:
            struck = self._send_surplus()
            batch = self._last_batch(frames.TASK_RETRY, error=error)
            if struck is not None:
                raise struck
            self._send_last(batch, [], final=False)

    def _finish(self, kind: str, attachments: list[Buffer], **fields: Any) -> int:
        """Deliver the terminal frame, however long the callback server is away.

        Returns:
            The callback server's answer; 0 when it gave none, or nobody waits for the outcome.
        """
        if not self.assignment.attended:
            self.unclaimed = True
            return 0
        struck = self._send_surplus()
        batch = self._last_batch(kind, **fields)
        if struck is not None:
            self.parked = self._park(batch, attachments)
            raise struck
        return self._send_last(batch, attachments, final=True)

    def _send_surplus(self) -> BaseException | None:
        """Send ahead what the last request will not hold, as long as somebody listens.

        Returns:
            What struck meanwhile, such as a time limit: it must not come before the outcome is in safety.
        """
        try:
            while len(self._pending) > MAX_FRAMES - 4 and self.report():
                pass
        except BaseException as exc:
            return exc
        return None

    def _last_batch(self, kind: str, **fields: Any) -> list[frames.Frame]:
        # A report under way gets a moment to arrive first.
        held = self._sending.acquire(timeout=REPORT_TIMEOUT)
        try:
            with self._lock:
                self._finished = True
                last = self._pending[-MAX_FRAMES + 4 :]
                self._pending = []
                if not self._started:
                    self._started = True
                    last.insert(0, self._started_frame())
                last.append(self._frame(kind, **fields))
        finally:
            if held:
                self._sending.release()
        return last

    def _send_last(self, batch: list[frames.Frame], attachments: list[Buffer], *, final: bool) -> int:
        task = self.assignment
        try:
            reply = offer(
                lambda: self._post(batch, attachments, final=final),
                task,
                patience(task, self.begun, cancelled=self.context.cancelled)
                if self._patience is None
                else self._patience,
                marks=offering.outages,
            )
        except BaseException:
            # A time limit of the backend strikes: whether the outcome has arrived is not known.
            if final:
                self.parked = self._park(batch, attachments)
            raise
        if reply is None:
            if final:
                self.parked = self._park(batch, attachments)
                self.unclaimed = task.keep and not self.context.cancelled
            return 0
        self.unclaimed = reply.status == 410 and task.keep and "wove-ended" not in reply.headers
        return reply.status

    def _park(self, batch: list[frames.Frame], attachments: Sequence[Buffer]) -> bytes:
        """Return the outcome as a signed blob for the backend to keep."""
        body = self._body(batch, attachments)
        size = sum(memoryview(part).nbytes for part in body)
        if size > MAX_PARKED:
            error = normalize_exception(
                EncodeError(
                    f"the outcome has {size} bytes; it could not be delivered, and is too large to be kept by the "
                    "backend meanwhile"
                ),
                source="worker",
            )
            body = self._body([self._frame(frames.TASK_ERROR, error=error)], [])
        return self._sealed(body)

    def _sealed(self, body: list[Buffer]) -> bytes:
        """Return as one signed blob what would have been sent."""
        task = self.assignment
        return park(task.kid, event_tag(task.key, task.run_id, CONTENT_TYPE, True, body), body)

    # --- on the wire ----------------------------------------------------------

    def _frame(self, kind: str, **fields: Any) -> frames.Frame:
        self._seq += 1
        task = self.assignment
        return frames.event(kind, task.run_id, task.task_id, task.attempt, self._seq, **fields)

    def _started_frame(self) -> frames.Frame:
        # It may be made after news of the task itself, and must not make those seem outdated.
        task = self.assignment
        return frames.event(frames.TASK_STARTED, task.run_id, task.task_id, task.attempt, 1)

    def _body(self, batch: list[frames.Frame], attachments: Sequence[Buffer], **more: Any) -> list[Buffer]:
        envelope = {"v": 1, "execution": self.execution, "worker": self.worker, "frames": batch, **more}
        return pack_message(envelope, attachments)

    def _post(
        self, batch: list[frames.Frame], attachments: Sequence[Buffer], *, final: bool, timeout: float = 10.0
    ) -> Reply:
        return self._send(self._body(batch, attachments), final=final, timeout=timeout)

    def _send(self, body: list[Buffer], *, final: bool, timeout: float = 10.0) -> Reply:
        task = self.assignment
        tag = event_tag(task.key, task.run_id, CONTENT_TYPE, final, body)
        headers = {
            "Content-Type": CONTENT_TYPE,
            "Wove-Key": task.kid,
            "Wove-Signature": tag.hex(),
            "Wove-Final": "1" if final else "0",
        }
        reply = request(task.origin, "POST", self._path, headers, body, timeout=timeout)
        self._heed(reply, tag)
        return reply

    def _heed(self, reply: Reply, tag: bytes) -> None:
        """Take in what a reply says beside its status."""
        cancel = reply.headers.get("wove-cancel")
        if cancel is not None and self._is_signed(cancel, tag, b"cancel"):
            self.cancel()

    def _is_signed(self, given: str, tag: bytes, text: bytes) -> bool:
        """Tell whether the callback server says ``text`` in reply to what was sent with ``tag``."""
        expected = reply_tag(self.assignment.key, tag, text)
        return same(expected.hex().encode(), given.encode("ascii", "replace"))
