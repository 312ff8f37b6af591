"""The part that the network services share: credentials, the engine, the hub, the end."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

from wove.exchange import framed
from wove.network_security import NetworkExecutorSecurity
from wove.refusals import count_refusal
from wove.threads import in_thread
from wove.worker.allowed import AllowList
from wove.worker.services.engine import DEFAULT_THREADS
from wove.worker.services.hub import RETENTION_SECONDS, Hub
from wove.worker.services.processes import ChildProcesses
from wove.worker.services.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from wove.network_security import NetworkSecurityError, Seal
    from wove.worker.services.engine import Engine

logger = logging.getLogger("wove.worker")

#: Largest request, in bytes: the arguments of the runs that leave together.
MAX_REQUEST = 256 * 1024 * 1024
#: Seconds in which a run may end so that its whole answer leaves in one piece.
QUICK_SECONDS = 0.02
#: Seconds between two packets of an answer: what is silent for longer is lost.
PING_SECONDS = 5.0
#: Seconds that a run whose connection was cut goes on, where its caller does not come back for it.
CUT_SECONDS = 2.0
#: Seconds that a service which is told to end waits for what runs, and then for what it cancelled.
DRAIN_SECONDS = 30.0
CANCEL_SECONDS = 2.0
#: Seconds between two lines in the log about requests that were refused.
QUIET_SECONDS = 1.0
#: From this size, in bytes, signatures are computed in a thread.
IN_THREAD_FROM = 1024 * 1024


class Service:
    """What runs tasks for a network service; started in the event loop that serves it.

    Args:
        security: as in an environment's ``executor_config["security"]``.
        threads: synchronous tasks at once, per process.
        processes: child processes that run the tasks; 0 runs them in threads of this process.
        allow: patterns such as ``"myapp.tasks:*"``: functions by name only, and plain data; ``WOVE_ALLOW``
            where there are none.
        retention: seconds that the outcome of a run is kept for a caller who lost its connection.
        max_request: largest request, in bytes.
        name: shown in messages.

    Raises:
        ConfigurationError: unusable credentials or patterns.
    """

    def __init__(
        self,
        *,
        security: object = None,
        threads: int = DEFAULT_THREADS,
        processes: int = 0,
        allow: Iterable[str] = (),
        retention: float = RETENTION_SECONDS,
        max_request: int = MAX_REQUEST,
        name: str = "service",
    ) -> None:
        self.security = NetworkExecutorSecurity.from_config(security, source="security")
        self.max_request = max_request
        #: Tells a caller that comes back whether this is still the process it left.
        self.instance = secrets.token_hex(16)
        patterns = list(allow)
        allowed = AllowList(patterns) if patterns else AllowList.from_environment()
        self._threads = threads
        self._processes = processes
        self._allow = allowed
        self._retention = retention
        self._name = name
        self._quiet_until = 0.0
        self._refused = 0
        self._engine: Engine | None = None
        self._hub: Hub | None = None

    @property
    def hub(self) -> Hub:
        """The open runs.

        Raises:
            RuntimeError: the service was not started.
        """
        if self._hub is None:
            raise RuntimeError("the worker service is not started")
        return self._hub

    async def start(self) -> None:
        """Make ready to run tasks.

        Raises:
            ConfigurationError: the child processes do not start.
        """
        if self._processes:
            command = [sys.executable, "-m", "wove.worker.stdio", "--threads", str(self._threads)]
            for pattern in self._allow.patterns if self._allow is not None else ():
                command += ["--allow", pattern]
            children = ChildProcesses(command, name=f"worker service {self._name}", processes=self._processes)
            try:
                await children.start()
            except BaseException:
                await children.close()
                raise
            self._engine = children
        else:
            self._engine = Runner(threads=self._threads, allow=self._allow, backend=self._name)
        self._hub = Hub(self._engine, retention=self._retention)

    async def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Take no more runs; wait for the open ones, cancel those that take longer."""
        if self._hub is None or await self._hub.drain(seconds):
            return
        logger.warning("%d runs are cancelled: they take longer than %g s", len(self._hub), seconds)
        self._hub.cancel_all()
        await self._hub.drain(CANCEL_SECONDS)

    async def stop(self) -> None:
        """Cancel what runs and release everything. Idempotent."""
        engine, self._engine = self._engine, None
        if self._hub is not None:
            self._hub.cancel_all()
            self._hub.close()
        if engine is not None:
            await engine.close()

    def refuse(self, exc: NetworkSecurityError, peer: str) -> None:
        """Say in the log that somebody was not let in; a flood of them does not flood the log."""
        if exc.clock:
            logger.info("a request from %s: %s; it was told the time", peer, exc)
            return
        count_refusal("command:401")
        now = time.monotonic()
        if now < self._quiet_until:
            self._refused += 1
            return
        also = f" (and {self._refused} more since the last of these lines)" if self._refused else ""
        self._quiet_until, self._refused = now + QUIET_SECONDS, 0
        logger.warning("a request from %s was refused: %s%s", peer, exc, also)

    def status(self) -> dict[str, Any]:
        """Return what ``/healthz`` tells: no secret, and nothing of any run."""
        hub = self.hub
        return {"status": "draining" if hub.draining else "ok", "open": len(hub), "finished": hub.finished}


async def maybe_in_thread(size: int, func: Any, *args: Any) -> Any:
    """Call ``func``, in a thread when ``size`` bytes would hold up the loop."""
    if size < IN_THREAD_FROM:
        return func(*args)
    return await in_thread(func, *args)


async def sealed(packets: list[Sequence[Buffer]], seal: Seal) -> list[Buffer]:
    """Return packets as they stand on a stream, each with its signature."""
    pieces: list[Buffer] = []
    for parts in packets:
        size = sum(memoryview(part).nbytes for part in parts)
        pieces += framed(parts, await maybe_in_thread(size, seal.tag, parts))
    return pieces
