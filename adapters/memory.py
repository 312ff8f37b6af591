"""The memory adapter: a test double that runs payloads in threads of this process.

Everything but the broker is real: payloads are encoded, signed and verified, and outcomes
come back through the callback server. Use it to test code that awaits work on a fleet.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from wove.adapters.base import BackendAdapter, BackendState
from wove.backend import job_id
from wove.errors import ConfigurationError, safe_text
from wove.threads import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from wove.frames import Frame

logger = logging.getLogger("wove.adapters")


class MemoryAdapter(BackendAdapter):
    """``executor_config``: ``threads`` (default 8), how many payloads run at once."""

    required_modules = ("aiohttp", "cloudpickle", "msgpack")
    install_hint = 'pip install "wove[dispatch]"'
    config_keys = ("threads",)

    _workers: DaemonPool | None = None

    async def start(self) -> None:
        """Start the threads."""
        threads = self.config.get("threads", 8)
        if type(threads) is not int or threads < 1:
            raise ConfigurationError(f'executor_config["threads"] is a whole number from 1; got {threads!r}')
        self._workers = DaemonPool(threads, f"wove-memory-{self.name}")
        self._jobs: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    async def submit(self, payload: bytes, frame: Frame) -> str:
        """Queue the payload for a thread."""
        job = job_id(frame)
        if self._workers is None:
            raise RuntimeError("the memory adapter is not started")
        with self._lock:
            self._jobs[job] = self._workers.submit(self._work, payload, job)
        return job

    async def cancel(self, run_id: str, submission: Any, frame: Frame) -> bool:
        """Take a queued payload out of the queue."""
        name = submission or job_id(frame)
        with self._lock:
            job = self._jobs.get(name)
            if job is None or not job.cancel():
                return False
            del self._jobs[name]
            return True

    async def probe(self, run_ids: Sequence[str]) -> dict[str, BackendState]:
        """Say which payloads are queued or running."""
        with self._lock:
            jobs = {run_id: self._jobs.get(run_id) for run_id in run_ids}
        return {run_id: _state(job) for run_id, job in jobs.items()}

    async def close(self) -> None:
        """Let the threads end after what they are in."""
        from wove.worker.connection import split_url
        from wove.worker.courier import retire

        if self._workers is not None:
            self._workers.close()
        # The fleet is in this very process: it need not wait for its next task.
        retire(split_url(self.callback_url)[0])

    def _work(self, payload: bytes, job: str) -> None:
        from wove.worker.execution import run

        try:
            run(payload, backend={"backend": "memory", "job": job})
        except BaseException as exc:
            # It was reported to the submitter; as any backend, this one logs it besides.
            logger.info("the task of run %s ended with %s: %s", job, type(exc).__name__, safe_text(exc, 400))
        finally:
            with self._lock:
                self._jobs.pop(job, None)


def _state(job: Future[Any] | None) -> BackendState:
    if job is None:
        return BackendState("gone")
    return BackendState("running" if job.running() else "queued")
