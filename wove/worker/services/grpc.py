"""The gRPC worker service: one generic method, no generated code."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import grpc

from wove.errors import ConfigurationError, ProtocolError
from wove.exchange import HOLD, MORE, Packet, chunked, encode_note, split_packets
from wove.network_security import NetworkSecurityError, Seal
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
    from collections.abc import AsyncIterator, Sequence

    from typing_extensions import Buffer

    from wove.network_security import Verified

DEFAULT_METHOD = "/wove.network_executor.WorkerService/Send"
#: Bytes of the answer in one message.
CHUNK = 1024 * 1024
#: Seconds that calls get to end when the server does.
STOP_SECONDS = 1.0
#: What the name of the unary method ends with.
QUICK_SUFFIX = "Quick"
#: Seconds that a caller has to ask for the rest of an answer, and the largest request that may hold nothing but a note.
CONTINUE_SECONDS = 5.0
NOTE_BYTES = 256
#: Seconds that a call stays open whose caller wants just that.
HOLD_SECONDS = 2.0


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
            method + QUICK_SUFFIX: grpc.unary_unary_rpc_method_handler(self._send_quick),
        }
        #: Answers of which the first part was handed over: what comes of their runs, by the word to ask with.
        self._unfinished: dict[str, Listener] = {}
        self._held: set[asyncio.Future[None]] = set()

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
        listener = self._continued(body) or Listener()
        try:
            if not listener.continued:
                await self._take(body, listener, context)
            quick = await sealed(await listener.take_quick(QUICK_SECONDS), seal)
            # The caller learns that its commands were taken, long before anything comes of slow ones.
            await context.send_initial_metadata(())
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

    async def _send_quick(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answer with what comes of short runs; of others the rest is asked for by a token."""
        if not self._started:
            await self.start()
        verified = await self._verify(body, context, self.method + QUICK_SUFFIX)
        if len(body) <= NOTE_BYTES and _only(body, HOLD) is not None:
            await self._hold()
            return b""
        listener = Listener()
        packets: list[Sequence[Buffer]] = []
        try:
            await self._take(body, listener, context)
            packets = await listener.take_quick(QUICK_SECONDS)
            size = sum(memoryview(part).nbytes for parts in packets for part in parts)
            if listener.done and size <= CHUNK:
                self.tasks.hub.delivered(listener.ended)
                return b"".join(await sealed(packets, Seal(verified.key, "answer")))
        except BaseException:
            self.tasks.hub.detach(listener, retention=CUT_SECONDS)
            raise
        listener.put_back(packets)
        token = secrets.token_hex(16)
        self._unfinished[token] = listener
        asyncio.get_running_loop().call_later(CONTINUE_SECONDS, self._give_up, token)
        return b"".join(await sealed([encode_note(MORE, token=token)], Seal(verified.key, "answer")))

    async def _hold(self) -> None:
        """Answer after a while, or when the service ends: the caller wants an open call, and nothing else."""
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.add(held)
        await asyncio.wait((held,), timeout=HOLD_SECONDS)
        self._held.discard(held)

    def release(self) -> None:
        """Answer the calls that are open for nothing, so that the server need not wait for them."""
        for held in self._held:
            if not held.done():
                held.set_result(None)

    def _give_up(self, token: str) -> None:
        listener = self._unfinished.pop(token, None)
        if listener is not None:
            self.tasks.hub.detach(listener, retention=CUT_SECONDS)

    def _continued(self, body: bytes) -> Listener | None:
        """Return who listens to the runs whose first answer the caller has had."""
        note = _only(body, MORE) if self._unfinished and len(body) <= NOTE_BYTES else None
        if note is None:
            return None
        listener = self._unfinished.pop(str(note.envelope.get("token")), None)
        if listener is not None:
            listener.continued = True
        return listener

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


def _only(body: bytes, kind: str) -> Packet | None:
    """Return the packet of a request that holds that one, and no other."""
    try:
        packets = [Packet(raw) for raw in split_packets(body)]
    except ProtocolError:
        return None  # said where commands are taken
    return packets[0] if len(packets) == 1 and packets[0].kind == kind else None


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
