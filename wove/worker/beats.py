"""The beats that a courier holds open; loaded when a task has run long enough for one."""

from __future__ import annotations

import logging
import selectors
import time
from typing import TYPE_CHECKING

from wove.security import beat_tag, cancel_tag, same
from wove.worker.connection import read_reply, send
from wove.worker.early import first_byte, has_decrypted, reply_after
from wove.worker.transport import connect

if TYPE_CHECKING:
    from http.client import HTTPConnection

    from wove.worker.session import Session

logger = logging.getLogger("wove.worker")

#: Seconds that a beat is held open at most.
HOLD = 5.0
#: Runs in one beat at most.
MAX_RUNS = 200
_BEAT_BACKOFF = (0.1, 0.3, 1.0, 2.0)


class Beats:
    """The beats that are held open; normally one, a second one while a run joins."""

    def __init__(self, origin: str, selector: selectors.BaseSelector) -> None:
        self._origin = origin
        self._selector = selector
        self._failures = 0
        self._retry_at = 0.0
        self._spare: HTTPConnection | None = None
        self.held: list[Held] = []

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
            held = Held(connection, sessions, now + hold + 5.0)
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

    def decrypted(self) -> list[Held]:
        """Return the beats whose answers no selector will speak of."""
        return [held for held in self.held if has_decrypted(held.connection.sock)]

    def answered(self, held: Held) -> None:
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

    def _drop(self, held: Held) -> None:
        self.held.remove(held)
        self._selector.unregister(held.connection.sock)
        held.connection.close()
        self._failed(TimeoutError("no answer to a beat"))

    def _failed(self, exc: Exception) -> None:
        delay = _BEAT_BACKOFF[min(self._failures, len(_BEAT_BACKOFF) - 1)]
        self._failures += 1
        self._retry_at = time.monotonic() + delay
        logger.debug("a beat to %s failed: %s", self._origin, exc)


class Held:
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

    def take(self, body: bytes | bytearray | memoryview) -> None:
        """Pass on the cancellations that the reply names."""
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
