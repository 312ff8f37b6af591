"""A run that a listener takes events for, and who was last heard of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.security import run_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from wove.frames import Frame
    from wove.security import SecretRing
    from wove.shared_parts import Part

#: Seconds that a worker gets to come back after it has lost its connections.
RECONNECT_SECONDS = 1.0
#: Seconds without a word after which nobody waits for an execution any more: beats come every five.
ALIVE_SECONDS = 8.0
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

    def wake(self) -> None:
        """Let the beats that are held for it look at it again."""
        for watcher in tuple(self.watchers):
            watcher.set()

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
