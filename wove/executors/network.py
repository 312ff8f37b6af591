"""What the http, grpc and websocket executors share: settings, and the way of a command to a service elsewhere."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from wove import frames
from wove.exchange import lost_frame
from wove.executors.base import EnvironmentExecutor, FrameChannel
from wove.executors.events import CommandEncoder, EventDecoder
from wove.executors.settings import check_keys, seconds, whole_number
from wove.network_security import NetworkExecutorSecurity
from wove.threads import in_thread
from wove.wire import require_msgpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer

    from wove.exchange import Packet
    from wove.frames import Frame

#: ``executor_config`` keys that all network executors share.
NETWORK_KEYS = ("insecure", "max_message", "security", "timeout")
#: Largest packet that is taken from a service, in bytes, unless ``max_message`` says otherwise.
MAX_MESSAGE = 256 * 1024 * 1024
#: Room in a packet beside the user's values.
ENVELOPE_ALLOWANCE = 1024 * 1024
#: Seconds to connect, to get a first answer, and of silence on an open answer.
TIMEOUT_SECONDS = 30.0
#: An open answer may be silent for so long whatever ``timeout`` says: services ping every 5 seconds.
SILENCE_SECONDS = 15.0


class SentRun:
    """A run on its way."""

    __slots__ = (
        "_done", "abandoned", "accepted", "carrier", "ended", "heard", "parts", "run_id", "seq", "size", "task_id",
    )  # fmt: skip

    def __init__(self, frame: Frame, parts: list[Buffer], done: Callable[[Exception | None], None]) -> None:
        self.run_id: str = frame["run_id"]
        self.task_id: str = frame["task_id"]
        #: Kept as long as it may have to be sent again.
        self.parts = parts
        self.size = sum(memoryview(part).nbytes for part in parts)
        #: Whether it was said what became of the submission.
        self.accepted = False
        self._done = done
        #: What it is under way by: the task of its request, or a transport's own.
        self.carrier: object = None
        #: Whether the service has spoken of it.
        self.heard = False
        self.ended = False
        self.abandoned = False
        self.seq = 1

    def accept(self, problem: Exception | None = None) -> None:
        """Say, once, that the service has taken it, or why not."""
        if not self.accepted:
            self.accepted = True
            self._done(problem)


class NetworkExecutor(EnvironmentExecutor):
    """Sends commands to a worker service as packets, and takes its events; how, each transport knows."""

    default_heartbeat_seconds = 15.0
    #: The executor's name, for messages.
    transport: ClassVar[str]
    #: Its own ``executor_config`` keys.
    config_keys: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._channel: FrameChannel | None = None
        self._decoder: EventDecoder | None = None
        self._encoder: CommandEncoder | None = None
        #: Runs that have no outcome yet.
        self._runs: dict[str, SentRun] = {}

    # --- a transport implements -------------------------------------------------

    @abstractmethod
    async def open(self, config: Mapping[str, Any]) -> None:
        """Check the settings and make ready to send."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The service's address, for messages."""

    @abstractmethod
    def _put(self, sent: SentRun) -> None:
        """Send a run, at once or a turn of the loop later."""

    @abstractmethod
    def _take_back(self, sent: SentRun) -> bool:
        """Forget a run that has not left yet."""

    @abstractmethod
    async def _cancel(self, sent: SentRun) -> None:
        """Tell the service that a run which has left is not wanted any more."""

    # --- the contract -----------------------------------------------------------

    async def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any],
    ) -> None:
        """Check the settings; see :meth:`EnvironmentExecutor.start`. The service may come later."""
        require_msgpack()
        check_keys(environment_name, environment_config, (*NETWORK_KEYS, *self.config_keys))
        self.timeout = seconds(environment_config, "timeout", TIMEOUT_SECONDS)
        self.max_message = whole_number(environment_config, "max_message", MAX_MESSAGE) or MAX_MESSAGE
        # In a thread: this may read files.
        security: NetworkExecutorSecurity = await in_thread(
            NetworkExecutorSecurity.from_config, environment_config.get("security")
        )
        self.security = security
        await self.open(environment_config)
        channel = FrameChannel()
        self._channel = channel
        self._decoder = EventDecoder(channel.put, environment_name)
        self._encoder = CommandEncoder(environment_name)
        self._loop = asyncio.get_running_loop()

    async def send(self, frame: Frame) -> None:
        """Take a command; see :meth:`EnvironmentExecutor.send`."""
        if self._encoder is None:
            raise RuntimeError(f"the {self.transport} executor is not started")
        if frame["type"] == frames.RUN_TASK:
            await self._submit(self._limited(frame), self._encoder)
        elif frame["type"] == frames.CANCEL_TASK:
            sent = self._runs.get(frame["run_id"])
            if sent is not None:
                sent.abandoned = True
                if not self._take_back(sent):
                    await self._cancel(sent)

    def post(self, frame: Frame, done: Callable[[BaseException | None], None]) -> bool:
        """Take a command that is encoded at once; see :meth:`EnvironmentExecutor.post`."""
        if self._encoder is None:
            return False
        frame = self._limited(frame)
        parts = self._encoder.encode_light(frame)
        if parts is None:
            return False
        self._put(SentRun(frame, parts, done))
        return True

    def attach(self, take: Callable[[Frame], None]) -> bool:
        """Hand events over; see :meth:`EnvironmentExecutor.attach`."""
        return self._channel is not None and self._channel.attach(take)

    async def recv(self) -> Frame:
        """Return the next event; see :meth:`EnvironmentExecutor.recv`."""
        if self._channel is None:
            raise RuntimeError(f"the {self.transport} executor is not started")
        return await self._channel.get()

    # --- what transports make use of ----------------------------------------------

    async def _submit(self, frame: Frame, encoder: CommandEncoder) -> None:
        parts = await encoder.encode(frame)
        accepted: asyncio.Future[None] = self._loop.create_future()
        sent = SentRun(frame, parts, partial(_resolve, accepted))
        self._put(sent)
        try:
            await accepted
        except asyncio.CancelledError:
            sent.abandoned = True
            self._take_back(sent)
            raise

    def _limited(self, frame: Frame) -> Frame:
        return {**frame, "max_body": self.max_message - ENVELOPE_ALLOWANCE}

    def _take_packet(self, packet: Packet, sent: SentRun) -> None:
        """Hand on what was verified."""
        if sent.ended or self._decoder is None:
            return
        sent.heard = True
        if packet.is_terminal:
            sent.ended = True
            self._runs.pop(sent.run_id, None)
        seq = packet.envelope.get("seq")
        sent.seq = seq if isinstance(seq, int) else sent.seq
        self._decoder.take_packet(packet)

    def _loss(self, sent: SentRun, problem: str) -> str:
        """Say that a run is lost, and why."""
        return f"run {sent.run_id} of {sent.task_id}: the {self.transport} service at {self.where} is lost: {problem}"

    def _report_loss(self, sent: SentRun, problem: str) -> None:
        """Hand on that a run is lost which the service had, or may have had."""
        if self._channel is not None:
            message = self._loss(sent, problem)
            self._channel.put([lost_frame(sent.run_id, sent.task_id, message, seq=sent.seq + 1)])

    def _release(self) -> None:
        """Take no more commands and hand on no more events."""
        if self._encoder is not None:
            self._encoder.close()
        if self._decoder is not None:
            self._decoder.close()
        if self._channel is not None:
            self._channel.close()
        self._runs.clear()


def _resolve(future: asyncio.Future[None], exc: Exception | None) -> None:
    """Settle a future that somebody may have given up."""
    if future.done():
        return
    if exc is None:
        future.set_result(None)
    else:
        future.set_exception(exc)
