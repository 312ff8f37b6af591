"""Whether a run is still wanted when its turn comes: known without asking, or asked of the callback server."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from wove.errors import is_time_limit
from wove.worker.connection import withdrawals
from wove.worker.offering import retry_after

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.worker.assignment import Assignment
    from wove.worker.connection import Reply

logger = logging.getLogger("wove.worker")

#: A payload younger than this, in seconds, starts without asking: hardly anybody had time to cancel it.
FRESH = 0.01
#: A payload younger than this, in seconds, also starts without asking when its callback server has taken no
#: run back since it was made, as one of its replies has told within so many seconds.
SETTLED = 30.0
RECENT = 0.02
#: Seconds by which a deadline must be over, where the submitter's clock is known and where not.
OVERDUE_KNOWN = 2.0
OVERDUE_UNKNOWN = 10.0
#: Seconds that asking for leave to start may take; without an answer the task is run.
ASK_TIMEOUT = 5.0
#: Seconds for which the question is asked again when its answer may have been lost: it may have been that the run was
#: cancelled, which its caller has been told by then. And seconds between two questions.
ASK_AGAIN = 3.0
ASK_PAUSE = 0.1
#: Seconds for which a worker is asked to wait at most, because another one may be at the same run.
ASK_PATIENCE = 10.0
#: Runs that this process remembers to have begun: copies of them are asked for.
MAX_BEGUN = 4096

_begun: set[str] = set()


class Leave:
    """What a run was told that has asked.

    Attributes:
        given: it may start.
        noted: the callback server knows now that it does.
        elsewhere: it may not, because another worker is at it.
    """

    __slots__ = ("elsewhere", "given", "noted")

    def __init__(self, *, given: bool, noted: bool = False, elsewhere: bool = False) -> None:
        self.given = given
        self.noted = noted
        self.elsewhere = elsewhere


def is_wanted(task: Assignment, offset: float | None, *, doubted: bool) -> bool:
    """Tell whether a run is known to be wanted, so that it need not ask.

    Args:
        task: the run. That it begins is remembered.
        offset: the submitter's clock minus ours, in seconds; None when it is not known.
        doubted: there is a reason to ask, whatever is known.
    """
    settled = _nothing_withdrawn(task)
    if offset is None or doubted or task.ask:
        return False
    # Also what seems to be long over asks: by clocks alone nothing is skipped, for they may have been set meanwhile.
    age = abs(time.time() + offset - task.sent_at)
    return age < FRESH or (age < SETTLED and settled)


def _nothing_withdrawn(task: Assignment) -> bool:
    """Tell whether no run was cancelled, closed or submitted again since the payload was made."""
    copy = task.run_id in _begun
    if len(_begun) >= MAX_BEGUN:
        _begun.clear()
    _begun.add(task.run_id)
    # What others share, or what outlives its submitter, is another matter.
    if copy or task.withdrawn is None or task.shared_by is not None or task.keep:
        return False
    told_at, withdrawn = withdrawals.get(task.origin, (0.0, ""))
    return withdrawn == str(task.withdrawn) and time.monotonic() - told_at < RECENT


def ask(post: Callable[[float], Reply], task: Assignment, offset: float | None) -> Leave:
    """Ask the callback server; without an answer the run starts, unless its caller has long given up.

    Args:
        post: asks once, for at most so many seconds.
        task: the run.
        offset: the submitter's clock minus ours, in seconds; None when it is not known.

    Raises:
        Exception: the backend's time limit has struck.
    """
    give_up = time.monotonic() + ASK_PATIENCE
    #: Seconds to wait, because another worker was at this run a moment ago; whether it lives will be known soon.
    pause = 0.0
    busy = heard = False
    begun = time.monotonic()
    while True:
        try:
            if pause:
                time.sleep(pause)
            reply = post(ASK_TIMEOUT)
        except Exception as exc:
            if is_time_limit(exc):
                if busy:
                    return Leave(given=False, elsewhere=True)
                raise
            heard = heard or _may_have_been_heard(exc)
            again = heard and time.monotonic() - begun < ASK_AGAIN
            leave = _without_answer(exc, task, offset, again=again)
            if leave is not None:
                return leave
            pause = ASK_PAUSE
            continue
        if reply.status != 503 or time.monotonic() >= give_up:
            break
        busy, pause = True, retry_after(reply) or 0.5
    return _answered(reply, task)


def _may_have_been_heard(exc: Exception) -> bool:
    """Tell whether the question may have arrived although there was no answer."""
    if isinstance(exc, OSError):
        return isinstance(exc, (ConnectionError, TimeoutError)) and not isinstance(
            exc, ConnectionRefusedError
        )
    return True


def _without_answer(exc: Exception, task: Assignment, offset: float | None, *, again: bool) -> Leave | None:
    """Return what is to be done without an answer; None to ask again."""
    if task.overdue(offset or 0.0, OVERDUE_UNKNOWN if offset is None else OVERDUE_KNOWN):
        logger.info("run %s is not started: its deadline is over, its caller gone", task.run_id)
        return Leave(given=False)
    if again:
        return None
    logger.info("run %s starts unasked: %s: %s", task.run_id, type(exc).__name__, exc)
    return Leave(given=True)


def _answered(reply: Reply, task: Assignment) -> Leave:
    if reply.status == 409:
        logger.info("run %s is not started: another worker is at it", task.run_id)
        return Leave(given=False, elsewhere=True)
    if reply.status == 410:
        # Work that is kept when its submitter goes is not over because that has gone.
        return Leave(given=task.keep and "wove-ended" not in reply.headers)
    return Leave(given=True, noted=reply.status < 300)
