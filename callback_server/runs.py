"""The runs a listener takes events for."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import normalize_exception
from wove.security import run_key

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

    from wove.frames import Frame
    from wove.security import SecretRing

#: Cancelled runs that are remembered for workers which have yet to hear of it.
MAX_CANCELLED = 4096


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
    """

    __slots__ = (
        "_keys", "attempt", "beats", "cancelled", "environment", "max_body", "message",
        "nonce", "ring", "run_id", "sink", "started", "task_id", "watchers",
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
        attempt: int = 1,
    ) -> None:
        self.run_id = run_id
        self.task_id = task_id
        self.environment = environment
        self.ring = ring
        self.nonce = nonce
        self.sink = sink
        self.max_body = max_body
        self.message = message
        self.attempt = attempt
        self.cancelled = False
        #: Whether a worker has spoken of it.
        self.started = False
        #: Per execution, the count of its last beat.
        self.beats: dict[str, int] = {}
        #: Set when the run is cancelled or closed: wakes the beats that are held for it.
        self.watchers: set[asyncio.Event] = set()
        self._keys: dict[str, bytes] = {}

    def event(self, kind: str, **fields: Any) -> Frame:
        """Return an event of this run that arises here, not at its worker."""
        return frames.event(kind, self.run_id, self.task_id, self.attempt, 2**31, **fields)

    def key(self, kid: str) -> bytes | None:
        """Return the key of this run's events under the secret ``kid``; None for an unknown one."""
        key = self._keys.get(kid)
        if key is None:
            secret = self.ring.get(kid)
            if secret is None:
                return None
            key = self._keys[kid] = run_key(secret, self.environment, self.run_id, self.nonce)
        return key


class OpenRuns:
    """The table of a listener. Read in its thread; runs are added from any thread."""

    def __init__(self) -> None:
        self._runs: dict[str, OpenRun] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: str) -> OpenRun | None:
        """Return the open run with that id."""
        return self._runs.get(run_id)

    def add(self, run: OpenRun) -> None:
        """Take events for ``run`` from now on."""
        self._runs[run.run_id] = run

    def close(self, run_id: str) -> OpenRun | None:
        """Take no more events for a run; requests for it are answered 410."""
        self._cancelled.pop(run_id, None)
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.message = None
            _wake(run)
        return run

    def fail_all(self, exc: BaseException) -> None:
        """End every run with an error: nobody listens for them any more."""
        error = normalize_exception(exc, source="executor")
        error["message"] = f"the callback listener failed: {error['kind']}: {error['message']}"
        for run in list(self._runs.values()):
            self.close(run.run_id)
            run.sink([run.event(frames.TASK_ERROR, error=error)])

    def of(self, sink: Callable[[Iterable[Frame]], bool]) -> list[OpenRun]:
        """Return the open runs whose events go to ``sink``. Callable from any thread."""
        return [run for run in list(self._runs.values()) if run.sink == sink]

    def cancel(self, run_id: str) -> None:
        """Tell the run's worker, when it next asks or at once over its open beat, to stop."""
        run = self._runs.get(run_id)
        if run is None or run.cancelled:
            return
        run.cancelled = True
        run.message = None
        # Most workers acknowledge; one that died never does, and is forgotten in the end.
        self._cancelled[run_id] = None
        if len(self._cancelled) > MAX_CANCELLED:
            oldest, _ = self._cancelled.popitem(last=False)
            self.close(oldest)
        _wake(run)


def _wake(run: OpenRun) -> None:
    for watcher in tuple(run.watchers):
        watcher.set()
