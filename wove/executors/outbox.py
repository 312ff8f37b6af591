"""What leaves an environment for its backend: collected, drawn message by message, and what became of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.errors import SubmitError, lost
from wove.executors.batching import LINGER_SECONDS
from wove.executors.members import Members
from wove.executors.packing import Packer, Waiting
from wove.executors.sending import AT_ONCE, Sender, copy_of, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.executors.base import FrameChannel
    from wove.executors.batching import Batching
    from wove.executors.lane import Lane
    from wove.executors.packing import Done, KnownRun, Listener, Parcel, Terms
    from wove.executors.sending import Adapter, HandOver
    from wove.executors.watch import Watch
    from wove.frames import Frame

    #: The callable, its name, and what is said of the delivery: what the runs of a batch have in common.
    _Kind = tuple[int, str, int, int]

#: Runs that are looked at together at most.
MAX_TOGETHER = 1000

_STOPPED = "the environment was stopped"


class Outbox:
    """Submits the runs of one environment.

    Args:
        terms: what its payloads have in common.
        adapter: takes payloads.
        lane: where the adapter's methods are called.
        lease: where runs are opened before they are submitted.
        channel: takes events that arise here.
        watch: watches runs that were submitted.
        batching: decides which runs travel together.
    """

    def __init__(
        self,
        terms: Terms,
        adapter: Adapter,
        lane: Lane,
        lease: Listener,
        channel: FrameChannel,
        watch: Watch,
        batching: Batching,
    ) -> None:
        packer = Packer(terms, lease, batching.listener, sink=channel.put, on_suspect=watch.suspect)
        self._members = Members()
        self._sender = Sender(terms.environment, packer, adapter, lane, lease, self._members.register)
        self._lease = lease
        self._channel = channel
        self._watch = watch
        self._batching = batching
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Waiting] = []
        #: Runs that travel with others, by what they have to have in common for that, and since when they wait.
        self._held: dict[_Kind, deque[Waiting]] = {}
        self._held_since: dict[_Kind, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        #: Runs that were not handed over yet, to find those that are cancelled meanwhile.
        self._on_the_way: dict[str, Waiting] = {}
        self._recalled = False
        self._flushing: asyncio.Task[None] | None = None
        #: What was begun to be handed over last, and what of it was not waited for yet.
        self._last: HandOver | None = None
        self._begun: deque[HandOver] = deque()
        self._stopped = False
        #: Runs that were sent and have no outcome yet, with what the adapter knows them by.
        self._open: dict[str, Any] = {}
        #: Called, in the caller's loop, with a run that was cancelled while it was being submitted,
        #: and with what the adapter knows it by, or what refused it.
        self.on_late_cancel: Callable[[Frame, Any], None] = _nothing

    # --- in the caller's loop -------------------------------------------------------

    def post(self, frame: Frame, done: Done) -> None:
        """Submit a run; what is submitted in one turn of the loop, or while others are under way, leaves together."""
        waiting = Waiting(frame, done)
        run_id = frame["run_id"]
        self._on_the_way[run_id] = waiting
        self._open[run_id] = None
        if self._batching.takes(frame):
            # Each map has encoded the callable as it was at its own first run.
            kind = (id(frame["callable"]), frame["task_id"], id(frame["delivery"]), id(frame.get("shared")))
            held = self._held.get(kind)
            if held is None:
                held = self._held[kind] = deque()
                self._held_since[kind] = self._loop.time()
            held.append(waiting)
        else:
            self._waiting.append(waiting)
            self._begin_early()
        self._start_flushing()

    def _begin_early(self) -> None:
        """Begin to hand over where many are submitted in one turn of the loop: workers need not wait for its end."""
        idle = self._last is None or self._last.over
        if len(self._waiting) >= AT_ONCE and idle and self._sender.begins_early and not self._stopped:
            self._forget_recalled()
            self._begin(self._draw_alone(), [])

    def _start_flushing(self) -> None:
        if (self._flushing is None or self._flushing.done()) and not self._stopped:
            self._flushing = self._loop.create_task(self._flush(), name="wove-flush")

    async def submit(self, frame: Frame) -> None:
        """Submit a run, and wait until it was accepted.

        Raises:
            Exception: it was not.
        """
        accepted = self._loop.create_future()

        def done(exc: BaseException | None) -> None:
            if accepted.done():
                return
            if exc is None:
                accepted.set_result(None)
            else:
                accepted.set_exception(exc)

        self.post(frame, done)
        try:
            await accepted
        except asyncio.CancelledError:
            self.recall(frame["run_id"])
            raise

    def recall(self, run_id: str) -> bool:
        """A run that was not handed over yet is not wanted any more; tell whether it surely never starts."""
        waiting = self._on_the_way.get(run_id)
        if waiting is None:
            return False
        waiting.cancelled = True
        delivery = waiting.frame["delivery"]
        if waiting.drawn or delivery.get("attempt", 1) > 1 or delivery.get("repeated"):
            return False
        self._recalled = True
        del self._on_the_way[run_id]
        self._open.pop(run_id, None)
        return True

    def ended(self, run_id: str) -> None:
        """A run has its outcome."""
        self._open.pop(run_id, None)
        if self._members:
            self._let_go(run_id)

    def take(self, run_id: str) -> Any:
        """Forget a run and return what the adapter knows it by."""
        # Should its worker have given it back this moment, it is not submitted again.
        self._let_go(run_id)
        return self._open.pop(run_id, None)

    def set(self, run_id: str, submission: Any) -> None:
        """Remember what the adapter knows a run by."""
        self._open[run_id] = submission

    def unwanted(self, run_id: str, batch: str) -> bool:
        """A member of a batch is cancelled; tell whether no other of the batch is wanted either."""
        self._let_go(run_id)
        return not self._members.is_wanted(batch)

    def _let_go(self, run_id: str) -> None:
        if self._members.let_go(run_id) and self._held:  # a worker may be free for them
            self._start_flushing()

    def take_back(self, run_id: str, task_id: str) -> None:
        """A worker has given a run back that it had not begun: submit it again, alone."""
        called = self._members.called(run_id)
        self._let_go(run_id)
        if self._stopped:
            return
        if called is None:  # it was cancelled this moment, and never starts
            self._channel.put([frames.event(frames.TASK_CANCELLED, run_id, task_id, 1, 2**31)])
            return
        frame = {**called, "delivery": {**called["delivery"], "alone": True}}

        def done(exc: BaseException | None) -> None:
            if exc is None:
                return
            # Its first submission was accepted, so this is no refusal but a loss.
            error = lost(f"a worker gave it back, and it could not be submitted again: {exc}")
            self._channel.put(
                [frames.event(frames.TASK_ERROR, run_id, frame["task_id"], 1, 2**31, error=error)]
            )

        self.post(frame, done)

    def stop(self) -> None:
        """Submit nothing any more."""
        self._stopped = True
        if self._flushing is not None:
            self._flushing.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._sender.close()
        for under_way in self._begun:
            under_way.abandoned = True
        self._open.clear()
        self._members.clear()

    # --- handing over ---------------------------------------------------------------

    async def _flush(self) -> None:
        while not self._stopped:
            under_way = self._begun.popleft() if self._begun else self._begin_next()
            if under_way is None:
                return
            try:
                parcels = await self._sender.finish(under_way)
            except Exception as exc:
                parcels = [refused(waiting, copy_of(exc)) for waiting in under_way.everybody]
            except BaseException:
                given_up = [under_way, *self._begun]
                self._begun.clear()
                for abandoned in given_up:
                    abandoned.abandoned = True
                    for waiting in abandoned.everybody:
                        self._settle(refused(waiting, SubmitError(_STOPPED)))
                raise
            for parcel in parcels:
                self._settle(parcel)
            if self._last is under_way:
                self._last = None  # nor are its arguments held any longer

    def _begin_next(self) -> HandOver | None:
        self._forget_recalled()
        alone = self._draw_alone()
        together = self._draw()
        if not alone and not together:
            return None
        self._begin(alone, together)
        return self._begun.popleft()

    def _draw_alone(self) -> list[Waiting]:
        drawn, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
        return drawn

    def _begin(self, alone: list[Waiting], together: list[list[Waiting]]) -> None:
        self._last = self._sender.begin(alone, together)
        self._begun.append(self._last)

    def _forget_recalled(self) -> None:
        """Drop the runs that were cancelled while they waited here."""
        if not self._recalled:
            return
        self._recalled = False
        self._waiting = [waiting for waiting in self._waiting if waiting.frame["run_id"] in self._on_the_way]
        for kind, held in tuple(self._held.items()):
            self._held[kind] = deque(w for w in held if w.frame["run_id"] in self._on_the_way)
            if not self._held[kind]:
                del self._held[kind], self._held_since[kind]

    def _draw(self) -> list[list[Waiting]]:
        """Take those of the held runs that are to leave now, message by message."""
        messages: list[list[Waiting]] = []
        now = self._loop.time()
        for kind, held in tuple(self._held.items()):
            waited = now - self._held_since[kind]
            plan = self._batching.plan(
                kind[1],
                len(held),
                len(self._members.batches_of(kind[1])),
                len(self._open),
                waited,
                partial(self._count_unstarted, kind[1]),
            )
            messages.extend([held.popleft() for _ in range(length)] for length in plan)
            if not held:
                del self._held[kind], self._held_since[kind]
            elif plan:
                self._held_since[kind] = now
        if self._held and (self._timer is None or self._timer.when() <= now):
            # Whatever was expected: nothing waits for long.
            self._timer = self._loop.call_later(LINGER_SECONDS, self._start_flushing)
        return messages

    def _count_unstarted(self, task_id: str) -> int:
        # Those of other callables do not count: a map that keeps the fleet busy would hold up all others.
        known = (self._lease.find(batch) for batch in self._members.batches_of(task_id))
        return sum(1 for run in known if run is not None and not run.started)

    # --- what became of it -------------------------------------------------------------

    def _settle(self, parcel: Parcel) -> None:
        for waiting in parcel.members:
            self._on_the_way.pop(waiting.frame["run_id"], None)
        if parcel.together:
            self._settle_batch(parcel)
        else:
            self._settle_run(parcel.members[0], parcel.result)

    def _settle_batch(self, parcel: Parcel) -> None:
        result, batch = parcel.result, parcel.frame["run_id"]
        known = self._lease.find(batch)
        failed = isinstance(result, BaseException)
        if failed and known is not None and isinstance(result, SubmitError) and known.started:
            failed, result = False, result.submission  # only the answer was lost
        if failed:
            for waiting in parcel.members:
                self._settle_run(waiting, copy_of(result))
            if known is not None and not parcel.frame["delivery"].get("again"):
                self._lease.close_run(batch)
            return
        if known is not None:
            self._opened(known, result)
        for waiting in parcel.members:
            # What the adapter knows the batch by is none of theirs: who cancels one must not revoke the others.
            if waiting.cancelled:
                self.on_late_cancel(waiting.frame, None)
            else:
                waiting.done(None)

    def _settle_run(self, waiting: Waiting, result: Any) -> None:
        run_id = waiting.frame["run_id"]
        known = self._lease.find(run_id)
        failed = isinstance(result, BaseException)
        if failed and known is not None and _has_it(known, waiting.frame, result):
            # Only the backend's answer was lost: a worker has it.
            failed, result = False, result.submission
        # A run that is submitted again keeps its place, and what is said of this attempt is known.
        again = waiting.frame["delivery"].get("again") and isinstance(result, SubmitError)
        if again and result.maybe_accepted and self._lease.batch_of(run_id) is not None:
            # A copy of a run that the batch may hold as well would be taken for another execution of that: a new
            # attempt leaves the batch, whose worker, if there is one, hears of it.
            result = SubmitError(str(result))
        if failed and self._members:
            self._let_go(run_id)
        if failed and not again:
            self._lease.close_run(run_id)
        if waiting.cancelled:
            self.on_late_cancel(waiting.frame, result)
        elif failed:
            if again and result.maybe_accepted and known is not None:
                self._doubt(known, result.submission)
            else:
                self._open.pop(run_id, None)
            waiting.done(result)
        else:
            if run_id in self._open:  # its outcome may have been faster
                self._open[run_id] = result
            if known is not None:
                self._opened(known, result)
            waiting.done(None)

    def _opened(self, known: KnownRun, result: Any) -> None:
        known.job = result if isinstance(result, str) else known.job
        known.opened_at = time.monotonic()
        known.doubtful = False
        self._watch.opened(known)

    def _doubt(self, run: KnownRun, submission: Any) -> None:
        """The backend may have a run; it will be submitted once more, unless a worker speaks of it before."""
        run.doubtful = True
        if run.run_id in self._open:
            self._open[run.run_id] = submission
        if isinstance(submission, str):
            run.job = submission
        self._watch.opened(run)


def _nothing(frame: Frame, result: Any) -> None:
    pass


def _has_it(run: KnownRun, frame: Frame, refusal: Any) -> bool:
    """Tell whether a worker has spoken of that attempt although the backend seems to have refused it."""
    attempt = frame["delivery"].get("attempt", 1)
    return isinstance(refusal, SubmitError) and run.attempt == attempt and run.started
