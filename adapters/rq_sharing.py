"""Jobs that the runs of several processes share, because they have the same idempotency key.

Next to the job a hash in Redis says who takes part: ``job`` (its id), ``owner`` (the run in whose
name it is executed; empty when that has left), ``callable`` (its name), ``closed`` (it was
cancelled, nobody joins any more), and one field with a signed payload for each run that has
joined. The worker delivers the outcome to all of them, see :mod:`wove.worker.rq_sharing`.

The job's own id stays that of the run it was made for. An id made of the key would be taken, for
RQ, until its worker has put the job away, some time after the outcome; and RQ puts jobs away
by id, so that a new one of the same id would go with the old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from wove.adapters.rq_states import as_str
from wove.backend import JOINED, is_repeated, job_id, shared_name
from wove.errors import ConfigurationError, SubmitError
from wove.wire import callable_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from wove.adapters.base import BackendState
    from wove.frames import Frame

#: The job functions, by name: of a job that may be shared, and of one that goes alone.
SHARED_FUNCTION = "wove.worker.rq.run_shared"
LONE_FUNCTION = "wove.worker.rq.run"
#: Seconds after which Redis forgets who shares a job, should nobody ever say that it is over.
KEPT_SECONDS = 7 * 24 * 3600
#: The same, for a job whose worker was told to stop.
CLOSED_SECONDS = 3600
#: Other submitters of the same key may be faster this often.
MAX_RACES = 1_000

#: What RQ may say of a job that can still have an outcome.
_OPEN = frozenset({"queued", "running", "unknown"})

# KEYS: who shares it, the queue, the job. ARGV: job id, run id, "1" for a job that is over, seconds.
# Returns 1 when nothing is done in the run's name any more, 0 when its worker has to be told.
_LEAVE = """
if redis.call('hget', KEYS[1], 'job') ~= ARGV[1] then return tonumber(ARGV[3]) end
local owner = redis.call('hget', KEYS[1], 'owner')
local others = 0
if owner ~= '' and owner ~= ARGV[2] then others = 1 end
for _, field in ipairs(redis.call('hkeys', KEYS[1])) do
  local run = string.match(field, '^joined:(.*)$')
  if run and run ~= owner and run ~= ARGV[2] then others = others + 1 end
end
if others > 0 then
  redis.call('hdel', KEYS[1], 'joined:' .. ARGV[2])
  if owner == ARGV[2] then redis.call('hset', KEYS[1], 'owner', '') end
  return 1
end
if ARGV[3] == '1' then redis.call('del', KEYS[1]) return 1 end
if redis.call('lrem', KEYS[2], 1, ARGV[1]) == 1 then
  redis.call('del', KEYS[1], KEYS[3])
  return 1
end
redis.call('hset', KEYS[1], 'closed', '1')
redis.call('expire', KEYS[1], ARGV[4])
return 0
"""


class Ticket(NamedTuple):
    """What a run that takes part in a shared job is known by."""

    job: str
    run_id: str
    name: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def read(cls, submission: Any) -> Self | None:
        """Return the ticket that a submission is; None for any other."""
        parts = submission.split("/", 2) if isinstance(submission, str) else ()
        return cls(*parts) if len(parts) == 3 else None


class AnswerLost(Exception):
    """Redis did not answer to a submission, which it may have accepted.

    Attributes:
        error: what was raised.
        ticket: what the run is known by if it was accepted.
    """

    def __init__(self, error: Exception, ticket: Ticket) -> None:
        super().__init__(str(error))
        self.error = error
        self.ticket = str(ticket)


class SharedJobs:
    """The jobs of one environment that others may share. Methods block.

    Args:
        queue: the ``rq.Queue``.
        environment: the environment's name.
        probe: asks RQ for the states of jobs.
    """

    def __init__(
        self, queue: Any, environment: str, probe: Callable[[list[str]], Mapping[str, BackendState]]
    ) -> None:
        self._queue = queue
        self._environment = environment
        self._probe = probe

    def submit(self, data: Any, payload: bytes, frame: Frame) -> str:
        """Join the open job with that key, or enqueue one.

        Args:
            data: the job to enqueue, as RQ's ``prepare_data`` makes it.
            payload: signed; executed, or answered with the outcome of somebody else's.
            frame: the ``run_task`` frame.

        Raises:
            ConfigurationError: the key is in use for another function.
            SubmitError: others were faster for too long.
            AnswerLost: Redis may have accepted it.
            Exception: what Redis raises.
        """
        from redis import WatchError

        key = frame["delivery"]["key"]
        name = shared_name(self._environment, self._queue.name, key)
        func = callable_name(frame["callable"])
        if frame["delivery"].get("attempt", 1) > 1 and self._parts(name, frame["run_id"]):
            self._queue.enqueue_many([data._replace(func=LONE_FUNCTION)])
            return job_id(frame)
        if is_repeated(frame) and (accepted := self._accepted(name, frame)) is not None:
            return str(accepted)
        with self._queue.connection.pipeline() as pipeline:
            for _ in range(MAX_RACES):
                pipeline.watch(name)
                job = self._find_open(pipeline, name, func, frame)
                pipeline.multi()
                if job is None:
                    job = job_id(frame)
                    owner = {"job": job, "owner": frame["run_id"], "callable": func}
                    pipeline.delete(name)
                    pipeline.hset(name, mapping=owner)
                    self._queue.enqueue_many([data], pipeline=pipeline)
                else:
                    pipeline.hset(name, JOINED + frame["run_id"], payload)
                pipeline.expire(name, KEPT_SECONDS)
                try:
                    pipeline.execute()
                except WatchError:
                    continue
                except Exception as exc:
                    raise AnswerLost(exc, Ticket(job, frame["run_id"], name)) from exc
                return str(Ticket(job, frame["run_id"], name))
        raise SubmitError(
            f"environment {self._environment!r}: too many submitters of the delivery_idempotency_key {key!r} at once"
        )

    def _accepted(self, name: str, frame: Frame) -> Ticket | None:
        """Return the ticket of a run that takes part already; None of one that does not."""
        from rq.job import Job

        run_id = frame["run_id"]
        job, owner, joined = map(
            as_str, self._queue.connection.hmget(name, ("job", "owner", JOINED + run_id))
        )
        if job and (joined or owner == run_id):
            return Ticket(job, run_id, name)
        # Its own job may be over, and hold the outcome.
        if self._queue.connection.exists(Job.key_for(job_id(frame))):
            return Ticket(job_id(frame), run_id, name)
        return None

    def _find_open(self, pipeline: Any, name: str, func: str, frame: Frame) -> str | None:
        """Return the id of the job to join; None when there is none."""
        job, known, closed = map(as_str, pipeline.hmget(name, ("job", "callable", "closed")))
        if not job or closed or not self.is_open(job):
            return None
        if known != func:
            raise ConfigurationError(
                f"environment {self._environment!r}: the delivery_idempotency_key {frame['delivery']['key']!r} of {func} "
                f"is in use for an open run of {known}: keys of different functions have to differ"
            )
        return job

    def _parts(self, name: str, run_id: str) -> bool:
        """Leave the job in which an earlier attempt of this run takes part.

        Returns:
            True when that job may be alive nevertheless. The run has given it up, and others may
            not have: it goes on to be theirs, and the run goes alone.
        """
        fields = ("job", "owner", JOINED + run_id)
        job, owner, joined = map(as_str, self._queue.connection.hmget(name, fields))
        if not job or not (joined or owner == run_id):
            return False
        self.leave(Ticket(job, run_id, name))
        return self.is_open(job)

    def is_open(self, job: str) -> bool:
        """Tell whether a job can still have an outcome, as far as is known."""
        return self._probe([job])[job].state in _OPEN

    def leave(self, ticket: Ticket) -> bool:
        """Take part no longer; the last one to leave takes a queued job along.

        Returns:
            True when the job is over for this run; False when it is nobody else's, and a
            worker is at it or about to be.
        """
        from rq.job import Job

        over = "0" if self.is_open(ticket.job) else "1"
        keys = (ticket.name, self._queue.key, Job.key_for(ticket.job))
        arguments = (ticket.job, ticket.run_id, over, CLOSED_SECONDS)
        return bool(self._queue.connection.eval(_LEAVE, len(keys), *keys, *arguments))
