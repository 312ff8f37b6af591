"""The courier: one daemon thread per callback origin that speaks while tasks run.

A task may hold its own thread for minutes. Meanwhile the courier reports that it has
started, sends its progress, and holds the *open beat*: one request to the callback server
that stays unanswered until the next beat is due or one of the worker's runs is cancelled.
Tasks that end within a moment cost no request here, and
the thread sleeps while no task runs.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wove.security import beat_tag, cancel_tag, same
from wove.worker.connection import read_reply, send
from wove.worker.early import first_byte, has_decrypted, reply_after
from wove.worker.transport import connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from http.client import HTTPConnection

    from wove.worker.session import Session

logger = logging.getLogger("wove.worker")

#: Seconds after which a running task is reported as started: from then on its death shows.
REPORT_AFTER = 0.01
#: Seconds that progress is collected before it is sent.
NEWS_EVERY = 0.1
#: Seconds after which a running task joins the open beat.
BEAT_AFTER = 1.0
#: Seconds that a beat is held open at most.
HOLD = 5.0
#: Seconds an idle courier waits for more before its thread ends.
IDLE_SECONDS = 30.0
#: Runs in one beat at most.
MAX_RUNS = 200
_BEAT_BACKOFF = (0.1, 0.3, 1.0, 2.0)


class Courier:
    """Speaks to one callback origin for all running tasks of this process."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._thread: threading.Thread | None = None
        #: When the thread looks up by itself; infinity while it is looking.
        self._wake_at = 0.0
        self._news_at: float | None = None
        self._patience = IDLE_SECONDS

    def add(self, session: Session) -> None:
        """Take care of a session from now on."""
        session.notify = self._news
        with self._lock:
            self._sessions[session.execution] = session
            if self._thread is None:
                self._wake_reader, self._wake_writer = socket.socketpair()
                self._wake_writer.setblocking(False)
                self._thread = threading.Thread(target=self._run, name="wove-courier", daemon=True)
                self._thread.start()
            elif session.begun + REPORT_AFTER < self._wake_at:
                self._wake()

    @contextmanager
    def caring_for(self, session: Session) -> Iterator[None]:
        """Take care of a session within the block."""
        if not session.assignment.attended:
            yield
            return
        self.add(session)
        try:
            yield
        finally:
            self.remove(session)

    def retire_soon(self) -> None:
        """End the thread as soon as no task runs: nobody will come for this origin any more."""
        with self._lock:
            self._patience = 0.0
            if self._thread is not None:
                self._wake()

    def remove(self, session: Session) -> None:
        """Take care of a session no longer."""
        with self._lock:
            self._sessions.pop(session.execution, None)

    def _news(self) -> None:
        with self._lock:
            if self._news_at is None:
                self._news_at = time.monotonic() + NEWS_EVERY
                self._wake()

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"w")
        except OSError:
            pass  # it has reasons enough to wake up, or is ending

    # --- in the thread --------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            beats = _Beats(self._origin, selector)
            idle_since = time.monotonic()
            while True:
                try:
                    due = self._turn(beats)
                except Exception:
                    logger.exception("the courier to %s stumbled", self._origin)
                    due = time.monotonic() + 1.0
                now = time.monotonic()
                if self._sessions or beats.held:
                    idle_since = now
                elif now - idle_since >= self._patience and self._retire():
                    beats.close()
                    return
                self._sleep(selector, beats, max(0.0, due - now))

    def _turn(self, beats: _Beats) -> float:
        """Do what is due and return when something else will be."""
        now = time.monotonic()
        with self._lock:
            self._wake_at = float("inf")
            sessions = list(self._sessions.values())
            news = self._news_at is not None and self._news_at <= now
            if news:
                self._news_at = None
        due = now + IDLE_SECONDS
        for session in sessions:
            due = min(due, self._attend(session, now, news))
        due = min(due, beats.open([s for s in sessions if _beat_at(s) <= now and not s.unwanted]))
        with self._lock:
            self._wake_at = due if self._news_at is None else min(due, self._news_at)
            return self._wake_at

    def _attend(self, session: Session, now: float, news: bool) -> float:
        own = session.attend(now)
        report_at, beat_at = session.begun + REPORT_AFTER, _beat_at(session)
        if now < report_at:
            return min(own, report_at)
        if session.has_news and (news or not session.started):
            session.report()
            if session.has_news:  # more than one report holds
                self._news()
        return min(own, beat_at) if now < beat_at else own

    def _sleep(self, selector: selectors.BaseSelector, beats: _Beats, pause: float) -> None:
        for held in beats.decrypted():
            beats.answered(held)
            pause = 0.0
        for key, _ in selector.select(pause):
            if key.fileobj is self._wake_reader:
                self._wake_reader.recv(4096)
            else:
                beats.answered(key.data)

    def _retire(self) -> bool:
        with self._lock:
            if self._sessions:
                return False
            self._thread = None
            self._wake_reader.close()
            self._wake_writer.close()
        with _couriers_lock:
            # Who asks meanwhile keeps this one, and starts it anew.
            if _couriers.get(self._origin) is self and not self._sessions and self._thread is None:
                del _couriers[self._origin]
        return True


def _beat_at(session: Session) -> float:
    heartbeat = session.assignment.heartbeat
    return session.begun + (min(BEAT_AFTER, heartbeat / 3) if heartbeat else BEAT_AFTER)


class _Beats:
    """The beats that are held open; normally one, a second one while a run joins."""

    def __init__(self, origin: str, selector: selectors.BaseSelector) -> None:
        self._origin = origin
        self._selector = selector
        self._failures = 0
        self._retry_at = 0.0
        self._spare: HTTPConnection | None = None
        self.held: list[_Held] = []

    def open(self, sessions: list[Session]) -> float:
        """Open a beat for those sessions that none holds; return when to look again."""
        now = time.monotonic()
        beating = {session.execution for held in self.held for session in held.sessions}
        waiting = [session for session in sessions if session.execution not in beating][:MAX_RUNS]
        if waiting and now >= self._retry_at:
            try:
                self._begin(waiting, now)
            except Exception as exc:
                self._failed(exc)
        for held in [held for held in self.held if held.give_up <= now]:
            self._drop(held)
        times = [held.give_up for held in self.held]
        if waiting and now < self._retry_at:
            times.append(self._retry_at)
        return min(times, default=now + HOLD)

    def _begin(self, sessions: list[Session], now: float) -> None:
        hold = min([HOLD, *(s.assignment.heartbeat / 3 for s in sessions if s.assignment.heartbeat)])
        lines = [f"hold {hold:.3f}"]
        for session in sessions:
            session.beats += 1
            task = session.assignment
            tag = beat_tag(task.key, task.run_id, session.execution, task.attempt, session.beats)
            lines.append(
                f"{session.beat_word} {task.run_id} {session.execution} {task.attempt} {session.beats} {task.kid} "
                f"{tag.hex()}{session.beat_rest}"
            )
        body = "\n".join(lines).encode()
        connection, self._spare = self._spare or connect(self._origin, timeout=5.0), None
        path = f"{sessions[0].assignment.path}/wove/v1/beats"
        try:
            send(connection, "POST", path, {"Content-Type": "text/plain"}, [body], len(body), 5.0)
            held = _Held(connection, sessions, now + hold + 5.0)
            self._selector.register(connection.sock, selectors.EVENT_READ, held)
        except BaseException:
            connection.close()
            raise
        self.held.append(held)

    def close(self) -> None:
        """Close the connection that is kept for the next beat."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def decrypted(self) -> list[_Held]:
        """Return the beats whose answers no selector will speak of."""
        return [held for held in self.held if has_decrypted(held.connection.sock)]

    def answered(self, held: _Held) -> None:
        """Read the reply to a beat and pass cancellations on; nothing when TLS alone has spoken."""
        first: bytes | None = b""
        broken: Exception | None = None
        try:
            first = first_byte(held.connection.sock)
        except Exception as exc:
            broken = exc
        if first is None:
            return
        self.held.remove(held)
        self._selector.unregister(held.connection.sock)
        try:
            if broken is not None:
                raise broken
            reply = read_reply(self._origin, reply_after(first, held.connection))
            if reply.status == 410:
                held.gone()
            elif reply.status != 200:
                raise ConnectionError(f"the callback server answered {reply.status} to a beat")
            held.take(reply.body)
        except Exception as exc:
            held.connection.close()
            self._failed(exc)
        else:
            self._failures = 0
            self.close()
            self._spare = held.connection

    def _drop(self, held: _Held) -> None:
        self.held.remove(held)
        self._selector.unregister(held.connection.sock)
        held.connection.close()
        self._failed(TimeoutError("no answer to a beat"))

    def _failed(self, exc: Exception) -> None:
        delay = _BEAT_BACKOFF[min(self._failures, len(_BEAT_BACKOFF) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + delay
        logger.debug("a beat to %s failed: %s", self._origin, exc)


class _Held:
    """One open beat."""

    def __init__(self, connection: HTTPConnection, sessions: list[Session], give_up: float) -> None:
        self.connection = connection
        self.sessions = sessions
        self.give_up = give_up
        # By execution: two executions of one run may live here after a redelivery.
        self._counts = {session.execution: (session, session.beats) for session in sessions}

    def gone(self) -> None:
        """Beat no more for runs that the callback server does not know."""
        for session in self.sessions:
            session.unwanted = True

    def take(self, body: bytes | memoryview) -> None:
        for line in str(body, "ascii", "replace").splitlines():
            word, _, rest = line.partition(" ")
            execution, _, rest = rest.partition(" ")
            given, _, text = rest.partition(" ")
            if word not in ("cancel", "withdrawn") or execution not in self._counts:
                continue
            session, count = self._counts[execution]
            task = session.assignment
            signed = execution if word == "cancel" else f"{execution} {text}"
            expected = cancel_tag(task.key, task.run_id, signed, count)
            if not same(expected.hex().encode(), given.encode()):
                continue
            if word == "cancel":
                session.cancel()
            else:
                session.withdraw(text)


_couriers: dict[str, Courier] = {}
_couriers_lock = threading.Lock()


def courier_for(origin: str) -> Courier:
    """Return this process's courier to a callback origin."""
    with _couriers_lock:
        courier = _couriers.get(origin)
        if courier is None:
            courier = _couriers[origin] = Courier(origin)
        return courier


def retire(origin: str) -> None:
    """End this process's courier to an origin whose callback server goes away."""
    with _couriers_lock:
        courier = _couriers.get(origin)
    if courier is not None:
        courier.retire_soon()


def _forget() -> None:
    # In a forked child the threads are gone and the locks may be held for ever.
    global _couriers_lock
    _couriers_lock = threading.Lock()
    _couriers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
