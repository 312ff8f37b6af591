"""Who shares a job, as Redis knows it; see :mod:`wove.adapters.rq_sharing`, which writes it."""

from __future__ import annotations

import logging
from typing import Any

from wove.backend import JOINED, shared_name
from wove.errors import WoveError
from wove.worker.assignment import Assignment
from wove.worker.calls import note_refusal

logger = logging.getLogger("wove.worker")

# KEYS: who shares the job. ARGV: job id, run id whose execution came to nothing or "".
# Returns the run whose turn it is, and its payload; nothing when nobody is left.
_NEXT = """
if redis.call('hget', KEYS[1], 'job') ~= ARGV[1] then return {} end
if ARGV[2] ~= '' then
  redis.call('hdel', KEYS[1], 'joined:' .. ARGV[2])
  if redis.call('hget', KEYS[1], 'owner') == ARGV[2] then redis.call('hset', KEYS[1], 'owner', '') end
end
local owner = redis.call('hget', KEYS[1], 'owner')
if owner == '' then
  if redis.call('hexists', KEYS[1], 'closed') == 1 then return {} end
  for _, field in ipairs(redis.call('hkeys', KEYS[1])) do
    owner = string.match(field, '^joined:(.*)$') or owner
  end
  if owner == '' then
    redis.call('del', KEYS[1])
    return {}
  end
  redis.call('hset', KEYS[1], 'owner', owner)
end
return {owner, redis.call('hget', KEYS[1], 'joined:' .. owner) or ''}
"""

# KEYS: who shares the job. ARGV: job id. Returns all of it, and forgets it: from here on nobody joins.
_CLOSE = """
if redis.call('hget', KEYS[1], 'job') ~= ARGV[1] then return {} end
local all = redis.call('hgetall', KEYS[1])
redis.call('del', KEYS[1])
return all
"""


class Party:
    """Who shares a job, as Redis knows it.

    Args:
        job: RQ's.
        assignment: the payload that the job was made for.
    """

    def __init__(self, job: Any, assignment: Assignment) -> None:
        self.job_id: str = job.id
        self._connection = job.connection
        self._first = assignment
        self._name = shared_name(assignment.environment, job.origin, assignment.shared_by or "")

    def next(self, failed: str = "") -> tuple[str, bytes] | None:
        """Return the run whose turn it is, and its payload; that is empty for the job's own.

        Args:
            failed: the run whose execution came to nothing.
        """
        found = self._connection.eval(_NEXT, 1, self._name, self.job_id, failed)
        return (_text(found[0]), found[1]) if found else None

    def look(self) -> tuple[bool, list[str]]:
        """Return whether the job was cancelled by the last of them, and who has joined."""
        with self._connection.pipeline(transaction=False) as pipeline:
            pipeline.hmget(self._name, ("job", "closed"))
            pipeline.hkeys(self._name)
            (job, closed), names = pipeline.execute()
        holder = _text(job)
        if holder != self.job_id:
            # Once all have left, the key may be another job's by now.
            return bool(holder), []
        runs = [name.removeprefix(JOINED) for name in map(_text, names) if name.startswith(JOINED)]
        return bool(closed), runs

    def payload(self, run_id: str) -> bytes | None:
        """Return the payload with which a run has joined."""
        found: bytes | None = self._connection.hget(self._name, JOINED + run_id)
        return found

    def close(self) -> tuple[str, dict[str, bytes]] | None:
        """Let nobody join any more.

        Returns:
            The run in whose name the job is executed, "" when that has left, and the payloads of those
            who have joined; None when nobody knows of it any more.
        """
        found = self._connection.eval(_CLOSE, 1, self._name, self.job_id)
        if not found:
            return None
        fields = {_text(name): value for name, value in zip(found[::2], found[1::2], strict=True)}
        joined = {
            name.removeprefix(JOINED): value for name, value in fields.items() if name.startswith(JOINED)
        }
        return _text(fields["owner"]), joined

    def open(self, payload: bytes) -> Assignment | None:
        """Verify what somebody has joined with; None for what does not belong here."""
        try:
            assignment = Assignment(payload)
            assignment.check()
        except WoveError as exc:
            note_refusal(exc, "job %s: somebody who has joined it is not heard: %s", self.job_id, exc)
            return None
        first = self._first
        if (assignment.environment, assignment.shared_by) != (first.environment, first.shared_by):
            # Signed, but for something else: whoever writes to Redis must not exchange outcomes.
            logger.error("job %s: run %s has no business in it", self.job_id, assignment.run_id)
            return None
        return assignment


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
