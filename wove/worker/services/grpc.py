"""The gRPC worker service: one generic method, no generated code."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any

import grpc

from wove.errors import ConfigurationError, ProtocolError, WoveError
from wove.exchange import (
    HELLO,
    PING,
    TAKEN,
    VERSION,
    Packet,
    PacketReader,
    chunked,
    encode_note,
    framed,
    split_packets,
)
from wove.network_security import NetworkSecurityError, Seal, channel_key
from wove.worker.services.hub import Listener
from wove.worker.services.listen import Address, run_until_told, start_listening
from wove.worker.services.service import (
    CUT_SECONDS,
    PING_SECONDS,
    QUICK_SECONDS,
    Service,
    maybe_in_thread,
    sealed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from typing_extensions import Buffer

    from wove.network_security import Verified

logger = logging.getLogger("wove.worker")

DEFAULT_METHOD = "/wove.network_executor.WorkerService/Send"
#: Bytes of the answer in one message.
CHUNK = 1024 * 1024
#: Seconds that calls get to end when the server does.
STOP_SECONDS = 1.0
#: What the name of the method ends with whose calls stay open.
LINE_SUFFIX = "Line"
#: Bytes of the stream in one message there.
LINE_CHUNK = 512 * 1024


def grpc_handler(
    service: Service | None = None, *, method: str = DEFAULT_METHOD, **options: Any
) -> WorkerHandler:
    """Return a generic handler that runs tasks, for ``grpc.aio.Server.add_generic_rpc_handlers``.

    The service starts with the first call; await the handler's ``start()`` to start it before, and its
    ``stop()`` at the end.

    Args:
        service: what runs the tasks; without one it is made of the options.
        method: the path of the method.
        options: those of :class:`Service`: ``security``, ``threads``, ``processes``, ``allow``, ...

    Raises:
        ConfigurationError: an option cannot be used.
    """
    return WorkerHandler(service or Service(name="grpc", **options), method)


class WorkerHandler(grpc.GenericRpcHandler):
    """Serves one method whose requests hold commands and whose answer is a stream of events."""

    def __init__(self, service: Service, method: str = DEFAULT_METHOD) -> None:
        self.tasks = service
        self.method = method
        self._starting = asyncio.Lock()
        self._started = False
        self._handlers: dict[str, Any] = {
            method: grpc.unary_stream_rpc_method_handler(self._send),
            method + LINE_SUFFIX: grpc.stream_stream_rpc_method_handler(self._line),
        }
        self._open_lines: set[asyncio.Task[Any]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call, or None for another method."""
        return self._handlers.get(handler_call_details.method)

    async def start(self) -> None:
        """Start the service. Idempotent."""
        async with self._starting:
            if not self._started:
                await self.tasks.start()
                self._started = True

    async def stop(self) -> None:
        """Stop the service. Idempotent."""
        self.release()
        await self.tasks.stop()

    async def _send(
        self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes | memoryview]:
        if not self._started:
            await self.start()
        verified = await self._verify(body, context, self.method)
        seal = Seal(verified.key, "answer")
        listener = Listener()
        try:
            await self._take(body, listener, context)
            quick = await sealed(await listener.take_quick(QUICK_SECONDS), seal)
            # The caller learns that its commands were taken, long before anything comes of slow ones.
            await context.send_initial_metadata(((TAKEN, "1"),))
            for chunk in chunked(quick, CHUNK):
                yield bytes(chunk)
            while not listener.done:
                for chunk in chunked(await sealed(await listener.take(PING_SECONDS), seal), CHUNK):
                    yield bytes(chunk)
            for chunk in chunked(await sealed(await listener.take_within(0), seal), CHUNK):
                yield bytes(chunk)
        finally:
            self.tasks.hub.detach(listener, retention=CUT_SECONDS)
        self.tasks.hub.delivered(listener.ended)

    async def _line(self, requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Take commands, and say what comes of them, for as long as the caller likes."""
        if not self._started:
            await self.start()
        verified = await self._verify(b"", context, self.method + LINE_SUFFIX)
        nonce = secrets.token_hex(16)
        hello = encode_note(HELLO, v=VERSION, nonce=nonce, instance=self.tasks.instance)
        await context.write(b"".join([Seal(verified.key, "hello").tag(hello), *hello]))
        key = channel_key(verified.key, nonce.encode())
        listener = Listener()
        task = asyncio.current_task()
        writing = asyncio.create_task(self._write_line(listener, context, Seal(key, "down")))
        if task is not None:
            self._open_lines.add(task)
        try:
            await self._read_line(listener, context, Seal(key, "up"))
        except WoveError as exc:
            logger.warning("a call from %s: %s", context.peer(), exc)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))
        finally:
            if task is not None:
                self._open_lines.discard(task)
            self.tasks.hub.detach(listener, retention=CUT_SECONDS)
            writing.cancel()
            await asyncio.wait((writing,))

    async def _read_line(
        self, listener: Listener, context: grpc.aio.ServicerContext[bytes, bytes], seal: Seal
    ) -> None:
        reader = PacketReader(self.tasks.max_request)
        while isinstance(message := await context.read(), bytes):
            for raw in reader.feed(seal.open(memoryview(message))):
                packet = Packet(raw)
                if packet.kind == PING:
                    listener.say(encode_note(PING))
                else:
                    self.tasks.hub.take(packet, listener)

    async def _write_line(
        self, listener: Listener, context: grpc.aio.ServicerContext[bytes, bytes], seal: Seal
    ) -> None:
        try:
            while True:
                pieces: list[Buffer] = []
                for parts in await listener.take(PING_SECONDS):
                    pieces += framed(parts)
                ended, listener.ended = listener.ended, []
                for chunk in chunked(pieces, LINE_CHUNK):
                    await context.write(b"".join((seal.tag([chunk]), chunk)))
                self.tasks.hub.delivered(ended)
        except Exception as exc:
            # The reading side notices, too, and cleans up.
            logger.debug("a call could not be written to: %s", exc)

    def release(self) -> None:
        """End the calls that stay open, so that the server need not wait for them."""
        for task in self._open_lines:
            task.cancel()

    async def _take(
        self, body: bytes, listener: Listener, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        try:
            for raw in split_packets(body):
                self.tasks.hub.take(Packet(raw), listener)
        except ProtocolError as exc:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(exc))

    async def _verify(
        self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes], method: str
    ) -> Verified:
        metadata = [(str(name), value) for name, value in context.invocation_metadata() or ()]
        host = next((str(value) for name, value in metadata if name == "wove-host"), "")

        def check() -> Verified:
            given = [(name, value) for name, value in metadata if isinstance(value, str)]
            return self.tasks.security.verify_metadata(given, host=host, target=method, body=body)

        try:
            verified: Verified = await maybe_in_thread(len(body), check)
        except NetworkSecurityError as exc:
            self.tasks.refuse(exc, context.peer())
            clock = tuple((name.lower(), value) for name, value in exc.clock.items())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not authenticated", trailing_metadata=clock)
        return verified


async def serve_grpc(service: Service, address: Address) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: the address cannot be bound, or an option cannot be used.
    """
    address.check(service)
    address.tls()  # what cannot be read is said in our words
    handler = grpc_handler(service)
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", service.max_request),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            # Callers ask now and then whether the connection still stands.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        )
    )
    server.add_generic_rpc_handlers((handler,))
    port = 0

    def bind() -> None:
        nonlocal port
        where = (
            f"unix:{address.unix}"
            if address.unix is not None
            else f"{_bracketed(address.host)}:{address.port}"
        )
        credentials = _credentials(address)
        if credentials is None:
            port = server.add_insecure_port(where)
        else:
            port = server.add_secure_port(where, credentials)

    try:
        await handler.start()
        await start_listening(bind, address)
        await server.start()
        target = f"unix:{address.unix}" if address.unix is not None else f"{_bracketed(address.host)}:{port}"
        await run_until_told(service, target)
    finally:
        handler.release()
        await server.stop(STOP_SECONDS)
        await handler.stop()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _credentials(address: Address) -> grpc.ServerCredentials | None:
    if address.tls_cert is None:
        return None
    try:
        chain, key = _read(address.tls_cert), _read(address.tls_key or address.tls_cert)
        roots = _read(address.tls_client_ca) if address.tls_client_ca is not None else None
    except OSError as exc:
        raise ConfigurationError(f"--tls-cert {address.tls_cert}: {exc}") from None
    return grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=roots is not None)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
