"""The threads in which runs are encoded, signed, opened at the listener and handed over to the backend."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from wove.errors import SubmitError
from wove.executors.packing import NOT_SENT, Packer, Parcel, Waiting
from wove.threads import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from wove.executors.lane import Lane
    from wove.executors.packing import Listener
    from wove.frames import Frame

#: Seconds that handing over what leaves together may take.
SUBMIT_SECONDS = 30.0
#: Runs that are encoded before the first of them are handed over: workers do not wait for the last one's arguments.
AT_ONCE = 32
#: Seconds after which a backend that refuses all that it is handed counts as out for what is to leave with it: trying
#: the rest would take as long again. One that refuses sooner is tried once more.
OUTAGE_AFTER = 3.0
#: Threads for encoding and handing over: one that hangs does not stop the others.
SENDERS = 4


class Adapter(Protocol):
    """What takes payloads; see :class:`wove.adapters.base.BackendAdapter`."""

    @property
    def submits_blocking(self) -> bool:
        """Whether its client blocks anyway."""

    async def submit_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Hand payloads over."""

    def submit_blocking(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Hand payloads over, in a thread that may block."""


class HandOver:
    """Runs that are being handed over.

    Attributes:
        alone: those that travel alone.
        together: those that travel with others, message by message.
        abandoned: nobody waits for it any more.
        packed: what became of them, in the end.
    """

    __slots__ = ("abandoned", "alone", "packed", "together")

    packed: Future[list[Parcel]]

    def __init__(self, alone: list[Waiting], together: list[list[Waiting]]) -> None:
        self.alone = alone
        self.together = together
        self.abandoned = False

    @property
    def everybody(self) -> Iterator[Waiting]:
        """All of them."""
        return chain(self.alone, *self.together)

    @property
    def over(self) -> bool:
        """Whether the sending thread is done with it."""
        return self.packed.done()


class Sender:
    """Hands runs over, in other threads: a large argument, or a slow broker, holds up no loop.

    Args:
        name: of the environment, for its threads.
        packer: makes payloads of them.
        adapter: takes payloads.
        lane: where the adapter's methods are called that do not block.
        lease: where runs are opened before they are submitted.
        register: told of each batch before anybody may have it.
    """

    def __init__(
        self,
        name: str,
        packer: Packer,
        adapter: Adapter,
        lane: Lane,
        lease: Listener,
        register: Callable[[Parcel], None],
    ) -> None:
        self._packer = packer
        self._adapter = adapter
        self._lane = lane
        self._lease = lease
        self._register = register
        self._threads = DaemonPool(SENDERS, f"wove-submit-{name}")

    def close(self) -> None:
        """Begin nothing any more."""
        self._threads.close()

    @property
    def begins_early(self) -> bool:
        """Whether all of it happens in the threads, without a turn of any loop."""
        return self._adapter.submits_blocking

    # --- in the caller's loop ---------------------------------------------------------

    def begin(self, alone: list[Waiting], together: list[list[Waiting]]) -> HandOver:
        """Begin to hand runs over."""
        under_way = HandOver(alone, together)
        for waiting in under_way.everybody:
            waiting.drawn = True
        try:
            under_way.packed = self._threads.submit(self._send, under_way)
        except RuntimeError as exc:  # the system has no thread left
            under_way.packed = Future()
            under_way.packed.set_exception(SubmitError(f"nothing can be submitted: {exc}"))
        return under_way

    async def finish(self, under_way: HandOver) -> list[Parcel]:
        """Wait until runs are handed over; what became of them stands in the parcels.

        Raises:
            SubmitError: it took too long.
        """
        try:
            async with asyncio.timeout(SUBMIT_SECONDS) as limit:
                parcels = await asyncio.wrap_future(under_way.packed)
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
            under_way.abandoned = True

    # --- in a thread ------------------------------------------------------------------

    def _send(self, under_way: HandOver) -> list[Parcel]:
        """Encode and sign what leaves together; hand it over where the adapter's client blocks anyway."""
        parcels: list[Parcel] = []
        ready: list[Parcel] = []
        runs, at_once = 0, float(AT_ONCE)
        outage: SubmitError | None = None
        for parcel in self._packed(under_way):
            parcels.append(parcel)
            if parcel.result is None and outage is not None:
                parcel.result = SubmitError(str(outage), maybe_accepted=True)
                parcel.result.__cause__ = outage.__cause__
            if parcel.result is not None or under_way.abandoned:
                continue
            self._open(parcel)
            if not self._adapter.submits_blocking:
                continue
            ready.append(parcel)
            runs += len(parcel.members)
            if runs >= at_once:
                begun = time.monotonic()
                refusal = self._submit(ready, under_way)
                ready, runs = [], 0
                if refusal is not None:
                    # All that is left in one go: it may be refused for other reasons, or not at all.
                    at_once = math.inf
                    outage = refusal if time.monotonic() - begun > OUTAGE_AFTER else None
        self._submit(ready, under_way)
        return parcels

    def _packed(self, under_way: HandOver) -> Iterator[Parcel]:
        for waiting in under_way.alone:
            yield self._packer.alone(waiting)
        for message in under_way.together:
            packed = deque(self._packer.message(message))
            while packed:
                parcel = packed.popleft()
                if parcel.together and any(waiting.cancelled for waiting in parcel.members):
                    # Encoding takes its time, and who is cancelled meanwhile does not leave with the others.
                    packed.extendleft(reversed(self._packer.message(parcel.members)))
                else:
                    yield parcel

    def _open(self, parcel: Parcel) -> None:
        """Take its workers' word from now on."""
        try:
            if parcel.together:
                self._register(parcel)
            self._packer.open(parcel)
        except Exception as exc:
            parcel.result = exc if isinstance(exc, SubmitError) else copy_of(exc)
        if parcel.together:
            # Those that were cancelled as it was opened, too early to be found there: its worker is to hear of them.
            for waiting in parcel.members:
                if waiting.cancelled:
                    self._lease.cancel_run(waiting.frame["run_id"])

    def _submit(self, parcels: list[Parcel], under_way: HandOver) -> SubmitError | None:
        """Hand payloads over; return what refused the last of them, if each of them was."""
        ready = _ready(parcels)
        if not ready or under_way.abandoned:
            return None
        try:
            results: Sequence[Any] = self._adapter.submit_blocking(self._described(ready))
        except Exception as exc:
            results = [copy_of(exc) for _ in ready]
        except BaseException as exc:
            # SystemExit would end this thread.
            error = SubmitError(f"the adapter's submit_blocking() raised {type(exc).__name__}: {exc}")
            results = [copy_of(error) for _ in ready]
        _note(ready, results)
        last = results[-1]
        all_refused = all(isinstance(result, SubmitError) for result in results)
        return last if all_refused and isinstance(last, SubmitError) else None

    def _described(self, parcels: list[Parcel]) -> list[tuple[bytes, Frame]]:
        return [
            (p.built.blob, self._packer.described(p.frame, p.built)) for p in parcels if p.built is not None
        ]


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


def refused(waiting: Waiting, result: BaseException) -> Parcel:
    """Return the parcel of a run that was not handed over."""
    parcel = Parcel([waiting], waiting.frame, together=False)
    parcel.result = result
    return parcel


def copy_of(exc: BaseException) -> Exception:
    """Return an exception for one of several runs: each gets its own notes and traceback."""
    if isinstance(exc, SubmitError):
        copy = SubmitError(str(exc), maybe_accepted=exc.maybe_accepted, submission=exc.submission)
    else:
        copy = SubmitError(f"submitting failed: {type(exc).__name__}: {exc}")
    copy.__cause__ = exc.__cause__ if isinstance(exc, SubmitError) else exc
    return copy
