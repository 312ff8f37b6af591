"""The calls of one service, made in the event loop of all gRPC calls."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wove.exchange import TAKEN
from wove.executors.grpc_line import Line, read_hello
from wove.executors.network import SILENCE_SECONDS
from wove.executors.requests import IN_THREAD_FROM, refused
from wove.network_security import NetworkSecurityError, Seal
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from grpc.aio import Channel

    from wove.exchange import Packet
    from wove.executors.grpc_loop import Pipe
    from wove.executors.grpc_settings import Target
    from wove.network_security import NetworkExecutorSecurity

    TakePackets = Callable[[list[Packet]], None]
    LineEnded = Callable[[Line, Exception], None]

#: What the name of the method ends with whose calls stay open.
LINE_SUFFIX = "Line"
#: Seconds in which gRPC notices that a connection is gone on which a call has broken off.
BROKEN_SECONDS = 0.5


class Stub:
    """Calls one service. All methods are called in the loop of calls.

    Args:
        grpc: the library.
        target: the service and its method.
        security: the credentials.
        timeout: seconds to connect, to get an answer, and of silence.
        max_message: largest packet that is taken, in bytes.
    """

    def __init__(
        self,
        grpc: ModuleType,
        target: Target,
        security: NetworkExecutorSecurity,
        *,
        timeout: float,
        max_message: int,
    ) -> None:
        self._grpc = grpc
        self._target = target
        self._security = security
        self._timeout = timeout
        self._max_message = max_message
        self._channels: list[Channel] = []
        self._calls: Any = None
        self._urgent: Any = None
        self._lines: Any = None
        #: The connection on which a line has just broken off; calls do without it.
        self._broken: Any = None

    async def connect(self, credentials: Any, options: tuple[tuple[str, int], ...]) -> None:
        """Make the connections, which gRPC opens when they are needed; without credentials in plain text."""
        channel = self._new_channel(credentials, options)
        self._calls = channel.unary_stream(self._target.method)
        self._lines = channel.stream_stream(self._target.method + LINE_SUFFIX)
        # Cancellations have a connection of their own: they never wait behind calls that hang.
        self._urgent = self._new_channel(credentials, options).unary_stream(self._target.method)

    def _new_channel(self, credentials: Any, options: tuple[tuple[str, int], ...]) -> Any:
        aio = self._grpc.aio
        if credentials is None:
            channel = aio.insecure_channel(self._target.address, options=options)
        else:
            channel = aio.secure_channel(self._target.address, credentials, options=options)
        self._channels.append(channel)
        return channel

    async def close(self) -> None:
        """Close the connections."""
        channels, self._channels = self._channels, []
        self._calls = self._urgent = self._lines = None
        for channel in channels:
            await channel.close(None)

    # --- the call that stays open ---------------------------------------------------

    async def open_line(self, *, take: TakePackets, ended: LineEnded) -> Line | None:
        """Open a line.

        Args:
            take: takes the packets that have come, verified.
            ended: told once, with the reason, that nothing comes any more.

        Returns:
            The line; None where the service's clock is another each time.

        Raises:
            NotImplementedError: the service has no lines.
            Exception: whatever else keeps it from being opened.
        """
        return await self._try_line(take, ended) or await self._try_line(take, ended)

    async def _try_line(self, take: TakePackets, ended: LineEnded) -> Line | None:
        """Return a line, or None when the service's clock was learnt instead."""
        if self._broken is not None:
            await self._leave_broken()
        signed = await self._sign(b"", self._target.method + LINE_SUFFIX)
        call = self._lines(metadata=(*self._target.metadata, ("wove-host", self._target.address), *signed))
        try:
            seals = read_hello(
                await self._within(self._timeout, call.read()), self._security.answer_key(dict(signed))
            )
        except BaseException as exc:
            over = call.done()
            call.cancel()
            if not over or not isinstance(exc, Exception):
                raise
            if await call.code() is self._grpc.StatusCode.UNIMPLEMENTED:
                raise NotImplementedError("the service has no such method") from exc
            told = {str(name): str(value) for name, value in await call.trailing_metadata() or ()}
            if self._security.learn_clock(dict(signed), told):
                return None
            raise
        return Line(
            call,
            seals,
            max_message=self._max_message,
            timeout=self._timeout,
            take=take,
            ended=partial(self._broke_off, ended),
        )

    def _broke_off(self, ended: LineEnded, line: Line, problem: Exception) -> None:
        if self._channels:
            self._broken = self._channels[0]
        ended(line, problem)

    async def _leave_broken(self) -> None:
        """Wait until gRPC has noticed that its connection is gone: what is called before fails along with it."""
        channel = self._broken
        ready = self._grpc.ChannelConnectivity.READY
        if channel.get_state() is ready:
            with suppress(TimeoutError):  # the call alone has ended, and not its connection
                async with asyncio.timeout(BROKEN_SECONDS):
                    await channel.wait_for_state_change(ready)
        self._broken = None

    # --- calls of their own -------------------------------------------------------

    async def converse(self, body: bytes, patience: float, answer: Pipe, *, urgent: bool) -> None:
        """Make the call and pass on what comes back: a seal, chunks, perhaps an error, None at the end."""
        aio = self._grpc.aio
        send = self._urgent if urgent else self._calls
        try:
            if send is None:
                raise RuntimeError("the grpc executor is not started")
            if self._broken is not None and not urgent:
                await self._leave_broken()
            call, chunk = await self._call(send, body, patience, answer)
            try:
                if chunk is not None:
                    answer.put(chunk)
                while (chunk := await self._within(self._silence, call.read())) is not aio.EOF:
                    answer.put(chunk)
                if await call.code() is not self._grpc.StatusCode.OK:
                    raise ConnectionError(f"{(await call.code()).name}: {await call.details()}")
            finally:
                call.cancel()
        except aio.AioRpcError as exc:
            answer.put(ConnectionError(f"{exc.code().name}: {exc.details()}"))
        except Exception as exc:
            answer.put(exc)
        finally:
            answer.put(None)

    async def _call(self, send: Any, body: bytes, patience: float, answer: Pipe) -> tuple[Any, bytes | None]:
        """Return the call when it was taken, and what has come of it by then.

        It is made again where the service's clock is another.
        """
        for attempt in range(3):
            signed = await self._sign(body, self._target.method)
            call = send(body, metadata=(*self._target.metadata, ("wove-host", self._target.address), *signed))
            try:
                told = await self._answered(call, patience, dict(signed), learn=attempt == 0)
            except BaseException:
                call.cancel()
                raise
            if told is None or isinstance(told, bytes):
                answer.put(Seal(self._security.answer_key(dict(signed)), "answer"))
                return call, told
            if isinstance(told, Exception):
                raise told
        raise ConnectionError("it answered that the request's clock is wrong")

    async def _answered(
        self, call: Any, patience: float, signed: dict[str, str], *, learn: bool
    ) -> Exception | str | bytes | None:
        """Wait until the request was taken.

        Returns:
            None, or the first that has come of it; else an error, or that it is to be sent again.
        """
        try:
            head = await self._within(patience, call.initial_metadata())
            if any(name == TAKEN for name, _ in head or ()):
                return None
            # A service of somebody else's says nothing there, nor does ours when it refuses the request.
            first = await self._within(max(patience, self._silence), call.read())
            if isinstance(first, bytes):
                return first
            code, details = await call.code(), await call.details()
            trailing = await call.trailing_metadata()
        except self._grpc.aio.AioRpcError as exc:
            code, details, trailing = exc.code(), exc.details(), exc.trailing_metadata()
        if code is self._grpc.StatusCode.OK:
            return None
        return self._problem(code, details, trailing, signed, learn=learn)

    def _problem(
        self, code: Any, details: Any, trailing: Any, signed: dict[str, str], *, learn: bool
    ) -> Exception | str:
        """Return what a failed call means: an error, or that the request is to be sent again."""
        codes = self._grpc.StatusCode
        if code is codes.UNAUTHENTICATED:
            told = {str(name): str(value) for name, value in trailing or ()}
            if learn and self._security.learn_clock(signed, told):
                return "again"
            return NetworkSecurityError(
                f"it does not accept this side's credentials ({self._security.source}): give both sides the same secret; "
                "the service's log says what is wrong"
            )
        if code in (codes.UNIMPLEMENTED, codes.INVALID_ARGUMENT, codes.RESOURCE_EXHAUSTED):
            return refused(code.name, str(details), trusted=True)
        return ConnectionError(f"{code.name}: {details}")

    async def _sign(self, body: bytes, method: str) -> tuple[tuple[str, str], ...]:
        def sign() -> tuple[tuple[str, str], ...]:
            return self._security.metadata_for(host=self._target.address, target=method, body=body)

        if len(body) < IN_THREAD_FROM:
            return sign()
        signed: tuple[tuple[str, str], ...] = await in_thread(sign)
        return signed

    async def _within(self, limit: float, work: Any) -> Any:
        try:
            async with asyncio.timeout(limit):
                return await work
        except TimeoutError:
            raise self._silent(limit) from None

    @property
    def _silence(self) -> float:
        return max(self._timeout, SILENCE_SECONDS)

    def _silent(self, seconds: float) -> ConnectionError:
        return ConnectionError(f'nothing came from it for {seconds:g} s (executor_config["timeout"])')
