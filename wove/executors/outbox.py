"""What leaves an environment for its backend: collected, encoded, signed, opened at the listener, handed over together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from wove import frames
from wove.errors import SubmitError, lost
from wove.executors.batching import LINGER_SECONDS
from wove.executors.packing import NOT_SENT, Packer, Parcel, Waiting
from wove.threads import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wove.executors.base import FrameChannel
    from wove.executors.batching import Batching
    from wove.executors.lane import Lane
    from wove.executors.packing import Done, KnownRun, Listener, Terms
    from wove.executors.watch import Watch
    from wove.frames import Frame

    #: The callable, its name, and what is said of the delivery: what the runs of a batch have in common.
    _Kind = tuple[int, str, int, int]

logger = logging.getLogger("wove.executors")

#: Seconds that handing over what leaves together may take.
SUBMIT_SECONDS = 30.0
#: Runs that are looked at together at most.
MAX_TOGETHER = 1000
#: Threads for encoding and handing over: one that hangs does not stop the others.
SENDERS = 4

_STOPPED = "the environment was stopped"


class Adapter(Protocol):
    """What takes payloads; see :class:`wove.adapters.base.BackendAdapter`."""

    @property
    def submits_blocking(self) -> bool:
        """Whether its client blocks anyway."""

    async def submit_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Hand payloads over."""

    def submit_blocking(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Hand payloads over, in a thread that may block."""


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
        self._packer = Packer(terms, lease, batching.listener, sink=channel.put, on_suspect=watch.suspect)
        self._adapter = adapter
        self._lane = lane
        self._lease = lease
        self._channel = channel
        self._watch = watch
        self._batching = batching
        self._loop = asyncio.get_running_loop()
        self._senders = DaemonPool(SENDERS, f"wove-submit-{terms.environment}")
        self._waiting: list[Waiting] = []
        #: Runs that travel with others, by what they have to have in common for that, and since when they wait.
        self._held: dict[_Kind, deque[Waiting]] = {}
        self._held_since: dict[_Kind, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        #: Runs that were not handed over yet, to find those that are cancelled meanwhile.
        self._on_the_way: dict[str, Waiting] = {}
        self._recalled = False
        self._flushing: asyncio.Task[None] | None = None
        self._stopped = False
        #: Runs that were sent and have no outcome yet, with what the adapter knows them by.
        self._open: dict[str, Any] = {}
        #: Those of them that travel in a batch: how they were called, and in which.
        self._members: dict[str, tuple[Frame, str]] = {}
        #: By batch, how many of its members are wanted; by task, which batches those are.
        self._wanted: dict[str, int] = {}
        self._messages: dict[str, set[str]] = {}
        self._counting = threading.Lock()
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
        self._start_flushing()

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
        return batch not in self._wanted

    def _let_go(self, run_id: str) -> None:
        member = self._members.pop(run_id, None)
        if member is None:
            return
        frame, batch = member
        left = self._wanted.get(batch, 1) - 1
        if left:
            self._wanted[batch] = left
            return
        self._wanted.pop(batch, None)
        with self._counting:
            batches = self._messages.get(frame["task_id"], set())
            batches.discard(batch)
            if not batches:
                self._messages.pop(frame["task_id"], None)
        if self._held:  # a worker may be free for them
            self._start_flushing()

    def take_back(self, run_id: str, task_id: str) -> None:
        """A worker has given a run back that it had not begun: submit it again, alone."""
        member = self._members.get(run_id)
        self._let_go(run_id)
        if self._stopped:
            return
        if member is None:  # it was cancelled this moment, and never starts
            self._channel.put([frames.event(frames.TASK_CANCELLED, run_id, task_id, 1, 2**31)])
            return
        frame = {**member[0], "delivery": {**member[0]["delivery"], "alone": True}}

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
        self._senders.close()
        self._open.clear()
        self._members.clear()
        self._wanted.clear()
        self._messages.clear()

    # --- handing over ---------------------------------------------------------------

    async def _flush(self) -> None:
        while not self._stopped:
            self._forget_recalled()
            alone, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
            together = self._draw()
            if not alone and not together:
                return
            everybody = [*alone, *chain.from_iterable(together)]
            for waiting in everybody:
                waiting.drawn = True
            try:
                parcels = await self._hand_over(alone, together)
            except Exception as exc:
                parcels = [_refused(waiting, _copy(exc)) for waiting in everybody]
            except BaseException:
                for waiting in everybody:
                    self._settle(_refused(waiting, SubmitError(_STOPPED)))
                raise
            for parcel in parcels:
                self._settle(parcel)

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
                len(self._messages.get(kind[1], ())),
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
        known = (self._lease.find(batch) for batch in tuple(self._messages.get(task_id, ())))
        return sum(1 for run in known if run is not None and not run.started)

    async def _hand_over(self, alone: list[Waiting], together: list[list[Waiting]]) -> list[Parcel]:
        """Encode, sign and submit, in other threads: a large argument, or a slow broker, holds up no loop."""
        abandoned = _Abandoned()
        try:
            async with asyncio.timeout(SUBMIT_SECONDS) as limit:
                sending = self._senders.submit(self._send, alone, together, abandoned)
                parcels: list[Parcel] = await asyncio.wrap_future(sending)
                if not self._adapter.submits_blocking:
                    ready = _ready(parcels)
                    if ready:
                        _note(
                            ready,
                            await self._lane.call(
                                partial(self._adapter.submit_many, self._described(ready)),
                                SUBMIT_SECONDS,
                                "submit",
                            ),
                        )
                return parcels
        except TimeoutError:
            if not limit.expired():
                raise
            raise SubmitError(
                f"the adapter's submit() took longer than {SUBMIT_SECONDS:g} s", maybe_accepted=True
            ) from None
        finally:
            abandoned.yes = True

    def _send(
        self, alone: list[Waiting], together: list[list[Waiting]], abandoned: _Abandoned
    ) -> list[Parcel]:
        """Encode and sign what leaves together; hand it over where the adapter's client blocks anyway."""
        packed = deque(self._packer.alone(waiting) for waiting in alone)
        for message in together:
            packed.extend(self._packer.message(message))
        parcels: list[Parcel] = []
        while packed:
            parcel = packed.popleft()
            if parcel.together and any(waiting.cancelled for waiting in parcel.members):
                # Encoding takes its time, and who is cancelled meanwhile does not leave with the others.
                packed.extendleft(reversed(self._packer.message(parcel.members)))
                continue
            parcels.append(parcel)
            if parcel.result is None and not abandoned.yes:
                try:
                    self._register(parcel)
                    self._packer.open(parcel)
                except Exception as exc:
                    parcel.result = exc if isinstance(exc, SubmitError) else _copy(exc)
                self._tell_of_cancelled(parcel)
        ready = _ready(parcels)
        if self._adapter.submits_blocking and ready and not abandoned.yes:
            try:
                results: Sequence[Any] = self._adapter.submit_blocking(self._described(ready))
            except Exception as exc:
                results = [_copy(exc) for _ in ready]
            except BaseException as exc:
                # SystemExit would end this thread.
                error = SubmitError(f"the adapter's submit_blocking() raised {type(exc).__name__}: {exc}")
                results = [_copy(error) for _ in ready]
            _note(ready, results)
        return parcels

    def _tell_of_cancelled(self, parcel: Parcel) -> None:
        """Let a batch's worker hear of members that were cancelled as it was opened, too early to be found there."""
        if parcel.together:
            for waiting in parcel.members:
                if waiting.cancelled:
                    self._lease.cancel_run(waiting.frame["run_id"])

    def _register(self, parcel: Parcel) -> None:
        """Note who travels in a batch: it may be given back before the broker has answered us."""
        if not parcel.together:
            return
        batch = parcel.frame["run_id"]
        self._wanted[batch] = len(parcel.members)
        with self._counting:
            self._messages.setdefault(parcel.frame["task_id"], set()).add(batch)
        self._members.update({waiting.frame["run_id"]: (waiting.frame, batch) for waiting in parcel.members})

    def _described(self, parcels: list[Parcel]) -> list[tuple[bytes, Frame]]:
        return [
            (p.built.blob, self._packer.described(p.frame, p.built)) for p in parcels if p.built is not None
        ]

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
        refused = isinstance(result, BaseException)
        if refused and known is not None and isinstance(result, SubmitError) and known.started:
            refused, result = False, result.submission  # only the answer was lost
        if refused:
            for waiting in parcel.members:
                self._settle_run(waiting, _copy(result))
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
        refused = isinstance(result, BaseException)
        if refused and known is not None and _has_it(known, waiting.frame, result):
            # Only the backend's answer was lost: a worker has it.
            refused, result = False, result.submission
        # A run that is submitted again keeps its place, and what is said of this attempt is known.
        again = waiting.frame["delivery"].get("again") and isinstance(result, SubmitError)
        if again and result.maybe_accepted and self._lease.batch_of(run_id) is not None:
            # A copy of a run that the batch may hold as well would be taken for another execution of that: a new
            # attempt leaves the batch, whose worker, if there is one, hears of it.
            result = SubmitError(str(result))
        if refused and self._members:
            self._let_go(run_id)
        if refused and not again:
            self._lease.close_run(run_id)
        if waiting.cancelled:
            self.on_late_cancel(waiting.frame, result)
        elif refused:
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


class _Abandoned:
    """Tells the sending thread that nobody waits for it any more."""

    yes = False


def _nothing(frame: Frame, result: Any) -> None:
    pass


def _refused(waiting: Waiting, result: BaseException) -> Parcel:
    parcel = Parcel([waiting], waiting.frame, together=False)
    parcel.result = result
    return parcel


def _ready(parcels: list[Parcel]) -> list[Parcel]:
    """Return what is to be handed over, without the runs that were cancelled while they were encoded.

    By now they are open at the listener, where whoever is cancelled from here on is found: its worker hears of it.
    """
    for parcel in parcels:
        if parcel.result is None and not parcel.together and parcel.members[0].cancelled:
            parcel.result = SubmitError(NOT_SENT)
    return [parcel for parcel in parcels if parcel.result is None and parcel.built is not None]


def _note(parcels: list[Parcel], results: Sequence[Any]) -> None:
    for parcel, result in zip(parcels, results, strict=True):
        parcel.result = result


def _has_it(run: KnownRun, frame: Frame, refusal: Any) -> bool:
    """Tell whether a worker has spoken of that attempt although the backend seems to have refused it."""
    attempt = frame["delivery"].get("attempt", 1)
    return isinstance(refusal, SubmitError) and run.attempt == attempt and run.started


def _copy(exc: BaseException) -> Exception:
    """Return an exception for one of several runs: each gets its own notes and traceback."""
    if isinstance(exc, SubmitError):
        copy = SubmitError(str(exc), maybe_accepted=exc.maybe_accepted, submission=exc.submission)
    else:
        copy = SubmitError(f"submitting failed: {type(exc).__name__}: {exc}")
    copy.__cause__ = exc.__cause__ if isinstance(exc, SubmitError) else exc
    return copy
