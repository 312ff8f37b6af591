"""A WebSocket to a worker service: how it is opened, and what goes over it until it breaks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from wove import frames
from wove.eager import run_now
from wove.errors import ProtocolError
from wove.exchange import ACK, HELLO, MAX_LIST, PING, Packet, PacketReader, chunked, encode_note, framed
from wove.executors.http import explain, require_aiohttp
from wove.executors.network import SILENCE_SECONDS
from wove.network_security import NetworkSecurityError, Seal, channel_key

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    from aiohttp import ClientSession, ClientWebSocketResponse
    from typing_extensions import Buffer

    from wove.executors.network import SentRun
    from wove.executors.policy import Endpoint
    from wove.network_security import NetworkExecutorSecurity

    #: A packet, and the run that it submits.
    Entry = tuple[list[Buffer], SentRun | None]

#: Seconds between two signs of life of ours, and that acknowledgements wait for company.
PING_SECONDS = 10.0
ACK_SECONDS = 0.05
#: Looks, within the silence that is allowed, whether anything has come.
SILENCE_LOOKS = 4
CHUNK = 512 * 1024


class Outgoing:
    """What is to be written, by whichever connection stands then."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._acks: list[str] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, parts: list[Buffer], sent: SentRun | None = None) -> None:
        """Have a packet written; ``sent`` is the run that it submits."""
        self._entries.append((parts, sent))
        self._wake.set()

    def acknowledge(self, run_id: str) -> None:
        """Have the service told that an outcome has arrived."""
        if frames.is_run_id(run_id):
            self._acks.append(run_id)
            if self._ack_timer is None:
                self._ack_timer = asyncio.get_running_loop().call_later(ACK_SECONDS, self._send_acks)

    def take_back(self, sent: SentRun) -> bool:
        """Forget the command of a run; False when it is not there any more."""
        waiting = next((entry for entry in self._entries if entry[1] is sent), None)
        if waiting is None:
            return False
        self._entries.remove(waiting)
        return True

    def take_unsent(self) -> list[tuple[list[Buffer], SentRun]]:
        """Empty it; return the commands that no connection was given."""
        entries, self._entries = self._entries, []
        return [(parts, sent) for parts, sent in entries if sent is not None and not sent.accepted]

    async def take(self) -> list[Buffer]:
        """Wait until there is something, and return all of it."""
        await self._wake.wait()
        self._wake.clear()
        acks, self._acks = self._acks, []
        for at in range(0, len(acks), MAX_LIST):
            self._entries.append((encode_note(ACK, run_ids=acks[at : at + MAX_LIST]), None))
        entries, self._entries = self._entries, []
        pieces: list[Buffer] = []
        for parts, sent in entries:
            pieces += framed(parts)
            # From here on the service may have it: after a break it is asked.
            if sent is not None:
                sent.accept()
        return pieces

    def clear(self) -> None:
        """Forget all packets."""
        self._entries.clear()

    def close(self) -> None:
        """Wake nobody for acknowledgements any more."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()

    def _send_acks(self) -> None:
        self._ack_timer = None
        self._wake.set()


class Connector:
    """Opens sockets to one service.

    Args:
        endpoint: where it is.
        security: the credentials.
        headers: those of the user's.
        tls: how TLS is spoken; None for the defaults, where it is at all.
        open_timeout: seconds to open a socket.
        timeout: seconds of silence after which a socket is dead.
        max_message: largest packet that is taken, in bytes.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        security: NetworkExecutorSecurity,
        *,
        headers: Mapping[str, str],
        tls: ssl.SSLContext | None,
        open_timeout: float,
        timeout: float,
        max_message: int,
    ) -> None:
        self._endpoint = endpoint
        self._security = security
        self._headers = headers
        self._open_timeout = open_timeout
        self._timeout = timeout
        self._max_message = max_message
        self._aiohttp = require_aiohttp()
        if endpoint.socket_path is not None:
            connector = self._aiohttp.UnixConnector(endpoint.socket_path)
        else:
            connector = self._aiohttp.TCPConnector(ssl=tls if tls is not None else True)
        self._session: ClientSession | None = self._aiohttp.ClientSession(
            connector=connector, trust_env=False, cookie_jar=self._aiohttp.DummyCookieJar()
        )

    async def connect(self) -> Connection:
        """Open a socket.

        Raises:
            ConnectionError: the service cannot be reached, or is none.
            NetworkSecurityError: one of both sides does not accept the other's credentials.
        """
        aiohttp, endpoint = self._aiohttp, self._endpoint
        if self._session is None:
            raise RuntimeError("the websocket executor is stopped")
        for _ in range(2):
            signed = self._security.headers_for(method="GET", host=endpoint.host, target=endpoint.target)
            try:
                async with asyncio.timeout(self._open_timeout):
                    socket: ClientWebSocketResponse = await self._session.ws_connect(
                        endpoint.url,
                        headers={**self._headers, **signed, "Host": endpoint.host},
                        max_msg_size=CHUNK * 2,
                        compress=0,
                        timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=1.0),
                        autoclose=True,
                    )
                    return await self._greet(socket, self._security.answer_key(signed))
            except aiohttp.WSServerHandshakeError as exc:
                if exc.status != 401:
                    raise ConnectionError(f"it answered {exc.status} and is no worker service") from exc
                if not self._security.learn_clock(signed, exc.headers or {}):
                    raise NetworkSecurityError(
                        f"the websocket service at {endpoint.where} does not accept this side's credentials "
                        f"({self._security.source}): give both sides the same secret; the service's log says what is wrong"
                    ) from None
            except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                raise ConnectionError(explain(exc, self._open_timeout)) from exc
        raise ConnectionError("it answered twice that the request's clock is wrong")

    async def _greet(self, socket: ClientWebSocketResponse, key: bytes | None) -> Connection:
        message = await socket.receive()
        if message.type is not self._aiohttp.WSMsgType.BINARY:
            raise ProtocolError("it is no worker service: it did not say hello")
        packet = Packet(Seal(key, "hello").open(memoryview(message.data)))
        nonce, instance = packet.envelope.get("nonce"), packet.envelope.get("instance")
        if packet.kind != HELLO or type(nonce) is not str or type(instance) is not str:
            raise ProtocolError("it is no worker service: it did not say hello")
        channel = channel_key(key, nonce.encode())
        return Connection(
            socket,
            (Seal(channel, "up"), Seal(channel, "down")),
            instance,
            timeout=self._timeout,
            max_message=self._max_message,
        )

    async def close(self) -> None:
        """Open no more."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class Connection:
    """One socket that is open.

    Args:
        socket: the socket, of which the greeting was read.
        seals: what signs what goes up, and verifies what comes down.
        instance: which service it is: another one after each of its starts.
        timeout: seconds of silence after which the socket is dead.
        max_message: largest packet that is taken, in bytes.
    """

    def __init__(
        self,
        socket: ClientWebSocketResponse,
        seals: tuple[Seal, Seal],
        instance: str,
        *,
        timeout: float,
        max_message: int,
    ) -> None:
        self._socket = socket
        self._up, self._down = seals
        self.instance = instance
        self._timeout = timeout
        self._max_message = max_message
        self._loop = asyncio.get_running_loop()
        self._binary = require_aiohttp().WSMsgType.BINARY
        self._stands = False
        #: Whether something is under way of which not all was written yet.
        self._in_between = False
        #: Whether anything has come since somebody last looked.
        self._heard = True

    async def converse(self, outgoing: Outgoing, take: Callable[[Packet], None]) -> None:
        """Write what is to be written and hand on what comes, verified, until the socket breaks; say why it did."""
        descriptor = self._socket.get_extra_info("socket")
        reading = asyncio.ensure_future(self._read(take))
        writing = asyncio.ensure_future(self._write(outgoing))
        pinging = asyncio.ensure_future(_ping(outgoing))
        listening = asyncio.ensure_future(self._until_silent())
        tasks = (reading, writing, listening, pinging)
        self._stands = True
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stands = False
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._socket.close()
            await _until_closed(descriptor)
        for task in tasks:
            if not task.cancelled() and (exc := task.exception()) is not None:
                raise exc

    def send_now(self, parts: list[Buffer]) -> bool:
        """Send a packet without a turn of the loop; False where that cannot be."""
        if not self._stands or self._in_between:
            return False
        chunk = b"".join(framed(parts))
        try:
            run_now(self._socket.send_bytes(self._up.tag([chunk]) + chunk), self._loop)
        except Exception:
            return False  # the socket is closing; the next one is given it
        return True

    async def _until_silent(self) -> None:
        """Raise when nothing has come for long: one look now and then, where a limit for each message costs much."""
        silence = max(self._timeout, SILENCE_SECONDS)
        quiet = 0
        while quiet < SILENCE_LOOKS:
            quiet += 1
            if self._heard:
                self._heard, quiet = False, 0
            await asyncio.sleep(silence / SILENCE_LOOKS)
        raise ConnectionError(explain(TimeoutError(), silence))

    async def _write(self, outgoing: Outgoing) -> None:
        while True:
            pieces = await outgoing.take()
            self._in_between = True
            for chunk in chunked(pieces, CHUNK):
                await self._socket.send_bytes(b"".join([self._up.tag([chunk]), chunk]))
            self._in_between = False

    async def _read(self, take: Callable[[Packet], None]) -> None:
        reader = PacketReader(self._max_message)
        while True:
            message = await self._socket.receive()
            self._heard = True
            if message.type is not self._binary:
                raise ConnectionError(f"the socket was closed ({self._socket.close_code})")
            for raw in reader.feed(self._down.open(memoryview(message.data))):
                take(Packet(raw))


async def _ping(outgoing: Outgoing) -> None:
    """Say now and then that this side is there, whatever else is said: a timer for each write costs more."""
    while True:
        await asyncio.sleep(PING_SECONDS)
        outgoing.put(encode_note(PING))


async def _until_closed(descriptor: Any) -> None:
    """Wait for TLS to say goodbye, too: whoever stops the executor may close the event loop next."""
    for _ in range(50):
        if descriptor is None or descriptor.fileno() == -1:
            return
        await asyncio.sleep(0.01)
