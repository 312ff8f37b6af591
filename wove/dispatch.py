"""Drives one environment: its executor, its run table and its timers."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from wove import frames
from wove.alarm import Alarm
from wove.background import Background
from wove.commands import run_frame
from wove.delivery import RunTable
from wove.errors import (
    ConfigurationError,
    DeliveryOrphanedError,
    DeliveryTimeoutError,
    EnvironmentExecutionError,
    WoveError,
    safe_text,
)
from wove.reception import Reception
from wove.run_ids import new_run_id
from wove.run_settings import RunSettings
from wove.run_state import Outcome, Resubmission, RunState
from wove.shared_parts import SharedCallable
from wove.sharing import SharedCalls, sharing_key
from wove.submission import Submission
from wove.waiter import Call, Waiter
from wove.wire import callable_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from wove.executors.base import EnvironmentExecutor
    from wove.frames import Frame
    from wove.policy import DeliveryPolicy
    from wove.run_state import Run
    from wove.waiter import OnProgress

logger = logging.getLogger("wove.dispatch")

#: How long, in seconds, starting and stopping an executor may take.
START_SECONDS = 30.0
STOP_SECONDS = 3.0
#: How long, in seconds, stopping waits for the last messages to workers and the backend.
FAREWELL_SECONDS = 1.5
#: Longest name of a task, in characters.
MAX_TASK_ID = 1_000
#: Which dispatcher an executor serves, by its id: one executor cannot serve two.
_serving: WeakValueDictionary[int, Dispatcher] = WeakValueDictionary()


class Dispatcher:
    """One started environment.

    Args:
        name: the environment's name.
        executor: carries its frames.
        executor_config: handed to the executor.
        defaults: settings of the definition, then of the runtime (``delivery_*`` keys).
    """

    def __init__(
        self,
        name: str,
        executor: EnvironmentExecutor,
        executor_config: Mapping[str, Any],
        defaults: Sequence[Mapping[str, Any]],
    ) -> None:
        self.name = name
        self.executor = executor
        self._config = executor_config
        self.settings = RunSettings(defaults, executor.default_heartbeat_seconds)
        self._waiters: dict[str, Waiter] = {}
        self._shared = SharedCalls(name)
        self._slots: asyncio.Semaphore | None = None
        self._broken: BaseException | None = None
        self._stopping = False
        self._stop_task: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------

    async def start(self, run_config: Mapping[str, Any]) -> None:
        """Start the executor and the receiver.

        Raises:
            Exception: whatever the executor's ``start`` raises, after it was stopped again.
        """
        other = _serving.setdefault(id(self.executor), self)
        if other is not self:
            raise ConfigurationError(
                f"environment {self.name!r}: its executor instance serves environment {other.name!r} already; "
                "each environment needs an executor of its own"
            )
        self._loop = asyncio.get_running_loop()
        self.table = RunTable(self.name, self._loop.time)
        self._reception = Reception(self.executor, self._take, self._break)
        self._alarm = Alarm(self._loop, self.table.next_deadline, lambda: self._reception.taken, self._expire)
        self._background = Background(self._loop)
        in_flight = self.settings.policy.max_in_flight
        if in_flight is not None:
            self._slots = asyncio.Semaphore(in_flight)
        try:
            async with asyncio.timeout(START_SECONDS) as limit:
                await self.executor.start(
                    environment_name=self.name, environment_config=self._config, run_config=run_config
                )
        except BaseException as exc:
            await self._stop_executor()
            if isinstance(exc, TimeoutError) and limit.expired():
                raise DeliveryTimeoutError(
                    f"environment {self.name!r} did not start within {START_SECONDS:g} s"
                ) from None
            raise
        self._submission = Submission(
            self.name,
            self.executor,
            self.table,
            self._background,
            follow=self._follow,
            changed=self._alarm.set,
            heard=lambda: self._reception.taken,
        )
        self._reception.start(self._background, f"wove-receiver-{self.name}")

    async def stop(self) -> None:
        """End every open run by its orphan policy, then stop the executor. Idempotent."""
        await asyncio.shield(self.begin_stop())

    def begin_stop(self) -> asyncio.Task[None]:
        """Begin to stop and return the task that does; whoever waits for it may be cancelled."""
        if self._stop_task is None:
            self._stopping = True
            self._stop_task = asyncio.create_task(self._stop(), name=f"wove-stop-{self.name}")
        return self._stop_task

    async def _stop(self) -> None:
        for run in self.table.open_runs():
            self._orphan(run)
        # Also those of callers that were cancelled a moment ago, by Ctrl-C for one.
        if self._broken is None:
            await self._background.farewells(FAREWELL_SECONDS)
        self._alarm.stop()
        self._submission.stop()
        await self._background.end()
        await self._stop_executor()

    def _orphan(self, run: Run) -> None:
        """End a run by its policy."""
        policy = run.policy.orphan_policy
        waiter = self._waiters.get(run.run_id)
        if policy == "cancel":
            self.table.fail(run.run_id, asyncio.CancelledError())
            if waiter is not None:
                waiter.cancel(f"environment {self.name!r} was stopped")
        else:
            error = DeliveryOrphanedError(
                f"run {run.run_id} of {run.task_id}: environment {self.name!r} was stopped; {_FATES[policy]}"
            )
            frame = waiter.frame if waiter is not None else None
            started = run.state in (RunState.STARTED, RunState.LOST)
            outcome = self.table.fail(run.run_id, error)
            if outcome is not None:
                self._follow(outcome)
            if policy == "requeue" and started and frame is not None:
                self._submission.requeue(run, frame)
            elif run.policy.keeps_work and waiter is not None and waiter.sending is not None:
                self._background.await_farewell(waiter.sending)  # what is to stay queued has to get there
        if not run.policy.keeps_work:
            self._submission.cancel(run)

    async def _stop_executor(self) -> None:
        await self._within(STOP_SECONDS, self.executor.stop(), "stopping the executor")
        _serving.pop(id(self.executor), None)

    async def _within(self, seconds: float, work: Coroutine[Any, Any, None], what: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                await work
        except TimeoutError:
            logger.warning("environment %r: %s took longer than %g s; gave up", self.name, what, seconds)
        except Exception:
            logger.exception("environment %r: %s failed", self.name, what)

    # --- one call ----------------------------------------------------------

    def share(self, func: Callable[..., Any]) -> SharedCallable | None:
        """Return ``func`` as several calls may share it; None where the executor has no use for that."""
        return SharedCallable(func) if self.executor.takes_shared else None

    def call(
        self,
        func: Callable[..., Any],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        *,
        task_id: str | None = None,
        settings: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        shared: SharedCallable | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Run ``func`` in the environment; what is returned is to be awaited, and returns its result.

        Not a coroutine function itself: each one more in the chain is memory that a run in flight holds.

        Raises:
            Exception: what the function raised, with the remote traceback as its cause.
            EnvironmentExecutionError: it failed and its exception cannot be rebuilt here.
            WorkerLostError: its worker died.
            DeliveryTimeoutError: a delivery deadline passed.
            EncodeError: an argument cannot be sent; nothing was submitted.
        """
        policy = self.settings.policy_for(settings)
        if not callable(func):
            raise TypeError(f"run() takes a callable, not {type(func).__name__}")
        if task_id is not None and (not isinstance(task_id, str) or len(task_id) > MAX_TASK_ID):
            raise TypeError(
                f"a task's name is a string of at most {MAX_TASK_ID} characters; got {task_id!r:.100}"
            )
        if policy.idempotency_key is None:
            if self._slots is None:
                return self._call(func, positional, keywords, task_id, policy, on_progress, None, shared)
            return self._in_slot(func, positional, keywords, task_id, policy, on_progress, None, shared)
        self._check_usable()
        key = sharing_key(policy.idempotency_key, func, positional, keywords)
        return self._shared.call(
            key,
            func,
            lambda report: self._in_slot(func, positional, keywords, task_id, policy, report, key, shared),
            patience=policy.timeout,
            on_progress=on_progress,
        )

    async def _in_slot(self, *call: Any) -> Any:
        if self._slots is None:
            return await self._call(*call)
        async with self._slots:
            return await self._call(*call)

    async def _call(
        self,
        func: Callable[..., Any],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        task_id: str | None,
        policy: DeliveryPolicy,
        on_progress: OnProgress | None,
        key: str | None,
        shared: SharedCallable | None,
    ) -> Any:
        self._check_usable()
        if asyncio.get_running_loop() is not self._loop:
            raise WoveError(
                f"environment {self.name!r} was started in another event loop: start the runtime in the loop that uses it"
            )
        run, waiter = self._begin(
            func, positional, keywords, task_id, policy, on_progress, key, shared=shared
        )
        try:
            return await waiter.future
        except asyncio.CancelledError as exc:
            unsaid = await self._abandon(run)
            if unsaid:
                exc.add_note(unsaid)
            raise
        finally:
            self._waiters.pop(run.run_id, None)

    def begins(self, policy: DeliveryPolicy) -> bool:
        """Tell whether :meth:`begin` can be used for calls with those settings."""
        return (
            self._submission.posts
            and self._slots is None
            and policy.idempotency_key is None
            and policy.cancel_mode == "best_effort"
            and not policy.keeps_work
        )

    def begin(
        self,
        func: Callable[..., Any],
        item: Any,
        policy: DeliveryPolicy,
        on_progress: OnProgress | None,
        task_id: str,
        shared: SharedCallable | None,
    ) -> Call:
        """Begin one of many calls of ``func``: what :meth:`call` does, without a task of its own.

        Returns:
            What gets the result; cancelling it cancels the run.
        """
        run_id = new_run_id()
        call = Call(partial(self._call_cancelled, run_id))
        try:
            self._check_usable()
            self._begin(
                func,
                (item,),
                {},
                task_id,
                policy,
                on_progress,
                None,
                mapped=True,
                run_id=run_id,
                future=call,
                shared=shared,
            )
        except Exception as exc:
            if not call.done():
                call.set_exception(exc)
        return call

    def _call_cancelled(self, run_id: str) -> None:
        self._waiters.pop(run_id, None)
        self._follow(self.table.cancel(run_id))

    def _begin(
        self,
        func: Callable[..., Any],
        positional: Sequence[Any],
        keywords: Mapping[str, Any],
        task_id: str | None,
        policy: DeliveryPolicy,
        on_progress: OnProgress | None,
        key: str | None,
        *,
        mapped: bool = False,
        run_id: str | None = None,
        future: Call | None = None,
        shared: SharedCallable | None = None,
    ) -> tuple[Run, Waiter]:
        run = self.table.open(run_id or new_run_id(), task_id or callable_name(func), policy)
        frame = run_frame(
            run, func, positional, keywords, key, self.settings.delivery(policy, mapped=mapped), shared
        )
        waiter = Waiter(self._loop.create_future() if future is None else future, on_progress)
        if policy.sends_again:
            waiter.frame = frame
        self._waiters[run.run_id] = waiter
        self._alarm.set()
        self._submission.submit(run, frame, waiter)
        return run, waiter

    def _check_usable(self) -> None:
        if self._stopping:
            raise WoveError(f"environment {self.name!r} is stopped")
        if self._broken is not None:
            raise EnvironmentExecutionError(
                {
                    "kind": type(self._broken).__name__,
                    "message": f"environment {self.name!r} is out of order: {safe_text(self._broken)}",
                    "traceback": "",
                    "retryable": False,
                    "source": "executor",
                }
            ) from self._broken

    async def _abandon(self, run: Run) -> str:
        """The caller was cancelled: cancel the work, as the policy says.

        Returns:
            What is to be said of a cancellation that was not acknowledged; else nothing.
        """
        if run.run_id not in self.table:
            return ""
        waiter = self._waiters[run.run_id]
        outcome = self.table.cancel(run.run_id)
        if outcome is not None:
            self._follow(outcome)
            return ""
        waiter.renew(self._loop)
        self._alarm.set()
        self._stop_work(run, waiter)
        # A second cancellation of the caller ends the wait; the work stays cancelled.
        await asyncio.wait({waiter.future})
        return waiter.unacknowledged

    def _stop_work(self, run: Run, waiter: Waiter | None) -> None:
        if waiter is not None and waiter.sending is not None and not waiter.sending.done():
            waiter.sending.cancel()
        if not self._stopping:
            self._submission.cancel(run)

    # --- what comes back ---------------------------------------------------

    def _break(self, exc: BaseException) -> None:
        """Nothing comes back any more: end every run, and refuse new ones."""
        logger.error("environment %r: its executor stopped receiving", self.name, exc_info=exc)
        self._broken = exc
        for run in self.table.open_runs():
            try:
                self._check_usable()
            except WoveError as error:
                self._follow(self.table.fail(run.run_id, error))

    def _take(self, frame: Frame) -> None:
        taken, outcome, again = self.table.apply(frame)
        if outcome is not None or again is not None:
            self._follow(outcome or again)
        elif taken:
            if frame["type"] in (frames.PROGRESS, frames.LOG):
                waiter = self._waiters.get(frame["run_id"])
                if waiter is not None:
                    waiter.report(frame)
            self._alarm.set()

    def _follow(self, step: Outcome | Resubmission | None) -> None:
        """Do what the run table decided."""
        if isinstance(step, Outcome):
            self._settle(step)
        elif step is not None:
            self._submission.submit_again(step, self._waiters.get(step.run.run_id))

    def _settle(self, outcome: Outcome) -> None:
        run = outcome.run
        waiter = self._waiters.get(run.run_id)
        if outcome.cancel_work:
            self._stop_work(run, waiter)
        elif run.repeats and waiter is not None and waiter.sending is not None:
            waiter.sending.cancel()  # an earlier attempt, or submission, has done the work
        if outcome.kind == "timeout" and outcome.exception is None:
            text = (
                f"run {run.run_id} of {run.task_id} in environment {self.name!r} was cancelled, and its worker did not "
                f"acknowledge that within delivery_cancel_timeout={run.policy.cancel_timeout:g} s"
            )
            logger.warning("%s", text)
            if waiter is not None:
                waiter.unacknowledged = text
        if waiter is not None:
            waiter.settle(outcome)
            if type(waiter.future) is Call:
                del self._waiters[run.run_id]  # nobody else will

    def _expire(self) -> None:
        for step in self.table.expire():
            self._follow(step)


#: What becomes of the work, by orphan policy.
_FATES = {
    "fail": "its work was cancelled",
    "detach": "its work runs on, and its outcome is kept by the backend",
    "requeue": "its work is back on the queue",
}
