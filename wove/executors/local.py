"""Runs tasks in this process: coroutines on the loop, other callables in threads."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import ConfigurationError, normalize_exception
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.settings import check_keys
from wove.threads import DaemonPool
from wove.worker.context import RunContext, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from wove.frames import Frame

#: Threads for synchronous callables unless ``executor_config["threads"]`` says otherwise.
DEFAULT_THREADS = 40


class LocalEnvironmentExecutor(EnvironmentExecutor):
    """Runs tasks in the submitter's own process, without any dependency.

    ``executor_config``: ``threads`` (default 40), how many synchronous callables run at
    once. Cancelling an ``async`` callable cancels its task; a synchronous one sees
    ``wove.worker.current().cancelled``, or never starts when it was still queued.
    """

    def __init__(self) -> None:
        self._channel: FrameChannel | None = None
        self._pool: DaemonPool | None = None
        self._runs: dict[str, _LocalRun] = {}

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Make ready; see :meth:`EnvironmentExecutor.start`."""
        check_keys(environment_name, environment_config, ("threads",))
        threads = environment_config.get("threads", DEFAULT_THREADS)
        if type(threads) is not int or threads < 1:
            raise ConfigurationError(
                f'environment {environment_name!r}: executor_config["threads"] is a whole number from 1; '
                f"got {threads!r}"
            )
        self._channel = FrameChannel()
        self._pool = DaemonPool(threads, f"wove-local-{environment_name}")

    async def send(self, frame: Frame) -> None:
        """Take a command; see :meth:`EnvironmentExecutor.send`."""
        if self._channel is None or self._pool is None:
            raise RuntimeError("the local executor is not started")
        if frame["type"] == frames.RUN_TASK:
            run = _LocalRun(frame, self._channel, self._runs)
            self._runs[frame["run_id"]] = run
            run.begin(self._pool)
        elif frame["type"] == frames.CANCEL_TASK:
            local = self._runs.get(frame["run_id"])
            if local is not None:
                local.cancel()

    def post(self, frame: Frame, done: Callable[[BaseException | None], None]) -> bool:
        """Take a call; see :meth:`EnvironmentExecutor.post`."""
        if self._channel is None or self._pool is None:
            return False
        run = _LocalRun(frame, self._channel, self._runs)
        self._runs[frame["run_id"]] = run
        done(None)
        run.begin(self._pool)
        return True

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand events over; see :meth:`EnvironmentExecutor.attach`."""
        return self._channel is not None and self._channel.attach(take)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        if self._channel is None:
            raise RuntimeError("the local executor is not started")
        return await self._channel.get()

    async def stop(self) -> None:
        """Cancel what runs and release the threads; see :meth:`EnvironmentExecutor.stop`."""
        for run in list(self._runs.values()):
            run.cancel()
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        if self._pool is not None:
            self._pool.close()
        if self._channel is not None:
            self._channel.close()
        self._runs.clear()


class _LocalRun:
    """One task of this process and the events it reports."""

    def __init__(self, frame: Frame, channel: FrameChannel, registry: dict[str, _LocalRun]) -> None:
        self.run_id: str = frame["run_id"]
        self.task_id: str = frame["task_id"]
        self.task: asyncio.Task[Any] | None = None
        self._future: Future[Any] | None = None
        self._call = partial(frame["callable"], *frame.get("positional", ()), **frame["args"])
        self._is_async = _is_async(frame["callable"])
        self._channel = channel
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._seq = 0
        self._context = RunContext(self.run_id, self.task_id, 1, self._emit)

    def begin(self, pool: DaemonPool) -> None:
        if self._is_async:
            try:
                awaitable = self._call()
            except Exception as exc:  # arguments that do not fit
                self._fail(exc)
            else:
                self._start_task(awaitable)
        else:
            scope = contextvars.copy_context()
            self._future = pool.submit(scope.run, self._run_sync)
            self._future.add_done_callback(self._sync_done)

    def cancel(self) -> None:
        self._context.cancelled = True
        if self.task is not None:
            self.task.cancel()
        elif self._future is not None and self._future.cancel():
            self._finish(frames.TASK_CANCELLED)

    def _run_sync(self) -> Any:
        self._emit(frames.TASK_STARTED)
        with bind(self._context):
            return self._call()

    def _sync_done(self, future: Future[Any]) -> None:
        # Runs in the pool's thread, or in the loop's for a call that never started.
        if future.cancelled():
            return
        exc = future.exception()
        if exc is not None:
            self._fail(exc)
            return
        result = future.result()
        if inspect.isawaitable(result):
            # A plain function that returns a coroutine: a partial, a decorated one.
            self._loop.call_soon_threadsafe(self._start_task, result)
            return
        self._succeed(result)

    def _start_task(self, awaitable: Any) -> None:
        with bind(self._context):
            self.task = self._loop.create_task(self._run_async(awaitable))

    async def _run_async(self, awaitable: Any) -> None:
        self._emit(frames.TASK_STARTED)
        try:
            result = await awaitable
        except asyncio.CancelledError as exc:
            if self._context.cancelled:
                self._finish(frames.TASK_CANCELLED)
            else:
                self._fail(exc)
        except Exception as exc:
            self._fail(exc)
        except SystemExit as exc:
            self._fail(exc)  # reported; raised here it would end the application's loop
        except BaseException as exc:
            self._fail(exc)
            raise
        else:
            self._succeed(result)

    def _succeed(self, result: Any) -> None:
        self._finish(frames.TASK_RESULT, result=result)

    def _fail(self, exc: BaseException) -> None:
        self._finish(frames.TASK_ERROR, error=normalize_exception(exc), exception=exc)

    def _finish(self, kind: str, **fields: Any) -> None:
        self._registry.pop(self.run_id, None)
        self._emit(kind, **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        self._seq += 1
        self._channel.put([frames.event(kind, self.run_id, self.task_id, 1, self._seq, **fields)])


def _is_async(func: Any) -> bool:
    while isinstance(func, partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004 - asked for, not called
