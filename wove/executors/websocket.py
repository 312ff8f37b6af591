"""The websocket executor: one socket for all runs, opened again when it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from wove import frames
from wove.eager import run_now
from wove.errors import ConfigurationError, ProtocolError, SubmitError, safe_text
from wove.exchange import (
    ACK,
    ATTACH,
    HELLO,
    MAX_LIST,
    PING,
    UNKNOWN,
    Packet,
    PacketReader,
    chunked,
    encode_cancel,
    encode_note,
    framed,
    lost_frame,
)
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.events import CommandEncoder, EventDecoder
from wove.executors.http import explain, require_aiohttp
from wove.executors.network import (
    ENVELOPE_ALLOWANCE,
    MAX_MESSAGE,
    NETWORK_KEYS,
    SILENCE_SECONDS,
    TIMEOUT_SECONDS,
    resolve,
)
from wove.executors.policy import TLS_KEYS, check_policy, client_tls, read_endpoint, read_headers
from wove.executors.settings import check_keys, seconds, whole_number
from wove.network_security import NetworkExecutorSecurity, NetworkSecurityError, Seal, channel_key
from wove.threads import in_thread
from wove.wire import require_msgpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import ClientSession, ClientWebSocketResponse
    from typing_extensions import Buffer

    from wove.frames import Frame

logger = logging.getLogger("wove.executors")

#: Seconds to open the socket, and until runs are given up whose socket cannot be opened again.
OPEN_SECONDS = 10.0
RECONNECT_SECONDS = 30.0
_BACKOFF = (0.05, 0.2, 0.5, 1.0, 2.0)
#: Seconds between two signs of life of ours, and that acknowledgements wait for company.
PING_SECONDS = 10.0
ACK_SECONDS = 0.05
#: Looks, within the silence that is allowed, whether anything has come.
SILENCE_LOOKS = 4
CHUNK = 512 * 1024
#: Commands up to this size, in bytes, may be sent without a turn of the loop.
SEND_NOW_BYTES = 16 * 1024


class _Sent:
    """A run that has no outcome yet."""

    __slots__ = ("_done", "abandoned", "accepted", "heard", "parts", "run_id", "seq", "size", "task_id")

    def __init__(self, frame: Frame, parts: list[Buffer], done: Callable[[Exception | None], None]) -> None:
        self.run_id: str = frame["run_id"]
        self.task_id: str = frame["task_id"]
        #: Kept until the service has spoken of the run: it may have to be sent again.
        self.parts = parts
        self.size = sum(memoryview(part).nbytes for part in parts)
        #: Whether it was said what became of the submission.
        self.accepted = False
        self._done = done
        self.heard = False
        self.abandoned = False
        self.seq = 1

    def accept(self, problem: Exception | None = None) -> None:
        """Say, once, that it is on its way, or why not."""
        if not self.accepted:
            self.accepted = True
            self._done(problem)


class WebSocketEnvironmentExecutor(EnvironmentExecutor):
    """Sends tasks to a worker service over one WebSocket.

    When the socket breaks it is opened again, and open runs are asked for: the service keeps them running, and
    their outcomes, for a while.

    ``executor_config``: ``url`` (``ws://``, ``wss://``, or ``unix:///path``), ``security``, ``headers``,
    ``open_timeout`` (10 s), ``reconnect_timeout`` (30 s without a socket end the open runs), ``timeout`` (30 s of
    silence mean that the socket is dead), ``max_message`` (largest result in bytes: 256 MiB), ``insecure``, and
    for TLS ``root_certificates``, ``client_certificate``, ``client_key`` (paths of PEM files).
    """

    default_heartbeat_seconds = 15.0
    config_keys: ClassVar[tuple[str, ...]] = (
        "headers", "open_timeout", "reconnect_timeout", "url", *NETWORK_KEYS, *TLS_KEYS,
    )  # fmt: skip

    def __init__(self) -> None:
        self._channel: FrameChannel | None = None
        self._decoder: EventDecoder | None = None
        self._encoder: CommandEncoder | None = None
        self._session: ClientSession | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._runs: dict[str, _Sent] = {}
        #: What is to be written: packets, with the run that each submits.
        self._outbox: list[tuple[list[Buffer], _Sent | None]] = []
        self._acks: list[str] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._instance = ""
        self._problem = ""
        #: Whether anything has come since somebody last looked.
        self._heard = True
        #: The socket that stands, and what signs what goes up.
        self._open: tuple[ClientWebSocketResponse, Seal] | None = None
        #: Whether something is under way there, of which not all was written yet.
        self._in_between = False

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Check the settings and open the socket; see :meth:`EnvironmentExecutor.start`.

        Raises:
            ConnectionError: the service cannot be reached.
        """
        require_msgpack()
        config = environment_config
        check_keys(environment_name, config, self.config_keys)
        self._loop = asyncio.get_running_loop()
        self._endpoint = read_endpoint(config, "websocket", ("ws", "wss"))
        self._headers = read_headers(config)
        self._timeout = seconds(config, "timeout", TIMEOUT_SECONDS)
        self._open_timeout = seconds(config, "open_timeout", OPEN_SECONDS)
        self._reconnect_timeout = seconds(config, "reconnect_timeout", RECONNECT_SECONDS)
        self._max_message = whole_number(config, "max_message", MAX_MESSAGE) or MAX_MESSAGE
        self._security = await in_thread(NetworkExecutorSecurity.from_config, config.get("security"))
        endpoint = self._endpoint
        check_policy(config, self._security, where=self.where, secure=endpoint.secure, local=endpoint.local)
        self._aiohttp = require_aiohttp()
        tls = await in_thread(client_tls, config) if endpoint.secure else None
        if endpoint.socket_path is not None:
            connector = self._aiohttp.UnixConnector(endpoint.socket_path)
        else:
            connector = self._aiohttp.TCPConnector(ssl=tls if tls is not None else True)
        self._session = self._aiohttp.ClientSession(
            connector=connector, trust_env=False, cookie_jar=self._aiohttp.DummyCookieJar()
        )
        channel = FrameChannel()
        self._channel = channel
        self._decoder = EventDecoder(channel.put, environment_name)
        self._encoder = CommandEncoder(environment_name)
        self._wake = asyncio.Event()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._keeper = self._loop.create_task(self._keep_connected(opened), name="wove-websocket")
        try:
            async with asyncio.timeout(self._open_timeout):
                await opened
        except TimeoutError:
            raise ConnectionError(
                f"the websocket service at {self.where} did not answer within open_timeout={self._open_timeout:g} s"
                + (f" ({self._problem})" if self._problem else "")
            ) from None

    @property
    def where(self) -> str:
        """The service's address."""
        return self._endpoint.socket_path or self._endpoint.url

    async def send(self, frame: Frame) -> None:
        """Take a command; see :meth:`EnvironmentExecutor.send`."""
        if self._keeper is None or self._encoder is None:
            raise RuntimeError("the websocket executor is not started")
        if frame["type"] == frames.RUN_TASK:
            await self._submit({**frame, "max_body": self._max_message - ENVELOPE_ALLOWANCE}, self._encoder)
        elif frame["type"] == frames.CANCEL_TASK:
            sent = self._runs.get(frame["run_id"])
            if sent is not None:
                sent.abandoned = True
                if self._take_back(sent):
                    return
                self._write(encode_cancel(sent.run_id))

    def post(self, frame: Frame, done: Callable[[BaseException | None], None]) -> bool:
        """Take a command that is encoded at once; see :meth:`EnvironmentExecutor.post`."""
        if self._keeper is None or self._encoder is None:
            return False
        frame = {**frame, "max_body": self._max_message - ENVELOPE_ALLOWANCE}
        parts = self._encoder.encode_light(frame)
        if parts is None:
            return False
        self._put(_Sent(frame, parts, done))
        return True

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand events over; see :meth:`EnvironmentExecutor.attach`."""
        return self._channel is not None and self._channel.attach(take)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        if self._channel is None:
            raise RuntimeError("the websocket executor is not started")
        return await self._channel.get()

    async def stop(self) -> None:
        """Close the socket; see :meth:`EnvironmentExecutor.stop`."""
        keeper, self._keeper = self._keeper, None
        session, self._session = self._session, None
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        if keeper is not None:
            # A last cancellation may still wait to be written.
            for _ in range(20):
                if not self._outbox or not self._instance:
                    break
                await asyncio.sleep(0.01)
            keeper.cancel()
            await asyncio.wait((keeper,), timeout=1.0)
        if session is not None:
            await session.close()
        if self._encoder is not None:
            self._encoder.close()
        if self._decoder is not None:
            self._decoder.close()
        if self._channel is not None:
            self._channel.close()
        self._runs.clear()
        self._outbox.clear()

    # --- runs -------------------------------------------------------------------

    async def _submit(self, frame: Frame, encoder: CommandEncoder) -> None:
        parts = await encoder.encode(frame)
        accepted: asyncio.Future[None] = self._loop.create_future()
        sent = _Sent(frame, parts, partial(resolve, accepted))
        self._put(sent)
        try:
            await accepted
        except asyncio.CancelledError:
            sent.abandoned = True
            self._take_back(sent)
            raise

    def _put(self, sent: _Sent) -> None:
        self._runs[sent.run_id] = sent
        if len(self._runs) > 1 or self._outbox or not self._send_now(sent):
            self._write(sent.parts, sent)

    def _send_now(self, sent: _Sent) -> bool:
        """Send the command of a run that is alone: others leave together, a turn of the loop later."""
        if self._open is None or self._in_between or sent.size > SEND_NOW_BYTES:
            return False
        socket, seal = self._open
        chunk = b"".join(framed(sent.parts))
        try:
            run_now(socket.send_bytes(seal.tag([chunk]) + chunk), self._loop)
        except Exception:
            return False  # the socket is closing; the next one is given it
        sent.accept()
        return True

    def _take_back(self, sent: _Sent) -> bool:
        """Forget a run that has not left yet."""
        if sent.accepted:
            return False  # where it is sent again it may have been taken before
        waiting = next((entry for entry in self._outbox if entry[1] is sent), None)
        if waiting is None:
            return False
        self._outbox.remove(waiting)
        self._runs.pop(sent.run_id, None)
        return True

    def _write(self, parts: list[Buffer], sent: _Sent | None = None) -> None:
        self._outbox.append((parts, sent))
        self._wake.set()

    def _lose(self, sent: _Sent, problem: str) -> None:
        self._runs.pop(sent.run_id, None)
        message = (
            f"run {sent.run_id} of {sent.task_id}: the websocket service at {self.where} is lost: {problem}"
        )
        if not sent.accepted:
            sent.accept(SubmitError(message, maybe_accepted=True))
        elif self._channel is not None:
            self._channel.put([lost_frame(sent.run_id, sent.task_id, message, seq=sent.seq + 1)])

    # --- the socket -------------------------------------------------------------

    async def _keep_connected(self, opened: asyncio.Future[None]) -> None:
        failures = 0
        down_since: float | None = None
        while True:
            try:
                socket, seals = await self._connect()
                failures, down_since = 0, None
                if not opened.done():
                    opened.set_result(None)
                await self._converse(socket, *seals)
            except (ConfigurationError, NetworkSecurityError) as exc:
                self._problem = str(exc)
                if not opened.done():
                    opened.set_exception(exc)
                    return
            except Exception as exc:
                self._problem = safe_text(exc, 500) or type(exc).__name__
            now = self._loop.time()
            down_since = down_since or now
            logger.info("the websocket to %s is down: %s", self.where, self._problem)
            if now - down_since > self._reconnect_timeout:
                for sent in list(self._runs.values()):
                    self._lose(sent, f"no connection for {now - down_since:.0f} s ({self._problem})")
                self._outbox.clear()
            delay = _BACKOFF[min(failures, len(_BACKOFF) - 1)]
            failures += 1
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    async def _connect(self) -> tuple[ClientWebSocketResponse, tuple[Seal, Seal]]:
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
                    return socket, await self._greet(socket, self._security.answer_key(signed))
            except aiohttp.WSServerHandshakeError as exc:
                if exc.status != 401:
                    raise ConnectionError(f"it answered {exc.status} and is no worker service") from exc
                if not self._security.learn_clock(signed, exc.headers or {}):
                    raise NetworkSecurityError(
                        f"the websocket service at {self.where} does not accept this side's credentials "
                        f"({self._security.source}): give both sides the same secret; the service's log says what is wrong"
                    ) from None
            except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                raise ConnectionError(explain(exc, self._open_timeout)) from exc
        raise ConnectionError("it answered twice that the request's clock is wrong")

    async def _greet(self, socket: ClientWebSocketResponse, key: bytes | None) -> tuple[Seal, Seal]:
        message = await socket.receive()
        if message.type is not self._aiohttp.WSMsgType.BINARY:
            raise ProtocolError("it is no worker service: it did not say hello")
        packet = Packet(Seal(key, "hello").open(memoryview(message.data)))
        nonce, instance = packet.envelope.get("nonce"), packet.envelope.get("instance")
        if packet.kind != HELLO or type(nonce) is not str or type(instance) is not str:
            raise ProtocolError("it is no worker service: it did not say hello")
        restarted = self._instance not in ("", instance)
        self._instance = instance
        self._ask_for_runs(restarted=restarted)
        channel = channel_key(key, nonce.encode())
        return Seal(channel, "up"), Seal(channel, "down")

    def _ask_for_runs(self, *, restarted: bool) -> None:
        """After a break: runs the service may have are asked for, those it never got stay in the outbox."""
        waiting = [(parts, sent) for parts, sent in self._outbox if sent is not None and not sent.accepted]
        self._outbox = []
        unsent = {sent.run_id for _, sent in waiting}
        open_runs = [sent for sent in self._runs.values() if sent.run_id not in unsent]
        if restarted:
            for sent in open_runs:
                self._lose(sent, "it was restarted, and knows nothing of the run")
            open_runs = []
        ids = [sent.run_id for sent in open_runs]
        for at in range(0, len(ids), MAX_LIST):
            self._write(encode_note(ATTACH, run_ids=ids[at : at + MAX_LIST]))
        for sent in open_runs:
            if sent.abandoned:
                self._write(encode_cancel(sent.run_id))
        self._outbox += waiting
        self._wake.set()

    async def _converse(self, socket: ClientWebSocketResponse, up: Seal, down: Seal) -> None:
        descriptor = socket.get_extra_info("socket")
        reading = asyncio.ensure_future(self._read(socket, down))
        writing = asyncio.ensure_future(self._write_all(socket, up))
        pinging = asyncio.ensure_future(self._ping())
        listening = asyncio.ensure_future(self._until_silent())
        tasks = (reading, writing, listening, pinging)
        self._open, self._in_between = (socket, up), False
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open = None
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await socket.close()
            await _until_closed(descriptor)
        for task in tasks:
            if not task.cancelled() and (exc := task.exception()) is not None:
                raise exc

    async def _ping(self) -> None:
        """Say now and then that this side is there, whatever else is said: a timer for each write costs more."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            self._write(encode_note(PING))

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

    async def _write_all(self, socket: ClientWebSocketResponse, seal: Seal) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            acks, self._acks = self._acks, []
            for at in range(0, len(acks), MAX_LIST):
                self._outbox.append((encode_note(ACK, run_ids=acks[at : at + MAX_LIST]), None))
            outbox, self._outbox = self._outbox, []
            pieces: list[Buffer] = []
            for parts, sent in outbox:
                pieces += framed(parts)
                # From here on the service may have it: after a break it is asked.
                if sent is not None:
                    sent.accept()
            self._in_between = True
            for chunk in chunked(pieces, CHUNK):
                await socket.send_bytes(b"".join([seal.tag([chunk]), chunk]))
            self._in_between = False

    async def _read(self, socket: ClientWebSocketResponse, seal: Seal) -> None:
        reader = PacketReader(self._max_message)
        while True:
            message = await socket.receive()
            self._heard = True
            if message.type is not self._aiohttp.WSMsgType.BINARY:
                raise ConnectionError(f"the socket was closed ({socket.close_code})")
            for raw in reader.feed(seal.open(memoryview(message.data))):
                self._take(Packet(raw))

    def _take(self, packet: Packet) -> None:
        if packet.kind == UNKNOWN:
            for run_id in packet.run_ids:
                self._send_again(run_id)
            return
        run_id = str(packet.envelope.get("run_id"))
        sent = self._runs.get(run_id)
        if packet.is_terminal:
            self._acknowledge(run_id)
        if sent is None or self._decoder is None:
            return  # a ping, or an outcome that comes twice
        sent.heard = True
        sent.parts = []
        seq = packet.envelope.get("seq")
        sent.seq = seq if isinstance(seq, int) else sent.seq
        if packet.is_terminal:
            del self._runs[run_id]
        self._decoder.take_packet(packet)

    def _send_again(self, run_id: str) -> None:
        """The same service does not know the run: its command was lost with the socket."""
        sent = self._runs.get(run_id)
        if sent is None:
            return
        if sent.heard:
            self._lose(sent, "it does not know the run any more")
        else:
            self._write(sent.parts, sent)

    def _acknowledge(self, run_id: str) -> None:
        if frames.is_run_id(run_id):
            self._acks.append(run_id)
            if self._ack_timer is None:
                self._ack_timer = self._loop.call_later(ACK_SECONDS, self._send_acks)

    def _send_acks(self) -> None:
        self._ack_timer = None
        self._wake.set()


async def _until_closed(descriptor: Any) -> None:
    """Wait for TLS to say goodbye, too: whoever stops the executor may close the event loop next."""
    for _ in range(50):
        if descriptor is None or descriptor.fileno() == -1:
            return
        await asyncio.sleep(0.01)
