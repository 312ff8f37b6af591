"""Runs tasks in child processes: one that dies takes its own runs with it, and nothing else.

The caller's event loop speaks with all of them: no thread stands between a task and its outcome. Values are
never decoded here: what a child sends is passed on as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import ConfigurationError, SubmitError, WoveError
from wove.exchange import encode_cancel, encode_note, lost_frame
from wove.threads import in_thread
from wove.wire import pack_message
from wove.worker.services.process import Child, describe_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from wove.exchange import Packet
    from wove.worker.services.engine import Emit

logger = logging.getLogger("wove.worker")

#: Seconds that a process gets to say that it is ready, and to end when it is told to.
START_SECONDS = 20.0
STOP_SECONDS = 2.0
#: Pieces that do not wait for more: the process begins with them meanwhile.
_ENOUGH = 16
#: Seconds until a process that died before it was ready is started again, by how often that has happened.
RESTART_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)


class ChildProcesses:
    """An :class:`Engine` of child processes. All methods are called in one event loop.

    Args:
        command: what a child is started with; it has to lead to ``wove.worker.stdio``.
        name: shown in messages and logs.
        processes: how many.
        env: variables set in addition to this process's.
        cwd: the folder they work in.
        max_tasks_per_process: a process that has run so many is replaced.
        idle_seconds: one that had no task for so long is ended, and started again when it is needed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        max_tasks_per_process: int | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        self._command = list(command)
        self._name = name
        self._env = {**os.environ, **(env or {})}
        self._cwd = cwd
        self._max_tasks = max_tasks_per_process
        self._idle_seconds = idle_seconds
        self._slots: list[Child | None] = [None] * processes
        self._retiring: set[Child] = set()
        self._where: dict[str, Child] = {}
        self._failures = 0
        self._not_before = 0.0
        self._closing = False
        self._idle_timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Start all processes and wait until they are ready.

        Raises:
            ConfigurationError: the command cannot be run, or does not lead to a stdio worker.
        """
        self._loop = asyncio.get_running_loop()
        children = [self._spawn(index) for index in range(len(self._slots))]
        try:
            async with asyncio.timeout(START_SECONDS):
                for child in children:
                    await in_thread(child.settled.wait, START_SECONDS)
        except TimeoutError:
            pass
        for child in children:
            if not child.ready:
                raise ConfigurationError(self._not_ready(child))
        self._look_after_idle()

    def run(self, packet: Packet, emit: Emit) -> None:
        """Run a command; see :meth:`Engine.run`."""
        self.run_parts(packet.run_id, packet.task_id, packet.attempt, [packet.raw], emit)

    def run_parts(
        self,
        run_id: str,
        task_id: str,
        attempt: int,
        parts: Sequence[Buffer],
        emit: Emit,
        *,
        take: Callable[[Packet], None] | None = None,
    ) -> None:
        """Run a command that was encoded in this process; ``take`` gets what the child sends, opened already."""
        run = _Sent(task_id, attempt, emit, take)
        try:
            child = self._choose()
        except Exception as exc:
            run.lose(run_id, str(exc))
            return
        child.runs[run_id] = run
        self._where[run_id] = child
        child.accepted += 1
        self._send(child, parts)
        if self._max_tasks is not None and child.accepted >= self._max_tasks:
            # No more for this one; the next run gets a new one.
            self._retire(child)

    def cancel(self, run_id: str) -> None:
        """Cancel a run; see :meth:`Engine.cancel`."""
        child = self._where.get(run_id)
        if child is not None:
            self._send(child, encode_cancel(run_id))

    async def close(self) -> None:
        """End all processes; see :meth:`Engine.close`."""
        if self._closing:
            return
        self._closing = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        children = [child for child in (*self._slots, *self._retiring) if child is not None]
        for child in children:
            # Its end is ours to tell from now on.
            self._forget(child)
        await in_thread(_end_all, children)
        for child in children:
            for run_id, run in child.runs.items():
                run.lose(run_id, f"{self._name} was stopped")
            child.runs.clear()
            child.release()

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [child.process.pid for child in self._slots if child is not None]

    # --- what comes from the processes ------------------------------------------

    def _readable(self, child: Child) -> None:
        try:
            self._read_events(child)
        except (OSError, WoveError) as exc:
            logger.warning("%s: worker process %d: %s", self._name, child.process.pid, exc)
            child.kill()

    def _send(self, child: Child, parts: Sequence[Buffer]) -> None:
        """Send a packet; what is sent in one turn of the loop leaves together, unless that would keep it waiting."""
        first = not child.unsent
        child.put(parts)
        if first and len(child.runs) > 1:
            self._loop.call_soon(self._write, child)
        elif first or len(child.unsent) == _ENOUGH:
            self._write(child)

    def _write(self, child: Child) -> None:
        if child.closed:
            return
        child.flush()
        # Have the loop say when there is room for the rest, and no longer than there is one.
        if bool(child.unsent) == child.writing:
            return
        child.writing = bool(child.unsent)
        if child.writing:
            self._loop.add_writer(child.socket, self._write, child)
        else:
            self._loop.remove_writer(child.socket)

    def _read_events(self, child: Child) -> None:
        packets = child.receive()
        # What tasks wrote before their end is in the pipes by now, and belongs before their end.
        for pipe in list(child.pipes) if packets else ():
            self._read_output(child, pipe)
        for packet in packets:
            if packet is None:
                # It has ended, or closed the line, which is as bad: its exit says how.
                self._unwatch(child)
                child.kill_soon()
                return
            self._pass_on(child, packet)

    def _pass_on(self, child: Child, packet: Packet) -> None:
        if not child.ready:
            child.ready = True
            child.settled.set()
            self._failures = 0
            return
        run_id = packet.envelope.get("run_id")
        run = child.runs.get(run_id) if type(run_id) is str else None
        if run is None:
            return
        run.seq = packet.envelope.get("seq", run.seq)
        if packet.is_terminal:
            self._ended(child, packet.run_id)
        if run.take is not None:
            run.take(packet)
        else:
            run.emit(packet.kind, [packet.raw])

    def _ended(self, child: Child, run_id: str) -> None:
        child.runs.pop(run_id, None)
        self._where.pop(run_id, None)
        child.idle_since = time.monotonic()
        if child in self._retiring and not child.runs:
            self._tell_to_end(child)

    def _read_output(self, child: Child, pipe: Any) -> None:
        text, ended = child.read_output(pipe)
        if ended and pipe in child.pipes:
            self._loop.remove_reader(pipe)
            child.pipes.remove(pipe)
            pipe.close()
        for message in text:
            self._report_output(child, message)

    def _report_output(self, child: Child, message: str) -> None:
        if len(child.runs) != 1:
            # Several tasks share the process, and its descriptors: nobody can tell whose line it is.
            logger.info("%s: worker process %d: %s", self._name, child.process.pid, message)
            return
        ((run_id, run),) = child.runs.items()
        if not run.may_log(len(message)):
            return
        frame = frames.event(frames.LOG, run_id, run.task_id, run.attempt, max(1, run.seq), message=message)
        run.emit(frames.LOG, pack_message(frame, []))

    # --- processes --------------------------------------------------------------

    def _choose(self) -> Child:
        """Return the process with the least to do; an empty place is filled first."""
        index = min(range(len(self._slots)), key=self._load) if len(self._slots) > 1 else 0
        child = self._slots[index]
        if child is not None:
            return child
        now = time.monotonic()
        if now < self._not_before:
            alive = [child for child in self._slots if child is not None]
            if alive:
                return min(alive, key=lambda child: len(child.runs))
            raise SubmitError(
                f"{self._name}: worker processes end as soon as they are started; the next attempt is due in "
                f"{self._not_before - now:.1f} s"
            )
        return self._spawn(index)

    def _load(self, index: int) -> int:
        child = self._slots[index]
        return -1 if child is None else len(child.runs)

    def _spawn(self, index: int) -> Child:
        try:
            child = Child(self._command, env=self._env, cwd=self._cwd)
        except OSError as exc:
            raise ConfigurationError(
                f"{self._name}: the command {self._command[0]!r} cannot be run ({exc.strerror or exc}): "
                'executor_config["command"] is a program with its arguments that leads to "-m wove.worker.stdio"'
            ) from exc
        self._slots[index] = child
        self._loop.add_reader(child.socket, self._readable, child)
        for pipe in child.pipes:
            self._loop.add_reader(pipe, self._read_output, child, pipe)
        threading.Thread(
            target=self._wait_for, args=(child,), name=f"wove-wait-{child.process.pid}", daemon=True
        ).start()
        return child

    def _wait_for(self, child: Child) -> None:
        child.process.wait()
        child.exited.set()
        try:
            self._loop.call_soon_threadsafe(partial(self._bury, child))
        except RuntimeError:
            pass  # the loop has ended, and whoever waited with it

    def _bury(self, child: Child) -> None:
        """A process has ended: what it still said counts; runs without an outcome are lost."""
        if self._closing:
            child.settled.set()
            return
        while not child.closed:
            before = len(child.runs)
            try:
                self._read_events(child)
            except (OSError, WoveError):
                break
            if len(child.runs) == before and not child.more:
                break
        for pipe in list(child.pipes):
            self._read_output(child, pipe)
        how = describe_exit(child.process.returncode)
        if not child.ready:
            self._failures += 1
            delay = RESTART_SECONDS[min(self._failures, len(RESTART_SECONDS)) - 1]
            self._not_before = time.monotonic() + delay
            how = self._not_ready(child)
        for run_id, run in child.runs.items():
            self._where.pop(run_id, None)
            run.lose(run_id, f"worker process {child.process.pid} of {self._name} {how}")
        child.runs.clear()
        self._forget(child)
        child.settled.set()

    def _forget(self, child: Child) -> None:
        self._retiring.discard(child)
        if child in self._slots:
            self._slots[self._slots.index(child)] = None
        self._unwatch(child)
        for pipe in child.pipes:
            self._loop.remove_reader(pipe)
        if not self._closing:
            child.release()

    def _unwatch(self, child: Child) -> None:
        if not child.closed:
            child.closed = True
            self._loop.remove_reader(child.socket)
            if child.writing:
                self._loop.remove_writer(child.socket)

    def _not_ready(self, child: Child) -> str:
        code = child.process.poll()
        what = "did not get ready in time" if code is None else describe_exit(code)
        said = child.last_words()
        return (
            f"{self._name}: a worker process started with {' '.join(self._command)!r} {what} before it was ready"
            + (f"; its last words:\n{said}" if said else "")
        )

    def _retire(self, child: Child) -> None:
        if child in self._slots:
            self._slots[self._slots.index(child)] = None
        self._retiring.add(child)
        if not child.runs:
            self._tell_to_end(child)

    def _tell_to_end(self, child: Child) -> None:
        self._send(child, encode_note(frames.SHUTDOWN))
        child.kill_soon(STOP_SECONDS + 1)

    def _look_after_idle(self) -> None:
        if self._idle_seconds is None:
            return
        now = time.monotonic()
        for child in self._slots:
            idle = child is not None and child.ready and not child.runs
            if child is not None and idle and now - child.idle_since > self._idle_seconds:
                self._retire(child)
        pause = min(1.0, self._idle_seconds / 2)
        self._idle_timer = self._loop.call_later(pause, self._look_after_idle)


def _end_all(children: Sequence[Child]) -> None:
    """Tell processes to end, wait, and end those that do not. Blocks."""
    for child in children:
        try:
            child.socket.settimeout(0.5)
            child.put(encode_note(frames.SHUTDOWN))
            child.flush()
            child.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # gone already
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        if not child.exited.wait(max(0.0, deadline - time.monotonic())):
            child.kill()
            child.exited.wait(STOP_SECONDS)


class _Sent:
    """A run that a process has."""

    __slots__ = ("_logged", "attempt", "emit", "seq", "take", "task_id")

    #: Characters of output that are passed on per run.
    MAX_OUTPUT = 16 * 1024 * 1024

    def __init__(
        self, task_id: str, attempt: int, emit: Emit, take: Callable[[Packet], None] | None = None
    ) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.emit = emit
        self.take = take
        self.seq = 0
        self._logged = 0

    def may_log(self, length: int) -> bool:
        self._logged += length
        return self._logged <= self.MAX_OUTPUT

    def lose(self, run_id: str, message: str) -> None:
        frame = lost_frame(run_id, self.task_id, message, attempt=self.attempt, seq=self.seq + 1)
        self.emit(frames.TASK_ERROR, pack_message(frame, []))
