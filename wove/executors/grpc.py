"""The grpc executor: a generic method of a worker service, no generated code."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from wove.errors import safe_text
from wove.exchange import encode_cancel
from wove.executors.grpc_line import Line
from wove.executors.grpc_loop import Pipe, loop_of_calls
from wove.executors.grpc_settings import channel_options, read_credentials, read_target, require_grpc
from wove.executors.grpc_stub import Stub
from wove.executors.policy import check_policy
from wove.executors.requests import IN_THREAD_FROM, Request, RequestExecutor
from wove.executors.settings import seconds
from wove.network_security import Seal
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
    from concurrent.futures import Future

    from typing_extensions import Buffer

    from wove.exchange import Packet
    from wove.executors.network import SentRun

logger = logging.getLogger("wove.executors")

#: Seconds between two questions whether a connection with open calls still stands.
KEEP_ALIVE = 30.0
#: The largest command, in bytes, that goes by the call that stays open.
LINE_BYTES = 256 * 1024
#: Seconds between two attempts to open such a call.
LINE_AGAIN = 1.0


class GrpcEnvironmentExecutor(RequestExecutor):
    """Sends tasks to a worker service over gRPC; events come back as they happen.

    A service whose method is unary answers with all events at once, which works as well. Ours has another one
    beside it: one call of it stays open and carries most runs, for a call each costs more than most tasks.

    ``executor_config``: ``target`` (``"host:port"``, ``"unix:/path"``), ``method``
    (``/wove.network_executor.WorkerService/Send``), ``metadata`` (a mapping), ``secure`` (TLS),
    ``root_certificates``, ``client_certificate``, ``client_key`` (paths of PEM files), ``security``, ``timeout``
    (seconds to connect, to get an answer, and of silence: 30), ``keep_alive`` (seconds, 30), ``max_message``
    (largest result in bytes: 256 MiB), ``insecure``.
    """

    transport = "grpc"
    config_keys: ClassVar[tuple[str, ...]] = (
        "client_certificate", "client_key", "keep_alive", "metadata", "method", "root_certificates", "secure",
        "target",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._stub: Stub | None = None
        self._line: Line | None = None
        self._opening: Future[None] | None = None
        #: When a line may be opened next; never where the service has none.
        self._line_from = 0.0

    @property
    def where(self) -> str:
        """The service's address."""
        return self._target.address

    async def open(self, config: Mapping[str, Any]) -> None:
        """Check the settings; see :meth:`NetworkExecutor.open`."""
        target = self._target = read_target(config)
        check_policy(config, self.security, where=self.where, secure=target.secure, local=target.local)
        grpc = require_grpc()
        credentials = await in_thread(read_credentials, grpc, config) if target.secure else None
        options = channel_options(
            max_message=self.max_message,
            keep_alive=seconds(config, "keep_alive", KEEP_ALIVE),
            timeout=self.timeout,
        )
        self._loop_of_calls = loop_of_calls()
        self._stub = Stub(grpc, target, self.security, timeout=self.timeout, max_message=self.max_message)
        await self._in_loop_of_calls(self._stub.connect(credentials, options))

    async def close(self) -> None:
        """Close the connections; see :meth:`RequestExecutor.close`."""
        stub, self._stub = self._stub, None
        if self._opening is not None:
            self._opening.cancel()
        line, self._line = self._line, None
        if stub is not None:
            await self._in_loop_of_calls(_disconnect(stub, line))

    async def _in_loop_of_calls(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop_of_calls))

    async def exchange(self, request: Request, *, urgent: bool) -> AsyncGenerator[bytes, None]:
        """Send a request; see :meth:`RequestExecutor.exchange`."""
        stub = self._stub
        if stub is None:
            raise RuntimeError("the grpc executor is not started")
        size = request.size
        body = await in_thread(b"".join, request.body) if size > IN_THREAD_FROM else b"".join(request.body)
        answer = Pipe()
        conversation = asyncio.run_coroutine_threadsafe(
            stub.converse(body, request.patience(self.timeout), answer, urgent=urgent),
            self._loop_of_calls,
        )
        del body
        try:
            while (item := await answer.get()) is not None:
                if isinstance(item, Seal):
                    request.seal = item
                    request.accept()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            conversation.cancel()

    # --- the call that stays open ---------------------------------------------------

    def _put(self, sent: SentRun) -> None:
        line = self._line
        if line is None:
            self._open_line()
        if line is None or sent.size > LINE_BYTES:
            super()._put(sent)
            return
        self._runs[sent.run_id] = sent
        sent.carrier = line
        parts, sent.parts = sent.parts, []
        # From here on the service may have it.
        sent.accept()
        self._tell(line, parts)

    async def _cancel(self, sent: SentRun) -> None:
        if isinstance(sent.carrier, Line):
            self._tell(sent.carrier, encode_cancel(sent.run_id))
        else:
            await super()._cancel(sent)

    def _tell(self, line: Line, parts: list[Buffer]) -> None:
        if self._loop is self._loop_of_calls:
            line.send(parts)
        else:
            self._loop_of_calls.call_soon_threadsafe(line.send, parts)

    def _open_line(self) -> None:
        """Have a line opened; until it is, runs go by calls of their own."""
        if self._opening is None and self._stub is not None and self._loop.time() >= self._line_from:
            self._opening = asyncio.run_coroutine_threadsafe(self._greet(self._stub), self._loop_of_calls)

    async def _greet(self, stub: Stub) -> None:
        """Open a line. In the loop of calls."""
        line_from = self._loop.time() + LINE_AGAIN
        line: Line | None = None
        try:
            line = await stub.open_line(
                take=partial(self._hand_over, self._take_from_line),
                ended=partial(self._hand_over, self._line_ended),
            )
        except Exception as exc:
            # Calls of their own say what is wrong.
            logger.debug("no line to %s: %s", self.where, exc)
            if isinstance(exc, NotImplementedError):
                line_from = float("inf")
        finally:
            self._hand_over(self._line_opened, line, line_from)

    def _hand_over(self, func: Callable[..., None], *args: Any) -> None:
        """Call something in the executor's loop."""
        if self._loop is self._loop_of_calls:
            func(*args)
            return
        try:
            self._loop.call_soon_threadsafe(func, *args)
        except RuntimeError:
            pass  # that loop has ended, and whoever waited with it

    def _line_opened(self, line: Line | None, line_from: float) -> None:
        self._opening = None
        self._line_from = line_from
        self._line = line
        if line is not None and self._stub is None:
            self._line = None
            self._loop_of_calls.call_soon_threadsafe(line.close)

    def _line_ended(self, line: Line, problem: Exception) -> None:
        if self._line is line:
            self._line = None
        for sent in [sent for sent in self._runs.values() if sent.carrier is line]:
            self._lose(sent, safe_text(problem, 1_000))

    def _take_from_line(self, packets: list[Packet]) -> None:
        for packet in packets:
            sent = self._runs.get(str(packet.envelope.get("run_id")))
            if sent is not None:
                self._take_packet(packet, sent)


async def _disconnect(stub: Stub, line: Line | None) -> None:
    if line is not None:
        line.close()
    await stub.close()
