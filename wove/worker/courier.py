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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wove.worker.beats import Beats
    from wove.worker.session import Session

logger = logging.getLogger("wove.worker")

#: Seconds after which a running task is reported as started: from then on its death shows.
REPORT_AFTER = 0.01
#: Seconds after the last task for which the thread looks up by itself: one task after another does
#: not have to wake it, each at the price of a switch between threads.
LINGER = 0.1
#: Seconds that progress is collected before it is sent.
NEWS_EVERY = 0.1
#: Seconds after which a running task joins the open beat.
BEAT_AFTER = 1.0
#: Seconds an idle courier waits for more before its thread ends.
IDLE_SECONDS = 30.0


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
        self._last_removed = 0.0
        self._beats: Beats | None = None

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
            elif session.begun + 2 * REPORT_AFTER < self._wake_at:
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

    def end(self, seconds: float) -> None:
        """End the thread as soon as no task runs, and wait for that so long at most."""
        thread = self._thread
        self.retire_soon()
        if thread is not None:
            thread.join(seconds)

    def remove(self, session: Session) -> None:
        """Take care of a session no longer."""
        with self._lock:
            self._sessions.pop(session.execution, None)
            self._last_removed = time.monotonic()

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
            idle_since = time.monotonic()
            while True:
                try:
                    due = self._turn(selector)
                except Exception:
                    logger.exception("the courier to %s stumbled", self._origin)
                    due = time.monotonic() + 1.0
                now = time.monotonic()
                if self._sessions or (self._beats is not None and self._beats.held):
                    idle_since = now
                elif now - idle_since >= self._patience and self._retire():
                    return
                self._sleep(selector, max(0.0, due - now))

    def _turn(self, selector: selectors.BaseSelector) -> float:
        """Do what is due and return when something else will be."""
        now = time.monotonic()
        with self._lock:
            self._wake_at = float("inf")
            sessions = list(self._sessions.values())
            news = self._news_at is not None and self._news_at <= now
            if news:
                self._news_at = None
            due = now + (REPORT_AFTER if now - self._last_removed < LINGER else IDLE_SECONDS)
            if not sessions and self._beats is None:
                self._news_at = None
                self._wake_at = due
                return due
        for session in sessions:
            due = min(due, self._attend(session, now, news))
        due = min(due, self._beat([s for s in sessions if _beat_at(s) <= now and not s.unwanted], selector))
        with self._lock:
            self._wake_at = due if self._news_at is None else min(due, self._news_at)
            return self._wake_at

    def _beat(self, sessions: list[Session], selector: selectors.BaseSelector) -> float:
        if self._beats is None:
            if not sessions:
                return float("inf")
            # Most tasks end before their first beat: a forking worker would load this for each of them.
            from wove.worker.beats import Beats

            self._beats = Beats(self._origin, selector)
        return self._beats.open(sessions)

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

    def _sleep(self, selector: selectors.BaseSelector, pause: float) -> None:
        beats = self._beats
        if beats is not None:
            for held in beats.decrypted():
                beats.answered(held)
                pause = 0.0
        for key, _ in selector.select(pause):
            if key.fileobj is self._wake_reader:
                self._wake_reader.recv(4096)
            elif beats is not None:
                beats.answered(key.data)

    def _retire(self) -> bool:
        with self._lock:
            if self._sessions:
                return False
            self._thread = None
            beats, self._beats = self._beats, None
            self._wake_reader.close()
            self._wake_writer.close()
        if beats is not None:
            beats.close()
        with _couriers_lock:
            # Who asks meanwhile keeps this one, and starts it anew.
            if _couriers.get(self._origin) is self and not self._sessions and self._thread is None:
                del _couriers[self._origin]
        return True


def _beat_at(session: Session) -> float:
    heartbeat = session.assignment.heartbeat
    return session.begun + (min(BEAT_AFTER, heartbeat / 3) if heartbeat else BEAT_AFTER)


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


def dismiss(origin: str, seconds: float) -> None:
    """End this process's courier to an origin, and wait so long at most until its thread has ended."""
    with _couriers_lock:
        courier = _couriers.pop(origin, None)
    if courier is not None:
        courier.end(seconds)


def _forget() -> None:
    # In a forked child the threads are gone and the locks may be held for ever.
    global _couriers_lock
    _couriers_lock = threading.Lock()
    _couriers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
