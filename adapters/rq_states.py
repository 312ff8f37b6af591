"""What RQ's jobs and workers are doing, as Redis knows it."""

from __future__ import annotations

import base64
import zlib
from typing import Any

from wove.adapters.base import BackendState
from wove.errors import cut

_STATES = {
    "queued": "queued",
    "deferred": "queued",
    "scheduled": "queued",
    "created": "queued",
    "started": "running",
    "finished": "done",
    "failed": "failed",
    "stopped": "failed",
    "canceled": "failed",
}


#: Said of a worker that does not find Wove's job function.
WITHOUT_WOVE = "Wove is not installed where the worker runs"
#: Bytes of a failed job's traceback that are read at most.
MAX_REASON = 64 * 1024


def state_of(
    status: str, worker: str, alive: bool | None, parked: bytes | None, reason: str = ""
) -> BackendState:
    """Say what a job's status means, given whether the worker named in it lives.

    ``reason`` is why it has failed, in RQ's own words.
    """
    if not status:
        return BackendState("gone", "RQ has no such job", parked)
    detail = f"RQ's job is {status}" + (f": {reason}" if reason else "")
    if status != "started":
        return BackendState(_STATES.get(status, "unknown"), detail, parked)
    if alive is None:
        return BackendState("unknown", f"{detail}, whether its worker {worker} lives is not known", parked)
    if alive:
        return BackendState("running", f"{detail}, its worker {worker} is there", parked)
    return BackendState("lost", f"{detail}, and its worker {worker} has left Redis", parked)


def reasons(connection: Any, jobs: list[str]) -> dict[str, str]:
    """Return why jobs have failed, as far as RQ says: the last line of each."""
    from redis.exceptions import RedisError
    from rq.results import Result

    found: dict[str, str] = {}
    key_of: Any = Result.get_key
    try:
        with connection.pipeline(transaction=False) as pipeline:
            for job in jobs:
                pipeline.xrevrange(key_of(job), count=1)
            # What it returned is left alone: that would be unpickled.
            for job, entries in zip(jobs, pipeline.execute(), strict=True):
                for _, entry in entries:
                    found[job] = _last_line(entry.get(b"exc_string") or entry.get("exc_string") or b"")
    except (RedisError, ValueError, zlib.error):
        pass  # the status alone has to do
    return found


def _last_line(packed: bytes | str) -> str:
    text = zlib.decompressobj().decompress(base64.b64decode(packed), MAX_REASON) if packed else b""
    lines = text.decode("utf-8", "replace").strip().splitlines()
    last = cut(lines[-1].strip(), 500) if lines else ""
    if "Invalid attribute name: wove." in last or "No module named 'wove" in last:
        last += f'; {WITHOUT_WOVE}: pip install "wove[worker]" there'
    return last


def living(connection: Any, workers: set[str]) -> dict[str, bool]:
    """Return for each worker of which it is known whether it lives.

    RQ itself learns of a killed worker after minutes. Redis knows at once: a worker listens for
    commands on a channel of its own as long as it lives, also after it had to connect again.
    """
    from redis.exceptions import RedisError
    from rq.command import PUBSUB_CHANNEL_TEMPLATE
    from rq.worker import BaseWorker

    known: dict[str, bool] = {}
    try:
        channels = {PUBSUB_CHANNEL_TEMPLATE % worker: worker for worker in workers}
        listening = {as_str(name) for name, count in connection.pubsub_numsub(*channels) if count}
        known = {worker: True for channel, worker in channels.items() if channel in listening}
        missing = sorted(workers - known.keys())
        if missing:
            connected = {client.get("name") for client in connection.client_list()}
            now, _ = connection.time()
            began = now - int(connection.info("server")["uptime_in_seconds"])
            with connection.pipeline(transaction=False) as pipeline:
                for worker in missing:
                    pipeline.hget(BaseWorker.redis_worker_namespace_prefix + worker, "birth")
                births = dict(zip(missing, pipeline.execute(), strict=True))
            for worker, birth in births.items():
                if worker in connected:
                    known[worker] = True
                # A worker that is older than this Redis server may be about to connect to it.
                elif _is_after(birth, began):
                    known[worker] = False
    except (RedisError, KeyError, ValueError):
        pass  # not allowed here, or a proxy in between: not known
    return known


def as_str(value: Any) -> str:
    """Return what Redis answered as text; "" for nothing."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _is_after(birth: Any, moment: float) -> bool:
    from rq.utils import utcparse

    try:
        return bool(utcparse(as_str(birth)).timestamp() > moment)
    except (ValueError, TypeError):
        return False
