"""Hands an environment's runs to its executor, again where the run table says so, and takes them back."""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING

from wove.background import asked_to_stop
from wove.commands import again_frame, cancel_frame, orphan_frame
from wove.errors import SubmitError
from wove.executors.base import is_whole
from wove.run_errors import WHY_SILENT
from wove.run_state import RunState

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.background import Background
    from wove.delivery import RunTable
    from wove.executors.base import EnvironmentExecutor
    from wove.frames import Frame
    from wove.run_state import Outcome, Resubmission, Run
    from wove.waiter import Waiter

logger = logging.getLogger("wove.dispatch")

#: Seconds after the first submission without any answer in which a warning says what to look at.
SILENCE_SECONDS = 30.0
#: Seconds before a run is submitted again: grows with each attempt up to the second.
AGAIN_AFTER = 0.1
AGAIN_AT_MOST = 10.0


class Submission:
    """Everything that goes out to an executor.

    Args:
        name: the environment's name.
        executor: takes the frames; it has been started.
        table: decides what a refusal means.
        background: where what has to be waited for is done.
        follow: does what the table decided.
        changed: called when deadlines may have changed.
        heard: returns how many events have come back.

    Attributes:
        posts: whether the executor takes runs without a task for each.
    """

    def __init__(
        self,
        name: str,
        executor: EnvironmentExecutor,
        table: RunTable,
        background: Background,
        follow: Callable[[Outcome | Resubmission | None], None],
        changed: Callable[[], None],
        heard: Callable[[], int],
    ) -> None:
        self._name = name
        self._executor = executor
        self._table = table
        self._background = background
        self._follow = follow
        self._changed = changed
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._silence: asyncio.TimerHandle | None = None
        self.posts = executor.post is not None and is_whole(executor, "post", "send")

    def stop(self) -> None:
        """Warn of nothing any more."""
        if self._silence is not None:
            self._silence.cancel()

    def submit(self, run: Run, frame: Frame, waiter: Waiter) -> None:
        """Submit a run."""
        if not self._post(run, frame):
            # A task of its own: deadlines hold while `send` hangs.
            waiter.sending = self._background.spawn(self._send(run, frame), "wove-submit")

    def _post(self, run: Run, frame: Frame) -> bool:
        """Submit a run without a task, where its executor can; what is to outlive this process is waited for."""
        post = self._executor.post
        if not self.posts or post is None or run.policy.keeps_work:
            return False
        done = partial(self._accepted, run, run.attempt)
        try:
            return post(frame, done) is not False
        except Exception as exc:
            done(exc)
            return True

    async def _send(self, run: Run, frame: Frame) -> None:
        attempt = frame["delivery"]["attempt"]
        try:
            await self._executor.send(frame)
        except asyncio.CancelledError as exc:
            if asked_to_stop():
                raise
            error = SubmitError(f"the executor of environment {self._name!r} cancelled its own send()")
            error.__cause__ = exc
            self._follow(self._table.refuse(run.run_id, error, attempt, final=True))
        except Exception as exc:
            self._accepted(run, attempt, exc)
        else:
            self._accepted(run, attempt, None)

    def _accepted(self, run: Run, attempt: int, refusal: BaseException | None) -> None:
        """The executor has taken that attempt of a run, or refused it."""
        if refusal is None:
            self._table.submitted(run.run_id, attempt)
            if self._silence is None:
                self._silence = self._loop.call_later(SILENCE_SECONDS, self._warn_of_silence)
            return
        final = not isinstance(refusal, SubmitError)
        doubtful = self._executor.recognises_repeats and getattr(refusal, "maybe_accepted", False)
        self._follow(self._table.refuse(run.run_id, refusal, attempt, final=final, doubtful=doubtful))

    def _warn_of_silence(self) -> None:
        """Say once, where nothing has ever come back, what that may mean."""
        waiting = [run for run in self._table.open_runs() if run.state is RunState.SUBMITTED]
        if waiting and not self._heard():
            logger.warning(
                "environment %r: no worker has spoken of any run yet, %d wait, the first for %.0f s: %s",
                self._name, len(waiting), self._loop.time() - waiting[0].opened_at, WHY_SILENT,
            )  # fmt: skip

    # --- once more --------------------------------------------------------------

    def submit_again(self, again: Resubmission, waiter: Waiter | None) -> None:
        """Submit a run that was lost, or may not have been accepted, after a moment."""
        run = again.run
        if waiter is None or waiter.frame is None:
            return  # its caller is gone
        logger.warning(
            "environment %r: attempt %d of run %s (%s) %s and is submitted again: %s",
            self._name, run.attempt, run.run_id, run.task_id,
            "may not have been accepted" if run.doubtful else "was lost", again.reason,
        )  # fmt: skip
        spread = random.uniform(0.5, 1.0)  # noqa: S311 - so that many do not come at once; no secret
        pause = min(AGAIN_AT_MOST, AGAIN_AFTER * 2 ** (run.repeats + 1)) * spread
        waiter.sending = self._background.spawn(self._send_again(run, waiter.frame, pause), "wove-resubmit")
        self._changed()

    async def _send_again(self, run: Run, frame: Frame, pause: float) -> None:
        await asyncio.sleep(pause)
        if self._table.resubmit(run.run_id) is None:
            return
        self._changed()
        await self._send(run, again_frame(frame, run))

    # --- taken back -------------------------------------------------------------

    def cancel(self, run: Run) -> None:
        """Cancel a run's work; stopping waits for that to be said."""
        self._background.say_farewell(self._cancel(run), "wove-cancel")

    async def _cancel(self, run: Run) -> None:
        try:
            await self._executor.send(cancel_frame(run))
        except Exception:
            logger.warning("environment %r: cancelling run %s failed", self._name, run.run_id, exc_info=True)

    def requeue(self, run: Run, frame: Frame) -> None:
        """Put started work back on the queue; nobody waits for it."""
        self._background.say_farewell(self._requeue(run, frame), "wove-requeue")

    async def _requeue(self, run: Run, frame: Frame) -> None:
        await self._cancel(run)
        try:
            await self._executor.send(orphan_frame(frame, run))
        except Exception:
            logger.warning("environment %r: requeueing run %s failed", self._name, run.run_id, exc_info=True)
