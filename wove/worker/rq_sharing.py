"""A job that the runs of several processes share: one execution, an outcome for each of them.

The job is executed in the name of one run. The others, as far as they have joined by then, are told that it
has started, and hear the beats of its worker, as if it were theirs; and in the end each of them gets
the outcome. When the one in whose name it is executed does not want it any more, another one takes its place.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.errors import PayloadRejectedError, is_time_limit
from wove.wire import PARKED
from wove.worker.assignment import Assignment
from wove.worker.calls import source_of
from wove.worker.courier import courier_for
from wove.worker.execution import run as _run
from wove.worker.outcomes import encode_error, encode_result
from wove.worker.rq import PARKED_SECONDS, RqHooks
from wove.worker.rq_party import Party
from wove.worker.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from typing_extensions import Buffer

logger = logging.getLogger("wove.worker")

#: Seconds after which a worker first looks who has joined, and between two looks.
FIRST_LOOK = 0.02
LOOK_EVERY = 0.5
#: Seconds that are waited for those who are told no outcome, but that there will be one later.
HINT_SECONDS = 5.0


class Attendance(threading.Thread):
    """Looks after those who have joined, while the job is executed.

    Args:
        party: who shares the job.
        session: the execution's own.
        others: a session for each of the others that is known already; more are added.
        info: of the backend, for errors.
    """

    def __init__(
        self, party: Party, session: Session, others: dict[str, Session], info: Mapping[str, Any]
    ) -> None:
        super().__init__(name="wove-attendance", daemon=True)
        self._party = party
        self._session = session
        self._others = others
        self._info = info
        self._ignored = {session.assignment.run_id}
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._over = False
        for other in others.values():
            other.on_cancel = self._wake.set

    def run(self) -> None:
        """Look, until the execution is over."""
        pause = FIRST_LOOK
        while not self._over:
            self._wake.wait(pause)
            self._wake.clear()
            pause = LOOK_EVERY
            try:
                self._look()
            except Exception as exc:
                logger.info("job %s: who shares it is not known: %s", self._party.job_id, exc)

    def finish(self) -> None:
        """Look no more."""
        with self._lock:
            self._over = True
        self._wake.set()

    def _look(self) -> None:
        closed, runs = self._party.look()
        for run_id in runs:
            if run_id not in self._others and run_id not in self._ignored and not self._over:
                self._welcome(run_id)
        others = list(self._others.values())
        # The last one has left, and it was not the one in whose name the job is executed; it may have been too
        # quick to be welcomed.
        told = any(session.context.cancelled for session in others)
        if closed and (told or all(session.unwanted for session in [self._session, *others])):
            self._session.cancel()

    def _welcome(self, run_id: str) -> None:
        payload = self._party.payload(run_id)
        assignment = self._party.open(payload) if payload is not None else None
        if assignment is None or not assignment.attended:
            self._ignored.add(run_id)
            return
        session = Session(assignment, self._info)
        session.on_cancel = self._wake.set
        with self._lock:
            if not self._over:
                self._others[run_id] = session
                courier_for(assignment.origin).add(session)


class SharedJob(RqHooks):
    """One execution of a job that may be shared.

    Args:
        job: RQ's.
        payload: what it was made for.
        info: of the backend, for errors.

    Raises:
        PayloadRejectedError: the payload is not signed with this worker's secret; nothing ran.
        ProtocolError: it is signed, but not in a form that this version reads.
    """

    def __init__(self, job: Any, payload: bytes | str, info: Mapping[str, Any]) -> None:
        super().__init__(job)
        self._payload = payload
        self._info = info
        self._party = Party(job, Assignment(payload))
        self._session: Session | None = None
        self._attendance: Attendance | None = None
        self._others: dict[str, Session] = {}
        #: Who is told something, and the threads that do so.
        self._told: list[Session] = []
        self._threads: list[threading.Thread] = []
        self._ending: tuple[Any, BaseException | None] = (None, None)

    def execute(self, *, redelivered: int) -> None:
        """Execute the payload; when it is not wanted any more, that of somebody who has joined.

        Raises:
            BaseException: what the user's function raised.
        """
        try:
            payload = self._turn()
            while payload is not None:
                self._forget()
                try:
                    completed = _run(payload, backend=self._info, redelivered=redelivered, hooks=self)
                except PayloadRejectedError:
                    if self._session is not None:
                        raise  # all of them were told
                    # It was refused by itself: its environment's payloads expire, say, and others' do not.
                    payload = self._turn(Assignment(payload).run_id)
                    if payload is None:
                        raise
                    continue
                if completed:
                    return
                if self._session is None or self._session.elsewhere:
                    return
                payload = self._turn(self._session.assignment.run_id)
        finally:
            self._dismiss()
            self._see_off()

    def _forget(self) -> None:
        self._session = None

    def _turn(self, failed: str = "") -> bytes | str | None:
        """Return the payload to execute now; None when nobody wants any.

        Args:
            failed: the run whose execution came to nothing.
        """
        self._dismiss()
        while (found := self._party.next(failed)) is not None:
            run_id, payload = found
            if not payload:
                return self._payload
            if self._party.open(payload) is not None:
                self._promote(run_id)
                return payload
            failed = run_id
        if not failed:
            return self._payload  # nobody knows of it any more: an execution like any other
        self._give_up()
        return None

    def _promote(self, run_id: str) -> None:
        """What was said of this run so far was of another one's execution; its own begins now."""
        session = self._others.pop(run_id, None)
        if session is not None:
            self._tell(session, partial(session.retried, "it is executed again, in the name of this run"))
            self._see_off(HINT_SECONDS)

    def _give_up(self) -> None:
        """Nobody wants an outcome any more: whoever was the last to leave waits for a word."""
        known = self._close()
        for session in self._remaining(known):
            if known is not None or session.context.cancelled:
                self._tell(session, session.acknowledge_cancel)
            else:
                self._tell(session, partial(session.lost, "the run in whose name it was executed has gone"))

    # --- what happens to the execution ------------------------------------------

    def refused(self, session: Session) -> None:
        """The run is not started."""
        self._session = session

    def begins(self, session: Session) -> None:
        """The run is about to start: look after the others."""
        self._session = session
        self._attendance = Attendance(self._party, session, self._others, self._info)
        self._attendance.start()

    def runs_again(self, ending: Any) -> bool:
        """RQ's ``Retry``: then it is for all of them."""
        again = super().runs_again(ending)
        if again:
            self._dismiss()
            why = (
                ending if isinstance(ending, BaseException) else f"the task returned {type(ending).__name__}"
            )
            for session in self._others.values():
                self._tell(session, partial(session.retried, why))
            self._see_off(HINT_SECONDS)
        return again

    def ends(self, result: Any, failure: BaseException | None, *, source: str = "task") -> None:
        """Let nobody join any more, and begin to tell the outcome to those who have."""
        self._dismiss()
        self._ending = (result, failure)
        try:
            known = self._close()
            if known is not None and not known[0] and self._session is not None:
                self._session.cancel()  # it has left: nobody is to wait until it listens
            sessions = self._remaining(known)
            for plain in (False, True):  # environments of one name may differ in what they take
                alike = [session for session in sessions if session.assignment.plain is plain]
                if alike:
                    self._deliver(alike, result, failure, source, plain=plain)
        except Exception:
            # Whatever happens to the others, the run's own outcome is to be delivered.
            logger.exception("job %s: those who share it were not told the outcome", self._job.id)

    def _deliver(
        self,
        sessions: Iterable[Session],
        result: Any,
        failure: BaseException | None,
        source: str,
        *,
        plain: bool,
    ) -> None:
        # Encoded here, and once: objects may mind other threads.
        attachments: list[Buffer] = []
        described: Any = None
        if failure is None:
            try:
                described = encode_result(result, attachments, plain=plain)
            except BaseException as exc:
                failure, source = exc, source_of(exc)
        if failure is None:
            for session in sessions:
                self._tell(session, partial(session.deliver_result, described, attachments))
            return
        try:
            told = encode_error(failure, source=source, plain=plain)
        except Exception as struck:  # a time limit
            told = encode_error(struck, source="task", plain=plain)
        for session in sessions:
            self._tell(session, partial(session.deliver_error, *told))

    def park(self, outcome: bytes) -> None:
        """Keep a signed outcome in the job's own hash; those of several runs side by side."""
        if self._session is not None:
            self._park(self._session, outcome)

    def _park(self, session: Session, outcome: bytes) -> None:
        self._outlast(PARKED_SECONDS)
        self._job.connection.hset(self._job.key, f"{PARKED}:{session.assignment.run_id}", outcome)

    # --- the others ---------------------------------------------------------------

    def _dismiss(self) -> None:
        """Look after nobody any more; those who are known go on to hear beats."""
        attendance, self._attendance = self._attendance, None
        if attendance is not None:
            attendance.finish()

    def _close(self) -> tuple[str, dict[str, bytes]] | None:
        for attempt in (1, 2):
            try:
                return self._party.close()
            except Exception as exc:
                if attempt == 1 and is_time_limit(exc):
                    continue  # it strikes but once, and those who share the job are to hear its outcome
                logger.exception("job %s: who shares it is not known", self._job.id)
        return None

    def _remaining(self, known: tuple[str, dict[str, bytes]] | None) -> list[Session]:
        """Return a session for each of the others; of those who have left none, where that is known."""
        others, self._others = self._others, {}
        if known is None:
            return list(others.values())
        owner, joined = known
        joined.pop(owner, None)
        for run_id in others.keys() - joined.keys():
            _forget(others.pop(run_id))
        for run_id in joined.keys() - others.keys():
            assignment = self._party.open(joined[run_id])
            if assignment is not None:
                others[run_id] = Session(assignment, self._info)
        return list(others.values())

    def _tell(self, session: Session, say: Callable[[], object]) -> None:
        """Tell a run something, in a thread: those who cannot be reached hold up nobody else."""

        def tell() -> None:
            try:
                say()
            except Exception:
                logger.exception("run %s was not told what became of it", session.assignment.run_id)
            finally:
                _forget(session)

        thread = threading.Thread(target=tell, name="wove-tell", daemon=True)
        thread.start()
        self._told.append(session)
        self._threads.append(thread)

    def _see_off(self, seconds: float | None = None) -> None:
        """Wait until everybody was told, or for some seconds; keep outcomes that nobody took."""
        give_up = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if give_up is None else max(0.0, give_up - time.monotonic()))
        told, self._told, self._threads = self._told, [], []
        try:
            for session in told:
                if session.parked is not None:
                    self._park(session, session.parked)
            if any(session.unclaimed for session in told):
                self.keep(*self._ending)
        except Exception:
            logger.exception("outcomes of job %s were not kept", self._job.id)


def stopped(job: Any) -> list[bytes]:
    """Return what those have joined with who are to be told that a job was stopped on request."""
    try:
        party = Party(job, Assignment(job.args[0]))
        known = party.close()
        return [payload for payload in known[1].values() if party.open(payload) is not None] if known else []
    except Exception:
        logger.exception("job %s: those who share it were not told that it was stopped", job.id)
        return []


def _forget(session: Session) -> None:
    courier_for(session.assignment.origin).remove(session)
