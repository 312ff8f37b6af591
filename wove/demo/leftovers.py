"""Removes what a Celery or RQ worker and its clients leave behind in somebody else's Redis.

By name, never by pattern: other people's keys are in there, perhaps millions. The queue's and the worker's
name are the demo's own, so everything found under them is.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

_CONNECT_SECONDS = 5.0
_KOMBU_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
_KOMBU_DEADLINES = "_kombu.binding_deadlines"
_RQ_REGISTRIES = ("wip", "finished", "failed", "canceled", "deferred", "scheduled")


def remove(fleet: str, url: str, queue: str, node: str) -> None:
    """Remove the queue, the worker's registration and the jobs of a fleet whose worker has ended."""
    import redis

    with redis.Redis.from_url(url, socket_connect_timeout=_CONNECT_SECONDS) as client:
        if fleet == "celery":
            _remove_celery(client, queue, node)
        else:
            _remove_rq(client, queue, node)


def _remove_celery(client: Any, queue: str, node: str) -> None:
    client.delete(*(queue + priority for priority in _KOMBU_PRIORITIES))
    client.delete(f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}")
    for tag, delivery in list(client.hscan_iter("unacked")):
        # What a killed worker had taken; kombu stores [message, exchange, routing key].
        if json.loads(delivery)[2] == queue:
            client.hdel("unacked", tag)
            client.zrem("unacked_index", tag)
    for exchange in ("celery.pidbox", "reply.celery.pidbox"):
        bindings = f"_kombu.binding.{exchange}"
        mine = [member for member in client.smembers(bindings) if node.encode() in member]
        if mine:
            client.srem(bindings, *mine)
        if not client.exists(bindings):
            client.zrem(_KOMBU_DEADLINES, exchange)


def _remove_rq(client: Any, queue: str, node: str) -> None:
    from rq import Queue
    from rq.exceptions import NoSuchJobError
    from rq.job import Job

    registries = [f"rq:{name}:{queue}" for name in _RQ_REGISTRIES]
    for registry in registries:
        for member in client.zrange(registry, 0, -1):
            # Members of the registry of started jobs are "job id:execution id".
            job_id = member.decode().split(":")[0]
            with contextlib.suppress(NoSuchJobError):
                Job.fetch(job_id, connection=client).delete()
            client.delete(f"rq:results:{job_id}")
    Queue(queue, connection=client).delete(delete_jobs=True)
    client.delete(*registries, f"rq:queue:{queue}:intermediate", f"rq:clean_registries:{queue}")
    client.delete(f"rq:workers:{queue}", f"rq:worker:{node}")
    client.srem("rq:workers", f"rq:worker:{node}")
