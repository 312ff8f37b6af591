"""What the http and grpc executors share: batches of commands out, one stream of packets back for each."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.errors import ProtocolError, SubmitError, WoveError, safe_text
from wove.exchange import Packet, PacketReader, encode_cancel, framed
from wove.executors.network import NetworkExecutor
from wove.network_security import NetworkSecurityError, Seal
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from typing_extensions import Buffer

    from wove.executors.network import SentRun

logger = logging.getLogger("wove.executors")

#: A large request is granted, on top of ``timeout``, a second for so many bytes.
SLOWEST = 256 * 1024
#: Runs, and bytes, that leave in one request at most.
MAX_BATCH = 32
MAX_BATCH_BYTES = 256 * 1024
#: Seconds that a service has to end what was cancelled, until its connection is given up.
CANCEL_GRACE = 10.0
#: Seconds that the connection for cancellations stays open without use, at least.
WARM_SECONDS = 20.0
#: Seconds that stopping waits for it to be opened.
WARM_GRACE = 0.5
#: From this size, in bytes, signatures are verified in a thread.
IN_THREAD_FROM = 1024 * 1024


class RefusedError(WoveError):
    """The service answered, and took nothing of the request."""


class Request:
    """One request: commands as they are sent, and the events that come back."""

    def __init__(self, body: list[Buffer]) -> None:
        self.body = body
        self.size = sum(memoryview(part).nbytes for part in body)
        #: What verifies the answer's packets; the transport sets it before it yields any.
        self.seal = Seal(None, "answer")
        self.accepted = False
        self.on_accepted: Callable[[], None] | None = None

    def accept(self) -> None:
        """The service has accepted the request: called by the transport before it yields anything."""
        self.accepted = True
        if self.on_accepted is not None:
            self.on_accepted()

    def patience(self, timeout: float) -> float:
        """Return how many seconds the first answer may take: a large request earns time."""
        return timeout + self.size / SLOWEST


class RequestExecutor(NetworkExecutor):
    """Carries frames in requests whose answers are streams; a transport implements :meth:`exchange`."""

    def __init__(self) -> None:
        super().__init__()
        self._outbox: list[SentRun] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._flushing = False
        self._warm_until = 0.0
        self._warming: asyncio.Task[None] | None = None

    # --- a transport implements -------------------------------------------------

    @abstractmethod
    def exchange(self, request: Request, *, urgent: bool) -> AsyncGenerator[bytes, None]:
        """Send a request and yield the bytes of its answer.

        Args:
            request: the transport sets its ``seal`` and calls its ``accept`` as the answer comes.
            urgent: never to wait behind other requests.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release the connections."""

    # --- the contract -----------------------------------------------------------

    async def stop(self) -> None:
        """Give the requests up; see :meth:`EnvironmentExecutor.stop`."""
        tasks = list(self._tasks)
        for task in tasks:
            if task is not self._warming:
                task.cancel()
        if self._warming is not None and not self._warming.done():
            # asyncio forgets a socket whose TLS handshake is cancelled before it has begun.
            await asyncio.wait((self._warming,), timeout=WARM_GRACE)
            self._warming.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        await self.close()
        self._release()
        self._outbox.clear()

    # --- runs -------------------------------------------------------------------

    def _put(self, sent: SentRun) -> None:
        self._runs[sent.run_id] = sent
        self._outbox.append(sent)
        if not self._flushing:
            # What is submitted in one turn of the loop leaves together: the task begins with the next one.
            self._flushing = True
            self._spawn(self._flush(), f"wove-{self.transport}-exchange")

    def _take_back(self, sent: SentRun) -> bool:
        """Forget a run that has not left yet."""
        if sent not in self._outbox:
            return False
        self._outbox.remove(sent)
        self._runs.pop(sent.run_id, None)
        return True

    async def _warm(self) -> None:
        """Open the connection that a cancellation will take: with TLS that is a while."""
        try:
            async with aclosing(self.exchange(Request([]), urgent=True)) as answer:
                async for _ in answer:
                    pass
        except Exception as exc:
            logger.debug("the connection for cancellations to %s is not open: %s", self.where, exc)

    async def _flush(self) -> None:
        """Send what waits: the first batch in this task, the others in tasks of their own."""
        self._flushing = False
        now = self._loop.time()
        if now >= self._warm_until:
            self._warm_until = now + WARM_SECONDS
            self._warming = self._spawn(self._warm(), "wove-warm")
        outbox, self._outbox = self._outbox, []
        if not outbox:
            return  # taken back
        batch, outbox = _first_batch(outbox)
        while outbox:
            other, outbox = _first_batch(outbox)
            spawned = self._spawn(self._deliver(other), f"wove-{self.transport}-exchange")
            for sent in other:
                sent.carrier = spawned
        task = asyncio.current_task()
        for sent in batch:
            sent.carrier = task
        await self._deliver(batch)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _deliver(self, batch: list[SentRun]) -> None:
        """Send one request and hand its events on, until each of its runs has ended, one way or another."""
        body: list[Buffer] = []
        for sent in batch:
            body += framed(sent.parts)
            sent.parts = []
        request = Request(body)
        del body
        runs = {sent.run_id: sent for sent in batch}
        problem = "its answer ended without an outcome"
        request.on_accepted = partial(_accept, batch)
        try:
            await self._receive(request, runs)
        except asyncio.CancelledError:
            problem = "the request was given up"
            raise
        except Exception as exc:
            problem = safe_text(exc, 1_000) or type(exc).__name__
            if not request.accepted:
                self._reject(batch, exc)
        finally:
            for sent in batch:
                self._lose(sent, problem)

    def _reject(self, batch: list[SentRun], exc: Exception) -> None:
        certain = isinstance(exc, (RefusedError, NetworkSecurityError))
        for sent in batch:
            if sent.accepted:
                continue
            error = SubmitError(
                f"the {self.transport} service at {self.where} did not take run {sent.run_id} of {sent.task_id}: "
                f"{safe_text(exc, 1_000) or type(exc).__name__}",
                maybe_accepted=not certain,
            )
            error.__cause__ = exc
            sent.ended = True
            self._runs.pop(sent.run_id, None)
            sent.accept(error)

    async def _receive(self, request: Request, runs: dict[str, SentRun]) -> None:
        reader = PacketReader(self.max_message)
        async with aclosing(self.exchange(request, urgent=False)) as answer:
            async for chunk in answer:
                request.body = []
                for raw in reader.feed(chunk):
                    await self._take(raw, request, runs)
        if not reader.idle:
            raise ProtocolError("its answer was cut in the middle of a packet")

    async def _take(self, raw: memoryview, request: Request, runs: dict[str, SentRun]) -> None:
        seal = request.seal
        if raw.nbytes < IN_THREAD_FROM:
            verified = seal.open(raw)
        else:
            verified = await in_thread(seal.open, raw)
        packet = Packet(verified)
        sent = runs.get(str(packet.envelope.get("run_id")))
        if sent is not None:  # else a ping, or somebody else's
            self._take_packet(packet, sent)

    def _lose(self, sent: SentRun, problem: str) -> None:
        sent.accept()
        if sent.ended:
            return
        sent.ended = True
        self._runs.pop(sent.run_id, None)
        self._report_loss(sent, problem)

    # --- cancelling ---------------------------------------------------------------

    async def _cancel(self, sent: SentRun) -> None:
        """Tell the service; see :meth:`NetworkExecutor._cancel`."""
        request = Request(framed(encode_cancel(sent.run_id)))
        try:
            async with aclosing(self.exchange(request, urgent=True)) as answer:
                async for _ in answer:
                    pass
        finally:
            # A service that hangs holds its connection no longer than this.
            self._loop.call_later(CANCEL_GRACE, self._give_up, sent)

    def _give_up(self, sent: SentRun) -> None:
        exchange = sent.carrier
        if sent.ended or not isinstance(exchange, asyncio.Task) or exchange.done():
            return
        if all(run.abandoned for run in self._runs.values() if run.carrier is exchange):
            exchange.cancel()


def _first_batch(outbox: list[SentRun]) -> tuple[list[SentRun], list[SentRun]]:
    """Return the runs that leave in one request, and the others."""
    count = size = 0
    while count < min(len(outbox), MAX_BATCH) and (not count or size + outbox[count].size < MAX_BATCH_BYTES):
        size += outbox[count].size
        count += 1
    return outbox[:count], outbox[count:]


def _accept(batch: list[SentRun]) -> None:
    for sent in batch:
        sent.accept()


def refused(status: str, text: str, *, trusted: bool) -> RefusedError:
    """Return the error for a service that answered with something else than events."""
    return RefusedError(f"it answered {status}" + (f": {text[:500]}" if trusted and text else ""))
