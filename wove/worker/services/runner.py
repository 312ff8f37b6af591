"""Runs tasks in this process: callables in threads, coroutines on an event loop of their own.

No code of the user's runs where frames are carried: beats, cancellations and other runs' outcomes pass,
whatever a task does to its thread or to the tasks' loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import EncodeError, PayloadRejectedError, ProtocolError, lost, normalize_exception
from wove.exchange import VERSION
from wove.no_pickle import decode_plain, encode_plain
from wove.remote_errors import encode_exception
from wove.threads import DaemonPool, in_thread
from wove.wire import decode_callable, decode_value, encode_value, pack_message
from wove.worker.calls import load_call, report_failure
from wove.worker.context import Cancellable, RunContext, bind
from wove.worker.coroutines import supervise
from wove.worker.services.engine import DEFAULT_THREADS
from wove.worker.services.output import finish_lines

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

    from typing_extensions import Buffer

    from wove.exchange import Packet
    from wove.worker.allowed import AllowList
    from wove.worker.services.engine import Emit

logger = logging.getLogger("wove.worker")

#: Seconds between two beats of a run, at most.
BEAT_SECONDS = 5.0
#: Seconds after which a task that still runs is reported as started.
STARTED_SECONDS = 0.03
#: Threads that encode the outcomes of coroutines: a slow one does not hold up the others.
OUTCOME_THREADS = 8
#: Seconds that closing waits for cancelled tasks.
CLOSE_SECONDS = 1.0
_NOBODY = threading.Event()


class Runner:
    """An :class:`Engine` in this process.

    Args:
        threads: how many synchronous callables run at once; coroutines are not counted.
        allow: the functions that may be called, and then only with plain data.
        backend: shown in errors as what the worker is.
    """

    def __init__(
        self, *, threads: int = DEFAULT_THREADS, allow: AllowList | None = None, backend: str = "service"
    ) -> None:
        self.allow = allow
        self.worker = {"host": socket.gethostname(), "pid": os.getpid(), "backend": backend}
        self.tasks = _TaskLoop()
        self.outcomes = DaemonPool(OUTCOME_THREADS, "wove-outcome")
        self._pool = DaemonPool(threads, "wove-task")
        self._runs: dict[str, Run] = {}
        self._beater = _Beater(self._runs)

    def run(self, packet: Packet, emit: Emit) -> None:
        """Run a command; see :meth:`Engine.run`."""
        self.start(self.admit(packet, emit))

    def admit(self, packet: Packet, emit: Emit) -> Run:
        """Keep a command that somebody is to execute."""
        run = Run(self, packet, emit)
        self._runs[run.run_id] = run
        return run

    def start(self, run: Run) -> None:
        """Execute a run in a thread of the pool."""
        # A context of its own: what a task sets in context variables is not seen by the thread's next one.
        run.future = self._pool.submit(contextvars.Context().run, run.execute)

    @property
    def has_room(self) -> bool:
        """Whether one more callable may run at once."""
        return self._pool.has_room

    def occupy(self, until: threading.Event) -> None:
        """Count a callable that runs in a thread which is none of the pool's, until it has ended."""
        self._pool.submit(until.wait)

    def cancel(self, run_id: str) -> None:
        """Cancel a run; see :meth:`Engine.cancel`."""
        run = self._runs.get(run_id)
        if run is not None:
            run.cancel()

    def begun(self, run: Run) -> None:
        """Beat for a run from now on."""
        self._beater.watch(run)

    def ended(self, run: Run) -> None:
        """Forget a run."""
        self._runs.pop(run.run_id, None)

    async def close(self) -> None:
        """Cancel what runs; see :meth:`Engine.close`."""
        await in_thread(self.close_now)

    def close_now(self) -> None:
        """Cancel what runs and wait a moment for it. Blocks."""
        for run in list(self._runs.values()):
            run.cancel()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._runs and time.monotonic() < deadline:
            time.sleep(0.01)
        self._pool.close()
        self._beater.close()
        self.tasks.close()
        self.outcomes.close()


class Run(Cancellable):
    """One run, as :class:`wove.worker.calls.Execution`, and as the job it executes."""

    def __init__(self, runner: Runner, packet: Packet, emit: Emit) -> None:
        envelope = packet.envelope
        self.run_id = packet.run_id
        self.task_id = packet.task_id
        self._attempt = packet.attempt
        heartbeat = envelope.get("heartbeat")
        self.beat_every = BEAT_SECONDS
        if isinstance(heartbeat, (int, float)) and heartbeat > 0:
            self.beat_every = min(BEAT_SECONDS, heartbeat / 3)
        self.next_beat = 0.0
        super().__init__(RunContext(self.run_id, self.task_id, self._attempt, self._report))
        self.on_cancel = self._take_back
        #: How its callable is described, and what is set at its end where another thread reads on meanwhile.
        self.described = envelope.get("callable")
        self.relieved = _NOBODY
        self.worker: dict[str, Any] = runner.worker
        self.future: Future[Any] | None = None
        self._runner = runner
        self._packet: Packet | None = packet
        self._emit = emit
        self._lock = threading.Lock()
        self._seq = 0
        self._finished = False
        limit = envelope.get("max_body")
        self._max_body = limit if type(limit) is int else None

    @property
    def assignment(self) -> Run:
        """What is to be called: this."""
        return self

    # --- in a thread of the pool ----------------------------------------------

    def execute(self) -> None:
        """Run the task; a coroutine goes on in the tasks' loop."""
        # Said once the task has taken a moment; the outcome of a short one says as much.
        self._runner.begun(self)
        if self.context.cancelled:
            self.acknowledge_cancel()
            return
        call = load_call(self)
        if call is None:
            return
        try:
            with bind(self.context):
                result = call()
        except BaseException as exc:
            report_failure(self, exc)
            return
        if hasattr(result, "__await__"):
            self._runner.tasks.start(self._await(result))
        else:
            self.succeed(result)

    def load(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the callable and its arguments; see :class:`wove.worker.calls.Job`."""
        packet, self._packet = self._packet, None
        if packet is None:
            raise RuntimeError("loaded twice")
        envelope, attachments = packet.envelope, packet.attachments
        if envelope.get("v") != VERSION:
            raise PayloadRejectedError(
                f"the command is of version {envelope.get('v')!r} and this worker reads version {VERSION}: "
                "install the same release of Wove on both sides",
                reason="version",
            )
        described, arguments = envelope.get("callable"), envelope.get("args")
        if self._runner.allow is not None:
            func = self._runner.allow.find(described)
            arguments = decode_plain(arguments, attachments, "the arguments")
        else:
            func = decode_callable(described, attachments)
            arguments = decode_value(arguments, attachments)
        if not callable(func):
            raise TypeError(f"{described!r} is not callable here, but {type(func).__name__}")
        if type(arguments) is not list or len(arguments) != 2:
            raise ProtocolError("malformed command: args")
        return func, tuple(arguments[0]), dict(arguments[1])

    # --- in the tasks' loop ---------------------------------------------------

    async def _await(self, awaitable: Any) -> None:
        failure: BaseException | None = None
        result: Any = None
        try:
            with bind(self.context):
                result, failure = await supervise(_contained(awaitable), self)
        except BaseException as exc:
            failure = exc
        # Encoding runs the user's code, and takes its time: not here.
        if failure is None:
            self._runner.outcomes.submit(self.succeed, result)
        else:
            self._runner.outcomes.submit(report_failure, self, failure)

    # --- outcomes -------------------------------------------------------------

    def succeed(self, result: Any) -> None:
        """Deliver a result; one that cannot be encoded is delivered as an error naming its type."""
        attachments: list[Buffer] = []
        encode = encode_value if self._runner.allow is None else encode_plain
        try:
            described = encode(result, attachments)
            self._check_size(attachments)
        except Exception as exc:
            self.fail(exc, source="worker")
            return
        except BaseException as exc:
            self.fail(exc, source="worker")
            raise
        self._finish(frames.TASK_RESULT, attachments, result=described)

    def _check_size(self, attachments: list[Buffer]) -> None:
        size = sum(memoryview(part).nbytes for part in attachments)
        if self._max_body is not None and size > self._max_body:
            raise EncodeError(
                f"the result has {size} bytes, more than the caller takes: raise "
                'executor_config["max_message"], or return less'
            )

    def fail(self, exc: BaseException, *, source: str = "task") -> None:
        """Deliver an error."""
        error = normalize_exception(exc, source=source)
        attachments: list[Buffer] = []
        described: list[Any] = []
        if self._runner.allow is None:
            try:
                described = encode_exception(exc, attachments)
                self._check_size(attachments)
            except Exception:
                described, attachments = [], []
        self._finish(frames.TASK_ERROR, attachments, error=error, exception=described)

    def acknowledge_cancel(self) -> None:
        """Deliver that the task was cancelled."""
        self._finish(frames.TASK_CANCELLED, [])

    def lost(self, message: str) -> None:
        """Deliver that the delivery failed, and not the task."""
        self._finish(frames.TASK_ERROR, [], error=lost(message))

    def _take_back(self) -> None:
        """Have it not executed, if it still waits for a thread; a coroutine is stopped otherwise once it runs."""
        if self.future is not None and self.future.cancel():
            self.acknowledge_cancel()

    def beat(self) -> None:
        """Say that the task has started, then that it still runs."""
        self._send(frames.HEARTBEAT if self._seq else frames.TASK_STARTED)

    def _report(self, kind: str, **fields: Any) -> None:
        self._send(kind, **fields)

    def _finish(self, kind: str, attachments: list[Buffer], **fields: Any) -> None:
        self._runner.ended(self)
        with bind(self.context):
            finish_lines()
        self._send(kind, attachments, last=True, worker=self.worker, **fields)

    def _send(
        self, kind: str, attachments: list[Buffer] | None = None, *, last: bool = False, **fields: Any
    ) -> None:
        with self._lock:
            if self._finished:
                return
            self._finished = last
            if not self._seq and not last:
                self._emit_event(frames.TASK_STARTED, [], worker=self.worker)
            if kind != frames.TASK_STARTED:
                self._emit_event(kind, attachments or [], **fields)

    def _emit_event(self, kind: str, attachments: list[Buffer], **fields: Any) -> None:
        self._seq += 1
        frame = frames.event(kind, self.run_id, self.task_id, self._attempt, self._seq, **fields)
        self._emit(kind, pack_message(frame, attachments))


async def _contained(awaitable: Any) -> tuple[Any, BaseException | None]:
    """Await; what would end the loop of all tasks is returned, to be reported as this one's error."""
    try:
        return await awaitable, None
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as exc:
        return None, exc


class _TaskLoop:
    """The event loop of all coroutines, in a thread of its own that starts with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine there."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._run, args=(self._loop,), name="wove-task-loop", daemon=True
                ).start()
            loop = self._loop
        loop.call_soon_threadsafe(self._begin, loop, work)

    def _begin(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
        task = loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        while not self._closing:
            try:
                loop.run_forever()
            except BaseException:
                # A task that a user's coroutine has started may raise SystemExit: others go on.
                logger.exception("a task in the background ended the tasks' loop; it goes on")
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    def close(self) -> None:
        """End the loop."""
        with self._lock:
            self._closing = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)


class _Beater:
    """One thread that says, for every run, that its task still runs."""

    def __init__(self, runs: dict[str, Run]) -> None:
        self._runs = runs
        self._wake = threading.Condition()
        self._wake_at = float("inf")
        self._thread: threading.Thread | None = None
        #: Whether a run has begun since the last look.
        self._watched = False
        self._closed = False

    def watch(self, run: Run) -> None:
        """Beat for ``run`` until it is no longer among the runs."""
        with self._wake:
            run.next_beat = time.monotonic() + STARTED_SECONDS
            self._watched = True
            if run.next_beat >= self._wake_at:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="wove-beats", daemon=True)
                self._thread.start()
            self._wake_at = min(self._wake_at, run.next_beat)
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        while not self._closed:
            now = time.monotonic()
            for run in list(self._runs.values()):
                if 0 < run.next_beat <= now:
                    run.next_beat = now + run.beat_every
                    try:
                        run.beat()
                    except Exception:
                        logger.exception("a beat of run %s could not be sent", run.run_id)
            with self._wake:
                # Where a run has begun others follow: each would wake this thread if it waited for long.
                soon = now + (STARTED_SECONDS if self._watched else BEAT_SECONDS)
                self._watched = False
                due = [run.next_beat for run in list(self._runs.values()) if run.next_beat]
                self._wake_at = min([soon, *due])
                if not self._closed:
                    self._wake.wait(max(0.0, self._wake_at - time.monotonic()))
