"""The grpc executor: a generic method of a worker service, no generated code."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from wove.errors import ConfigurationError, MissingDispatchFeatureError, safe_text
from wove.exchange import TAKEN, encode_cancel
from wove.executors.grpc_line import Line, read_hello
from wove.executors.grpc_loop import Pipe, loop_of_calls
from wove.executors.network import SILENCE_SECONDS
from wove.executors.policy import check_policy, client_tls, is_loopback, read_headers, read_pem
from wove.executors.requests import IN_THREAD_FROM, Request, RequestExecutor, refused
from wove.executors.settings import seconds
from wove.network_security import NetworkSecurityError, Seal
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from concurrent.futures import Future
    from types import ModuleType

    from grpc.aio import Channel
    from typing_extensions import Buffer

    from wove.exchange import Packet
    from wove.executors.network import SentRun

logger = logging.getLogger("wove.executors")

DEFAULT_METHOD = "/wove.network_executor.WorkerService/Send"
#: Seconds between two questions whether a connection with open calls still stands.
KEEP_ALIVE = 30.0
#: What the name of the method ends with whose calls stay open, and the largest command, in bytes, that goes there.
LINE_SUFFIX = "Line"
LINE_BYTES = 256 * 1024
#: Seconds between two attempts to open such a call.
LINE_AGAIN = 1.0
#: Seconds in which gRPC notices that a connection is gone on which a call has broken off.
BROKEN_SECONDS = 0.5
_METHOD = re.compile(r"/[\w.]+/\w+")
_NAME = re.compile(r"[a-z0-9_.-]+")


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
        self._calls: Any = None
        self._urgent: Any = None
        self._lines: Any = None
        self._line: Line | None = None
        self._opening: Future[None] | None = None
        #: When a line may be opened next; never where the service has none.
        self._line_from = 0.0
        #: The connection on which a line has just broken off; calls do without it.
        self._broken: Any = None
        self._channels: list[Channel] = []

    @property
    def where(self) -> str:
        """The service's address."""
        return self._target

    async def open(self, config: Mapping[str, Any]) -> None:
        """Check the settings; see :meth:`NetworkExecutor.open`."""
        self._target, local = _read_target(config)
        self._method = _read_method(config)
        self._metadata = _read_metadata(config)
        secure = config.get("secure", False)
        if type(secure) is not bool:
            raise ConfigurationError(f'executor_config["secure"] is True (TLS) or False; got {secure!r}')
        given = [key for key in ("root_certificates", "client_certificate", "client_key") if config.get(key)]
        if given and not secure:
            raise ConfigurationError(f'executor_config["{given[0]}"] is of no use without "secure": True')
        check_policy(config, self.security, where=self._target, secure=secure, local=local)
        self._grpc = _require_grpc()
        credentials = await in_thread(self._credentials, config) if secure else None
        keep_alive = seconds(config, "keep_alive", KEEP_ALIVE)
        # Cancellations have a connection of their own: they never wait behind calls that hang.
        self._loop_of_calls = loop_of_calls()

        async def connect() -> None:
            channel = self._new_channel(credentials, keep_alive)
            self._calls = channel.unary_stream(self._method)
            self._lines = channel.stream_stream(self._method + LINE_SUFFIX)
            self._urgent = self._new_channel(credentials, keep_alive).unary_stream(self._method)

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(connect(), self._loop_of_calls))

    def _credentials(self, config: Mapping[str, Any]) -> Any:
        client_tls(config)  # what is no certificate is said in our words
        roots, chain, key = (
            read_pem(config, name) for name in ("root_certificates", "client_certificate", "client_key")
        )
        return self._grpc.ssl_channel_credentials(roots, key if key is not None else chain, chain)

    def _new_channel(self, credentials: Any, keep_alive: float) -> Any:
        aio = self._grpc.aio
        options = self._options(keep_alive)
        if credentials is None:
            channel = aio.insecure_channel(self._target, options=options)
        else:
            channel = aio.secure_channel(self._target, credentials, options=options)
        self._channels.append(channel)
        return channel

    def _options(self, keep_alive: float) -> tuple[tuple[str, int], ...]:
        return (
            ("grpc.max_receive_message_length", self.max_message),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", int(keep_alive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.timeout * 1000)),
            # A connection of its own, and no proxy from the environment.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            # A service that comes back is found soon.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        )

    async def close(self) -> None:
        """Close the connections; see :meth:`RequestExecutor.close`."""
        channels, self._channels = self._channels, []
        self._calls = self._urgent = self._lines = None
        if self._opening is not None:
            self._opening.cancel()
        line, self._line = self._line, None

        async def disconnect() -> None:
            if line is not None:
                line.close()
            for channel in channels:
                await channel.close(None)

        if channels:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(disconnect(), self._loop_of_calls))

    async def exchange(self, request: Request, *, urgent: bool) -> AsyncGenerator[bytes, None]:
        """Send a request; see :meth:`RequestExecutor.exchange`."""
        size = request.size
        body = await in_thread(b"".join, request.body) if size > IN_THREAD_FROM else b"".join(request.body)
        answer = Pipe()
        conversation = asyncio.run_coroutine_threadsafe(
            self._converse(body, request.patience(self.timeout), answer, urgent=urgent), self._loop_of_calls
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
        if self._opening is None and self._lines is not None and self._loop.time() >= self._line_from:
            self._opening = asyncio.run_coroutine_threadsafe(self._greet(), self._loop_of_calls)

    async def _greet(self) -> None:
        """Open a line. In the loop of calls."""
        line_from = self._loop.time() + LINE_AGAIN
        line: Line | None = None
        try:
            line = await self._try_line() or await self._try_line()
        except Exception as exc:
            # Calls of their own say what is wrong.
            logger.debug("no line to %s: %s", self._target, exc)
            if isinstance(exc, NotImplementedError):
                line_from = float("inf")
        finally:
            self._hand_over(self._line_opened, line, line_from)

    async def _try_line(self) -> Line | None:
        """Return a line, or None when the service's clock was learnt instead."""
        if self._broken is not None:
            await self._leave_broken()
        signed = await self._sign(b"", self._method + LINE_SUFFIX)
        call = self._lines(metadata=(*self._metadata, ("wove-host", self._target), *signed))
        try:
            seals = read_hello(
                await self._within(self.timeout, call.read()), self.security.answer_key(dict(signed))
            )
        except BaseException as exc:
            ended = call.done()
            call.cancel()
            if not ended or not isinstance(exc, Exception):
                raise
            if await call.code() is self._grpc.StatusCode.UNIMPLEMENTED:
                raise NotImplementedError("the service has no such method") from exc
            told = {str(name): str(value) for name, value in await call.trailing_metadata() or ()}
            if self.security.learn_clock(dict(signed), told):
                return None
            raise
        return Line(
            call,
            seals,
            max_message=self.max_message,
            timeout=self.timeout,
            take=partial(self._hand_over, self._take_from_line),
            ended=self._broke_off,
        )

    def _broke_off(self, line: Line, problem: Exception) -> None:
        """A line has ended. In the loop of calls."""
        if self._channels:
            self._broken = self._channels[0]
        self._hand_over(self._line_ended, line, problem)

    async def _leave_broken(self) -> None:
        """Wait until gRPC has noticed that its connection is gone: what is called before fails along with it."""
        channel = self._broken
        ready = self._grpc.ChannelConnectivity.READY
        if channel.get_state() is ready:
            with suppress(TimeoutError):  # the call alone has ended, and not its connection
                async with asyncio.timeout(BROKEN_SECONDS):
                    await channel.wait_for_state_change(ready)
        self._broken = None

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
        if line is not None and self._lines is None:
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

    # --- in the loop of all calls -------------------------------------------------

    async def _converse(self, body: bytes, patience: float, answer: Pipe, *, urgent: bool) -> None:
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
            signed = await self._sign(body, self._method)
            call = send(body, metadata=(*self._metadata, ("wove-host", self._target), *signed))
            try:
                told = await self._answered(call, patience, dict(signed), learn=attempt == 0)
            except BaseException:
                call.cancel()
                raise
            if told is None or isinstance(told, bytes):
                answer.put(Seal(self.security.answer_key(dict(signed)), "answer"))
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
            if learn and self.security.learn_clock(signed, told):
                return "again"
            return NetworkSecurityError(
                f"it does not accept this side's credentials ({self.security.source}): give both sides the same secret; "
                "the service's log says what is wrong"
            )
        if code in (codes.UNIMPLEMENTED, codes.INVALID_ARGUMENT, codes.RESOURCE_EXHAUSTED):
            return refused(code.name, str(details), trusted=True)
        return ConnectionError(f"{code.name}: {details}")

    async def _sign(self, body: bytes, method: str) -> tuple[tuple[str, str], ...]:
        def sign() -> tuple[tuple[str, str], ...]:
            return self.security.metadata_for(host=self._target, target=method, body=body)

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
        return max(self.timeout, SILENCE_SECONDS)

    def _silent(self, seconds: float) -> ConnectionError:
        return ConnectionError(f'nothing came from it for {seconds:g} s (executor_config["timeout"])')


def _require_grpc() -> ModuleType:
    try:
        import grpc
        import grpc.aio
    except ImportError:
        raise MissingDispatchFeatureError(
            'The grpc executor needs grpcio: pip install "wove[grpc]"'
        ) from None
    return grpc


def _read_target(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the target, and whether it is literally this machine."""
    target = config.get("target")
    if target is None:
        raise ConfigurationError(
            'executor_config["target"] is missing: the grpc executor needs it, as in {"target": "127.0.0.1:8300"}'
        )
    if (
        not isinstance(target, str)
        or not target
        or "//" in target.removeprefix("dns:///").removeprefix("unix://")
    ):
        raise ConfigurationError(
            f'executor_config["target"] is "host:port" or "unix:/path", without http://; got {target!r:.200}'
        )
    if target.startswith(("unix:", "unix-abstract:")):
        return target, True
    address = target.removeprefix("dns:///").removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise ConfigurationError(
            f'executor_config["target"] needs a port, as in "127.0.0.1:8300"; got {target!r:.200}'
        )
    return target, is_loopback(host.strip("[]"))


def _read_method(config: Mapping[str, Any]) -> str:
    method = config.get("method", DEFAULT_METHOD)
    if not isinstance(method, str) or not _METHOD.fullmatch(method):
        raise ConfigurationError(f'executor_config["method"] is /package.Service/Method; got {method!r:.200}')
    return method


def _read_metadata(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    metadata = read_headers(config, "metadata")
    for name in metadata:
        if not _NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
            raise ConfigurationError(
                f'executor_config["metadata"]: {name!r} is no name of gRPC metadata (lower case, no "grpc-" before it and '
                'no "-bin" behind it)'
            )
    return tuple(metadata.items())
