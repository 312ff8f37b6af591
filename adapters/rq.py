"""The RQ adapter: payloads travel as jobs of the function ``wove.worker.rq.run``."""

from __future__ import annotations

import math
import pkgutil
from typing import TYPE_CHECKING, Any

from wove.adapters.base import BackendAdapter
from wove.adapters.rq_sharing import SHARED_FUNCTION, AnswerLost, SharedJobs, Ticket
from wove.adapters.rq_states import as_str, living, reasons, state_of
from wove.backend import as_text, is_repeated, job_id, summarize_call
from wove.errors import ConfigurationError, SubmitError
from wove.security import scrub, without_passwords
from wove.wire import PARKED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from wove.adapters.base import BackendState
    from wove.frames import Frame

#: The job function, by name: the submitter need not import the worker side.
WORKER_MODULE = "wove.worker.rq"
JOB_FUNCTION = f"{WORKER_MODULE}.run"
STOPPED_FUNCTION = f"{WORKER_MODULE}.on_stopped"
#: Seconds that a failed job can be looked at in RQ before it is gone; RQ's default is a year.
FAILURE_TTL = 300
#: Seconds that a client made here waits for Redis before a submission fails.
REDIS_TIMEOUT = 5.0
#: Seconds that RQ's worker waits for the callback server to take its webhook.
WEBHOOK_TIMEOUT = 4


class _Imported:
    """Unpickled, it is the name of a module that is imported then: RQ's workers read a job's ``meta`` before they fork."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pkgutil.resolve_name, (f"{WORKER_MODULE}:__name__",)


_DELETE_QUEUED = """
if redis.call('lrem', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('del', KEYS[2])
return 1
"""


class RqAdapter(BackendAdapter):
    """Submits to RQ workers, which need nothing but the package ``wove[worker]``.

    ``executor_config``: ``queue`` (an ``rq.Queue``) or ``redis_url`` and ``queue_name``
    (``"default"``); ``enqueue_options`` (``job_timeout``, ``failure_ttl``, ``meta``, ...),
    ``stop_on_cancel``.

    Runs with equal ``delivery_idempotency_key`` share one job, also those of different
    processes whose environments have the same name and queue; see :mod:`wove.adapters.rq_sharing`.
    """

    required_modules = ("rq", "redis", "aiohttp", "cloudpickle", "msgpack")
    install_hint = 'pip install "wove[rq]"'
    submits_blocking = True
    takes_failure_webhook = True
    config_keys = ("enqueue_options", "queue", "queue_name", "redis_url", "stop_on_cancel")

    async def start(self) -> None:
        """Find or make the queue."""
        config = self.config
        has_queue = config.get("queue") is not None  # an empty rq.Queue is falsy
        if has_queue == bool(config.get("redis_url")):
            both = " and not both" if has_queue else ""
            raise ConfigurationError(
                'the rq executor needs either executor_config["queue"] (an rq.Queue) or '
                f'executor_config["redis_url"], for example "redis://localhost:6379/0"{both}'
            )
        options = config.get("enqueue_options") or {}
        if not hasattr(options, "items"):
            raise ConfigurationError('executor_config["enqueue_options"] is a mapping')
        self._options = dict(options)
        self.stops_running = bool(config.get("stop_on_cancel"))
        self._queue = await self.blocking(self._find_queue)
        self._webhook = _webhook_class()
        self._shared = SharedJobs(self._queue, self.name, self._probe)

    def _find_queue(self) -> Any:
        from rq import Queue
        from rq.serializers import DefaultSerializer

        queue = self.config.get("queue")
        if queue is None:
            from redis import Redis

            try:
                self._owned = Redis.from_url(
                    self.config["redis_url"],
                    socket_timeout=REDIS_TIMEOUT,
                    socket_connect_timeout=REDIS_TIMEOUT,
                )
            except (ValueError, AttributeError):
                # Not the library's words: they may repeat the password.
                raise ConfigurationError(
                    'executor_config["redis_url"] is no Redis URL; one reads redis://:password@host:6379/0, with '
                    "special characters of the password percent-encoded"
                ) from None
            queue = Queue(self.config.get("queue_name") or "default", connection=self._owned)
        elif self.config.get("queue_name") is not None:
            raise ConfigurationError('executor_config: "queue_name" goes with "redis_url", not with "queue"')
        if not isinstance(queue, Queue):
            raise ConfigurationError(f'executor_config["queue"] is an rq.Queue, not {type(queue).__name__}')
        self._binary = _carries_bytes(queue.serializer)
        # Only pickles carry it, and what users have in a job's meta stays readable where Wove is not installed.
        if queue.serializer is DefaultSerializer:
            self._options.setdefault("meta", {"wove": _Imported()})
        return queue

    async def submit(self, payload: bytes, frame: Frame) -> str:
        """Enqueue one job."""
        return str(await self.submit_alone(payload, frame))

    async def submit_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Enqueue jobs in one pipeline, in one round trip."""
        results: list[Any] = await self.blocking(self.submit_blocking, batch)
        return results

    def submit_blocking(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        """Enqueue jobs in one pipeline, in one round trip."""
        ways = [self._way(frame) for _, frame in batch]
        together = iter(
            self._enqueue_many([item for item, way in zip(batch, ways, strict=True) if way is None])
        )
        return [next(together) if way is None else way(*item) for item, way in zip(batch, ways, strict=True)]

    def _way(self, frame: Frame) -> Callable[[bytes, Frame], Any] | None:
        """Return how a job is enqueued that does not go with others."""
        if _key(frame):
            return self._share
        return self._repeat if is_repeated(frame) else None

    def _share(self, payload: bytes, frame: Frame) -> Any:
        """Enqueue a job that others may share, or share theirs."""
        try:
            return self._shared.submit(self._job(payload, frame), payload, frame)
        except (ConfigurationError, SubmitError) as exc:
            return exc
        except AnswerLost as exc:
            return self._submit_error(exc.error, exc.ticket)
        except Exception as exc:
            return self._submit_error(exc)

    def _repeat(self, payload: bytes, frame: Frame) -> Any:
        """Enqueue a job that may be there already."""
        from redis import WatchError
        from rq.job import Job

        job = job_id(frame)
        try:
            data = self._job(payload, frame)
            with self._queue.connection.pipeline() as pipeline:
                while True:
                    pipeline.watch(Job.key_for(job))
                    if pipeline.exists(Job.key_for(job)):
                        return job
                    pipeline.multi()
                    self._queue.enqueue_many([data], pipeline=pipeline)
                    try:
                        pipeline.execute()
                    except WatchError:
                        continue  # the first submission came through this moment
                    return job
        except ConfigurationError as exc:
            return exc
        except Exception as exc:
            return self._submit_error(exc, job)

    def _enqueue_many(self, batch: Sequence[tuple[bytes, Frame]]) -> list[Any]:
        results: list[Any] = []
        jobs: list[Any] = []
        if not batch:
            return results
        for payload, frame in batch:
            try:
                jobs.append(self._job(payload, frame))
                results.append(job_id(frame))
            except ConfigurationError as exc:
                results.append(exc)
        try:
            with self._queue.connection.pipeline() as pipeline:
                self._queue.enqueue_many(jobs, pipeline=pipeline)
                pipeline.execute()
        except Exception as exc:
            return [
                result if isinstance(result, Exception) else self._submit_error(exc, result)
                for result in results
            ]
        return results

    def _submit_error(self, exc: Exception, submission: str | None = None) -> SubmitError:
        setting = "redis_url" if self.config.get("redis_url") else "queue"
        where = scrub(str(self.config.get("redis_url") or "of the queue"))
        error = SubmitError(
            f"environment {self.name!r}: the Redis {where} did not accept the run: {type(exc).__name__}: "
            f'{scrub(str(exc))}; is it running? (executor_config["{setting}"])',
            maybe_accepted=True,
            submission=submission,
        )
        error.__cause__ = without_passwords(exc)
        return error

    def _job(self, payload: bytes, frame: Frame) -> Any:
        """Describe a job to RQ.

        Raises:
            ConfigurationError: ``enqueue_options`` that RQ does not take.
        """
        try:
            return self._prepare(payload, frame)
        except Exception as exc:
            raise ConfigurationError(f'RQ refuses executor_config["enqueue_options"]: {exc}') from exc

    def _prepare(self, payload: bytes, frame: Frame) -> Any:
        delivery = frame.get("delivery") or {}
        timeout = delivery.get("timeout")
        settings: dict[str, Any] = {
            "args": (payload if self._binary else as_text(payload),),
            "job_id": job_id(frame),
            # RQ's default would end every job after 180 s; -1 is its word for no limit.
            "timeout": math.ceil(timeout) + 1 if timeout else -1,
            # Work that nobody waits for any more is not started.
            "ttl": math.ceil(timeout) + 1 if timeout and not delivery.get("keep") else None,
            # Nothing is left behind: no result, and a failed job only for a while.
            "result_ttl": 0,
            "failure_ttl": FAILURE_TTL,
            # What the worker's log and `rq info` show.
            "description": f"{frame['task_id']}{summarize_call(frame)}",
        }
        webhook = frame.get("failure_webhook")
        if self._webhook is not None and webhook:
            settings["webhooks"] = [
                self._webhook(
                    webhook["url"],
                    "failed",
                    method="POST",
                    headers={"Authorization": f"Bearer {webhook['token']}"},
                    timeout=WEBHOOK_TIMEOUT,
                )
            ]
        if self.config.get("stop_on_cancel"):
            from rq import Callback

            # RQ's own word for a stopped job: the work horse has no chance to say it.
            settings["on_stopped"] = Callback(STOPPED_FUNCTION)
        function = JOB_FUNCTION
        if _key(frame):
            # Whoever joins later may have more time.
            function, settings["ttl"] = SHARED_FUNCTION, None
        options = dict(self._options)
        if "job_timeout" in options:  # `enqueue` and `prepare_data` name it differently
            settings["timeout"] = options.pop("job_timeout")
        return self._queue.prepare_data(function, **{**settings, **options})

    async def cancel(self, run_id: str, submission: Any, frame: Frame) -> bool:
        """Delete a queued job; with ``stop_on_cancel`` also end the process of a running one.

        A job that others wait for is left to them.
        """
        ticket = Ticket.read(submission)
        job = ticket.job if ticket else submission or job_id(frame)
        if frame.get("escalate"):
            await self.blocking(self._stop, job)
            return False
        if ticket:
            return bool(await self.blocking(self._shared.leave, ticket))
        return bool(await self.blocking(self._delete_queued, job))

    def is_shared(self, submission: Any) -> bool:
        """Tell whether the run was submitted with an idempotency key."""
        return Ticket.read(submission) is not None

    def _delete_queued(self, job: str) -> bool:
        from rq.job import Job

        connection = self._queue.connection
        # In one step: whoever takes the id out of the list owns the job, so a job that a
        # worker has popped is never deleted under it, and none is left half deleted.
        return bool(connection.eval(_DELETE_QUEUED, 2, self._queue.key, Job.key_for(job), job))

    def _stop(self, job: str) -> None:
        from rq.command import send_stop_job_command
        from rq.exceptions import InvalidJobOperation, NoSuchJobError

        try:
            send_stop_job_command(self._queue.connection, job, serializer=self._queue.serializer)
        except (NoSuchJobError, InvalidJobOperation):
            pass  # it has ended meanwhile, or has not begun yet

    async def probe(self, run_ids: Sequence[str]) -> dict[str, BackendState]:
        """Ask RQ for the jobs, in few round trips."""
        states: dict[str, BackendState] = await self.asking(self._probe, list(run_ids))
        return states

    def _probe(self, run_ids: list[str]) -> dict[str, BackendState]:
        from rq.job import Job

        jobs: dict[str, str] = {}
        # Not by RQ's own Job.fetch_many, which unpickles what it finds.
        with self._queue.connection.pipeline(transaction=False) as pipeline:
            for run_id in run_ids:
                ticket = Ticket.read(run_id)
                # Of a job that several runs share, each has an outcome of its own.
                job, parked = (ticket.job, f"{PARKED}:{ticket.run_id}") if ticket else (run_id, PARKED)
                jobs[run_id] = job
                pipeline.hmget(Job.key_for(job), "status", "worker_name", parked)
            found = dict(zip(run_ids, pipeline.execute(), strict=True))
        workers = {as_str(worker) for status, worker, _ in found.values() if as_str(status) == "started"}
        alive = living(self._queue.connection, workers - {""}) if workers else {}
        failed = [jobs[run_id] for run_id, (status, *_) in found.items() if as_str(status) == "failed"]
        why = reasons(self._queue.connection, failed) if failed else {}
        return {
            run_id: state_of(
                as_str(status), as_str(worker), alive.get(as_str(worker)), parked, why.get(jobs[run_id], "")
            )
            for run_id, (status, worker, parked) in found.items()
        }

    async def close(self) -> None:
        """Close a client that was made here; never a user's."""
        owned, self._owned = self._owned, None
        if owned is not None:
            await self.blocking(owned.close)

    #: The client made from ``redis_url``.
    _owned: Any = None


def _key(frame: Frame) -> str | None:
    key: str | None = (frame.get("delivery") or {}).get("key")
    return key


def _carries_bytes(serializer: Any) -> bool:
    try:
        return bool(serializer.loads(serializer.dumps(((b"\x00",), {})))[0][0] == b"\x00")
    except Exception:
        return False  # a JSON queue: the payload travels as text


def _webhook_class() -> Any:
    try:
        from rq.webhook import Webhook
    except ImportError:  # RQ before 2.12: a killed work horse is noticed by its silence
        return None
    return Webhook
