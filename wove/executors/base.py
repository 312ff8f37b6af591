"""The executor contract: a stream of frames out, a stream of frames back."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from wove.frames import Frame

#: Events that are handed over before other tasks of the loop have their turn.
EVENTS_PER_TURN = 200


class EnvironmentExecutor(ABC):
    """Delivers frames to the place where an environment's tasks run, and back.

    CGI-like stream transport: commands go in by :meth:`send`, events come out of
    :meth:`recv`. Methods are called from one event loop. The runtime keeps the run table,
    the clocks and the exceptions; an executor only carries frames (see ``wove/frames.py``
    for the vocabulary) and must report exactly one terminal event per run it accepted.
    """

    #: Silence allowed once a run has started, in seconds, unless the user sets
    #: ``delivery_heartbeat_seconds``. None: this executor's workers send no heartbeats.
    default_heartbeat_seconds: float | None = None
    #: Takes a ``run_task`` command as :meth:`send` does, at once, and calls ``done`` in the event loop, perhaps before
    #: it returns, with what refused it, or None; a ``cancel_task`` command may follow before that. Returns False
    #: when nothing was done, and the command is to go by :meth:`send`. None: all commands go by :meth:`send`.
    post: Callable[[Frame, Callable[[BaseException | None], None]], bool | None] | None = None
    #: Whether a ``run_task`` may be sent a second time, with ``delivery["repeated"]``, after it failed with a
    #: :class:`SubmitError` that may have been accepted. Where not, it is sent as another attempt.
    recognises_repeats: bool = False
    #: Whether ``run_task`` frames may have ``shared``: the callable as all the runs of a ``map`` share it.
    takes_shared: bool = False

    @abstractmethod
    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Make ready to carry frames.

        Args:
            environment_name: the name the environment was defined under.
            environment_config: its ``executor_config``.
            run_config: the runtime's ``run_config``.

        Raises:
            ConfigurationError: an unusable setting, named together with the mend.
            MissingDispatchFeatureError: a library is missing; names the install command.
        """

    @abstractmethod
    async def send(self, frame: Frame) -> None:
        """Hand a command over. Returns once it is accepted; cancel-safe.

        Raises:
            Exception: the command was not accepted; for ``run_task`` this ends the run.
        """

    @abstractmethod
    async def recv(self) -> Frame:
        """Return the next event, waiting for it. Cancel-safe: no event is lost."""

    @abstractmethod
    async def stop(self) -> None:
        """Release everything. Idempotent; also called after a failed :meth:`start`."""

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand every event to ``take`` in the event loop from now on: it spares a turn of the loop.

        Returns:
            False when events are to be fetched by :meth:`recv`.
        """
        return False


def is_whole(executor: EnvironmentExecutor, short: str, long: str) -> bool:
    """Tell whether the method ``short`` does what ``long`` does.

    A subclass that overrides ``send`` or ``recv`` alone, to look at frames for one, means all of them.
    """
    if long in getattr(executor, "__dict__", ()):
        return False
    for cls in type(executor).__mro__:
        if short in vars(cls):
            return True
        if long in vars(cls):
            return False
    return False


class FrameChannel:
    """Carries frames from any thread to one event loop.

    However many frames arrive while the loop is busy, it is woken once. Those that arrive in the loop itself
    are handed over at once, where somebody was attached to take them.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._frames: deque[Frame] = deque()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._taker: Callable[[Frame], None] | None = None
        self._at_once = False
        self._woken = False
        self._closed = False

    def attach(self, take: Callable[[Frame], None], *, at_once: bool = True) -> bool:
        """Hand frames to ``take`` from now on; see :meth:`EnvironmentExecutor.attach`.

        ``at_once`` says whether ``take`` may be called by whoever puts a frame in the loop itself.
        """
        self._taker = take
        self._at_once = at_once
        if self._frames:
            self._loop.call_soon(self._drain)
        return True

    def put(self, frames: Iterable[Frame]) -> bool:
        """Hand frames over; callable from any thread.

        Returns:
            False when the receiving side is gone.
        """
        now = time.monotonic()
        here = self._at_once and threading.get_ident() == self._thread
        for frame in frames:
            frame["received_at"] = now  # our own clock: a peer's word about it counts nothing
            # Not past those that another thread has put before.
            if here and self._taker is not None and not self._frames and not self._closed:
                self._taker(frame)
            else:
                self._frames.append(frame)
        if not self._frames:
            return not self._closed
        with self._lock:
            if self._closed:
                return False
            if self._woken:
                return True
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set if self._taker is None else self._drain)
            except RuntimeError:  # the loop was closed without stopping us
                self._closed = True
                return False
        return True

    def _drain(self) -> None:
        with self._lock:
            self._woken = False
        try:
            for _ in range(EVENTS_PER_TURN):
                if not self._frames or self._taker is None:
                    return
                self._taker(self._frames.popleft())
        finally:
            if self._frames and self._taker is not None:  # also when one of them raised
                self._loop.call_soon(self._drain)

    async def get(self) -> Frame:
        """Return the next frame, waiting for it. One reader at a time."""
        while not self._frames:
            with self._lock:
                self._woken = False
                self._ready.clear()
            # Between the test and the reset another thread may have put a frame.
            if self._frames:
                break
            await self._ready.wait()
        return self._frames.popleft()

    def close(self) -> None:
        """Take no more frames."""
        with self._lock:
            self._closed = True
        self._frames.clear()
