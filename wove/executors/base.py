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
    #: Takes a ``run_task`` command as :meth:`send` does, at once, and calls ``done`` in the event loop with what
    #: refused it, or None; a ``cancel_task`` command may follow before that. None: commands go by :meth:`send`.
    post: Callable[[Frame, Callable[[BaseException | None], None]], None] | None = None
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

    async def recv_many(self) -> list[Frame]:
        """Return the events there are, waiting for the first. An executor that knows more than one does well to."""
        return [await self.recv()]

    @abstractmethod
    async def stop(self) -> None:
        """Release everything. Idempotent; also called after a failed :meth:`start`."""


class FrameChannel:
    """Carries frames from any thread to one event loop.

    However many frames arrive while the loop is busy, it is woken once.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: deque[Frame] = deque()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._woken = False
        self._closed = False

    def put(self, frames: Iterable[Frame]) -> bool:
        """Hand frames over; callable from any thread.

        Returns:
            False when the receiving side is gone.
        """
        now = time.monotonic()
        for frame in frames:
            frame["received_at"] = now  # our own clock: a peer's word about it counts nothing
            self._frames.append(frame)
        with self._lock:
            if self._closed:
                return False
            if self._woken:
                return True
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop was closed without stopping us
                self._closed = True
                return False
        return True

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

    async def get_many(self) -> list[Frame]:
        """Return the frames there are, waiting for the first."""
        found = [await self.get()]
        while self._frames:
            found.append(self._frames.popleft())
        return found

    def close(self) -> None:
        """Take no more frames."""
        with self._lock:
            self._closed = True
        self._frames.clear()
