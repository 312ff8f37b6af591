"""Runs tasks in child processes: one that dies takes its own runs with it, and nothing else.

One thread speaks with all of them. Values are never decoded here: what a child sends is passed on as it is.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import ConfigurationError, SubmitError, WoveError
from wove.exchange import encode_cancel, encode_note, lost_frame
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
#: Seconds until a process that died before it was ready is started again; doubled each time.
RESTART_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)


class ChildProcesses:
    """An :class:`Engine` of child processes.

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
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name=f"wove-children-{name}", daemon=True)

    # --- any thread -----------------------------------------------------------

    def start(self) -> None:
        """Start all processes and wait until they are ready. Blocks.

        Raises:
            ConfigurationError: the command cannot be run, or does not lead to a stdio worker.
        """
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._thread.start()
        children: list[Child] = []
        done = threading.Event()
        problem: list[Exception] = []

        def spawn_all() -> None:
            try:
                children.extend(self._spawn(index) for index in range(len(self._slots)))
            except Exception as exc:
                problem.append(exc)
            done.set()

        self._post(spawn_all)
        done.wait(START_SECONDS)
        deadline = time.monotonic() + START_SECONDS
        for child in children:
            child.settled.wait(max(0.0, deadline - time.monotonic()))
            if not child.ready and not problem:
                problem.append(ConfigurationError(self._not_ready(child)))
        if problem:
            raise problem[0]

    def run(self, packet: Packet, emit: Emit) -> None:
        """Run a command; see :meth:`Engine.run`."""
        self.run_parts(packet.run_id, packet.task_id, packet.attempt, [packet.raw], emit)

    def run_parts(self, run_id: str, task_id: str, attempt: int, parts: Sequence[Buffer], emit: Emit) -> None:
        """Run a command that was encoded in this process."""
        self._post(partial(self._run, run_id, parts, _Sent(task_id, attempt, emit)))

    def cancel(self, run_id: str) -> None:
        """Cancel a run; see :meth:`Engine.cancel`."""
        self._post(partial(self._cancel, run_id))

    def close(self) -> None:
        """End all processes; see :meth:`Engine.close`."""
        if self._closing:
            return
        self._closing = True
        if self._thread.is_alive():
            self._post(lambda: None)
            self._thread.join(2 * STOP_SECONDS)
        else:
            self._end_all()

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [child.process.pid for child in self._slots if child is not None]

    def _post(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        with self._lock:
            if self._woken:
                return
            self._woken = True
        try:
            self._wake_writer.send(b"w")
        except OSError:
            pass  # closed meanwhile: nobody listens any more

    # --- the thread -----------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, mask in self._selector.select(self._pause()):
                    if key.data is None:
                        self._take_calls()
                    else:
                        self._attend(key, mask)
                self._look_after_idle()
        except Exception:
            logger.exception("%s: the thread that speaks with the worker processes failed", self._name)
        finally:
            self._end_all()

    def _pause(self) -> float | None:
        if self._idle_seconds is None:
            return None
        return min(1.0, self._idle_seconds / 2)

    def _take_calls(self) -> None:
        self._wake_reader.recv(4096)
        with self._lock:
            self._woken = False
        for _ in range(len(self._calls)):
            try:
                self._calls.popleft()()
            except Exception:
                logger.exception("%s: a command failed", self._name)

    def _attend(self, key: selectors.SelectorKey, mask: int) -> None:
        child, source = key.data
        if source == "output":
            self._read_output(child, key.fileobj)
            return
        try:
            if mask & selectors.EVENT_WRITE:
                child.flush()
            if mask & selectors.EVENT_READ:
                self._read_events(child)
        except (OSError, WoveError) as exc:
            logger.warning("%s: worker process %d: %s", self._name, child.process.pid, exc)
            child.kill()
        self._watch(child)

    def _watch(self, child: Child) -> None:
        if child.closed:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.unsent else 0)
        if wanted != child.watched:
            child.watched = wanted
            self._selector.modify(child.socket, wanted, (child, "socket"))

    def _read_events(self, child: Child) -> None:
        for packet in child.receive():
            if packet is None:
                # It has ended, or closed the line, which is as bad: its exit says how.
                self._selector.unregister(child.socket)
                child.closed = True
                child.kill_soon()
                return
            self._pass_on(child, packet)

    def _pass_on(self, child: Child, packet: Packet) -> None:
        if not child.ready:
            child.ready = True
            child.settled.set()
            self._failures = 0
            return
        run = child.runs.get(packet.run_id)
        if run is None:
            return
        run.seq = packet.envelope.get("seq", run.seq)
        if packet.is_terminal:
            # What the task wrote before its end is in the pipes by now, and belongs before its end.
            for pipe in child.pipes:
                self._read_output(child, pipe)
            self._ended(child, packet.run_id)
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
            self._selector.unregister(pipe)
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

    # --- runs -----------------------------------------------------------------

    def _run(self, run_id: str, parts: Sequence[Buffer], run: _Sent) -> None:
        try:
            child = self._choose()
        except Exception as exc:
            run.lose(run_id, str(exc))
            return
        child.runs[run_id] = run
        self._where[run_id] = child
        child.accepted += 1
        child.send(parts)
        if self._max_tasks is not None and child.accepted >= self._max_tasks:
            # No more for this one; the next run gets a new one.
            self._retire(child)
        self._watch(child)

    def _cancel(self, run_id: str) -> None:
        child = self._where.get(run_id)
        if child is not None:
            child.send(encode_cancel(run_id))
            self._watch(child)

    def _choose(self) -> Child:
        """Return the process with the least to do; an empty place is filled first."""
        index = min(range(len(self._slots)), key=self._load)
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

    # --- processes ------------------------------------------------------------

    def _spawn(self, index: int) -> Child:
        try:
            child = Child(self._command, env=self._env, cwd=self._cwd)
        except OSError as exc:
            raise ConfigurationError(
                f"{self._name}: the command {self._command[0]!r} cannot be run ({exc.strerror or exc}): "
                'executor_config["command"] is a program with its arguments that leads to "-m wove.worker.stdio"'
            ) from exc
        self._slots[index] = child
        self._selector.register(child.socket, selectors.EVENT_READ, (child, "socket"))
        child.watched = selectors.EVENT_READ
        for pipe in child.pipes:
            self._selector.register(pipe, selectors.EVENT_READ, (child, "output"))
        threading.Thread(
            target=self._wait_for, args=(child,), name=f"wove-wait-{child.process.pid}", daemon=True
        ).start()
        return child

    def _wait_for(self, child: Child) -> None:
        child.process.wait()
        child.exited.set()
        self._post(partial(self._bury, child))

    def _bury(self, child: Child) -> None:
        """A process has ended: what it still said counts; runs without an outcome are lost."""
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
        for source in (child.socket, *child.pipes):
            try:
                self._selector.unregister(source)
            except (KeyError, ValueError):
                pass  # it ended first
        child.release()

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
        child.send(encode_note(frames.SHUTDOWN))
        self._watch(child)
        child.kill_soon(STOP_SECONDS + 1)

    def _look_after_idle(self) -> None:
        if self._idle_seconds is None:
            return
        now = time.monotonic()
        for child in self._slots:
            if (
                child is not None
                and child.ready
                and not child.runs
                and now - child.idle_since > self._idle_seconds
            ):
                self._retire(child)

    def _end_all(self) -> None:
        children = [child for child in (*self._slots, *self._retiring) if child is not None]
        for child in children:
            try:
                child.socket.setblocking(True)
                child.socket.settimeout(0.5)
                child.send(encode_note(frames.SHUTDOWN))
                child.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # gone already
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            if not child.exited.wait(max(0.0, deadline - time.monotonic())):
                child.kill()
                child.exited.wait(STOP_SECONDS)
            for run_id, run in child.runs.items():
                run.lose(run_id, f"{self._name} was stopped")
            child.runs.clear()
            child.release()
        self._slots = [None] * len(self._slots)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()


class _Sent:
    """A run that a process has."""

    __slots__ = ("_logged", "attempt", "emit", "seq", "task_id")

    #: Characters of output that are passed on per run.
    MAX_OUTPUT = 16 * 1024 * 1024

    def __init__(self, task_id: str, attempt: int, emit: Emit) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.emit = emit
        self.seq = 0
        self._logged = 0

    def may_log(self, length: int) -> bool:
        self._logged += length
        return self._logged <= self.MAX_OUTPUT

    def lose(self, run_id: str, message: str) -> None:
        frame = lost_frame(run_id, self.task_id, message, attempt=self.attempt, seq=self.seq + 1)
        self.emit(frames.TASK_ERROR, pack_message(frame, []))
