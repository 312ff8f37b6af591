"""The websocket executor: one socket for all runs, opened again when it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Any, ClassVar

from wove.errors import ConfigurationError, SubmitError, safe_text
from wove.exchange import ATTACH, MAX_LIST, UNKNOWN, encode_cancel, encode_note
from wove.executors.network import NetworkExecutor
from wove.executors.policy import TLS_KEYS, check_policy, client_tls, read_endpoint, read_headers
from wove.executors.settings import seconds
from wove.executors.websocket_connection import Connector, Outgoing
from wove.network_security import NetworkSecurityError
from wove.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wove.exchange import Packet
    from wove.executors.network import SentRun
    from wove.executors.websocket_connection import Connection

logger = logging.getLogger("wove.executors")

#: Seconds to open the socket, and until runs are given up whose socket cannot be opened again.
OPEN_SECONDS = 10.0
RECONNECT_SECONDS = 30.0
_BACKOFF = (0.05, 0.2, 0.5, 1.0, 2.0)
#: Commands up to this size, in bytes, may be sent without a turn of the loop.
SEND_NOW_BYTES = 16 * 1024


class WebSocketEnvironmentExecutor(NetworkExecutor):
    """Sends tasks to a worker service over one WebSocket.

    When the socket breaks it is opened again, and open runs are asked for: the service keeps them running, and
    their outcomes, for a while.

    ``executor_config``: ``url`` (``ws://``, ``wss://``, or ``unix:///path``), ``security``, ``headers``,
    ``open_timeout`` (10 s), ``reconnect_timeout`` (30 s without a socket end the open runs), ``timeout`` (30 s of
    silence mean that the socket is dead), ``max_message`` (largest result in bytes: 256 MiB), ``insecure``, and
    for TLS ``root_certificates``, ``client_certificate``, ``client_key`` (paths of PEM files).
    """

    transport = "websocket"
    config_keys: ClassVar[tuple[str, ...]] = (
        "headers", "open_timeout", "reconnect_timeout", "url", *TLS_KEYS,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._connector: Connector | None = None
        #: The last one that was opened.
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._outgoing = Outgoing()
        self._instance = ""
        self._problem = ""

    @property
    def where(self) -> str:
        """The service's address."""
        return self._endpoint.where

    async def open(self, config: Mapping[str, Any]) -> None:
        """Check the settings; see :meth:`NetworkExecutor.open`."""
        endpoint = self._endpoint = read_endpoint(config, "websocket", ("ws", "wss"))
        headers = read_headers(config)
        self._open_timeout = seconds(config, "open_timeout", OPEN_SECONDS)
        self._reconnect_timeout = seconds(config, "reconnect_timeout", RECONNECT_SECONDS)
        check_policy(config, self.security, where=self.where, secure=endpoint.secure, local=endpoint.local)
        self._connector = Connector(
            endpoint,
            self.security,
            headers=headers,
            tls=await in_thread(client_tls, config) if endpoint.secure else None,
            open_timeout=self._open_timeout,
            timeout=self.timeout,
            max_message=self.max_message,
        )
        self._outgoing = Outgoing()

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
        await super().start(
            environment_name=environment_name, environment_config=environment_config, run_config=run_config
        )
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

    async def stop(self) -> None:
        """Close the socket; see :meth:`EnvironmentExecutor.stop`."""
        keeper, self._keeper = self._keeper, None
        connector, self._connector = self._connector, None
        # From now on no command is taken.
        encoder, self._encoder = self._encoder, None
        self._outgoing.close()
        if keeper is not None:
            # A last cancellation may still wait to be written.
            for _ in range(20):
                if not self._outgoing or not self._instance:
                    break
                await asyncio.sleep(0.01)
            keeper.cancel()
            await asyncio.wait((keeper,), timeout=1.0)
        if connector is not None:
            await connector.close()
        if encoder is not None:
            encoder.close()
        self._release()
        self._outgoing.clear()

    # --- runs -------------------------------------------------------------------

    def _put(self, sent: SentRun) -> None:
        self._runs[sent.run_id] = sent
        if len(self._runs) > 1 or self._outgoing or not self._send_now(sent):
            self._outgoing.put(sent.parts, sent)

    def _send_now(self, sent: SentRun) -> bool:
        """Send the command of a run that is alone: others leave together, a turn of the loop later."""
        if self._connection is None or sent.size > SEND_NOW_BYTES:
            return False
        if not self._connection.send_now(sent.parts):
            return False
        sent.accept()
        return True

    def _take_back(self, sent: SentRun) -> bool:
        # Where it is sent again it may have been taken before.
        if sent.accepted or not self._outgoing.take_back(sent):
            return False
        self._runs.pop(sent.run_id, None)
        return True

    async def _cancel(self, sent: SentRun) -> None:
        self._outgoing.put(encode_cancel(sent.run_id))

    def _lose(self, sent: SentRun, problem: str) -> None:
        self._runs.pop(sent.run_id, None)
        if not sent.accepted:
            sent.accept(SubmitError(self._loss(sent, problem), maybe_accepted=True))
        else:
            self._report_loss(sent, problem)

    # --- the socket -------------------------------------------------------------

    async def _keep_connected(self, opened: asyncio.Future[None]) -> None:
        failures = 0
        down_since: float | None = None
        while True:
            try:
                connection = await self._connect()
                failures, down_since = 0, None
                if not opened.done():
                    opened.set_result(None)
                await connection.converse(self._outgoing, self._take)
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
                self._outgoing.clear()
            delay = _BACKOFF[min(failures, len(_BACKOFF) - 1)]
            failures += 1
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    async def _connect(self) -> Connection:
        if self._connector is None:
            raise RuntimeError("the websocket executor is stopped")
        connection = self._connection = await self._connector.connect()
        restarted = self._instance not in ("", connection.instance)
        self._instance = connection.instance
        self._ask_for_runs(restarted=restarted)
        return connection

    def _ask_for_runs(self, *, restarted: bool) -> None:
        """After a break: runs the service may have are asked for, those it never got are sent after that."""
        waiting = self._outgoing.take_unsent()
        unsent = {sent.run_id for _, sent in waiting}
        open_runs = [sent for sent in self._runs.values() if sent.run_id not in unsent]
        if restarted:
            for sent in open_runs:
                self._lose(sent, "it was restarted, and knows nothing of the run")
            open_runs = []
        ids = [sent.run_id for sent in open_runs]
        for at in range(0, len(ids), MAX_LIST):
            self._outgoing.put(encode_note(ATTACH, run_ids=ids[at : at + MAX_LIST]))
        for sent in open_runs:
            if sent.abandoned:
                self._outgoing.put(encode_cancel(sent.run_id))
        for parts, sent in waiting:
            self._outgoing.put(parts, sent)

    def _take(self, packet: Packet) -> None:
        if packet.kind == UNKNOWN:
            for run_id in packet.run_ids:
                self._send_again(run_id)
            return
        run_id = str(packet.envelope.get("run_id"))
        sent = self._runs.get(run_id)
        if packet.is_terminal:
            self._outgoing.acknowledge(run_id)
        if sent is None:
            return  # a ping, or an outcome that comes twice
        sent.parts = []
        self._take_packet(packet, sent)

    def _send_again(self, run_id: str) -> None:
        """The same service does not know the run: its command was lost with the socket."""
        sent = self._runs.get(run_id)
        if sent is None:
            return
        if sent.heard:
            self._lose(sent, "it does not know the run any more")
        else:
            self._outgoing.put(sent.parts, sent)
