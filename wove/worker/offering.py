"""How long, and how often, a worker turns to a callback server that does not answer."""

from __future__ import annotations

import logging
import os
import random
import time
from typing import TYPE_CHECKING, Protocol

from wove.errors import is_time_limit
from wove.worker.connection import down_since

if TYPE_CHECKING:
    from collections.abc import Callable

    from wove.worker.assignment import Assignment
    from wove.worker.connection import Reply

logger = logging.getLogger("wove.worker")

#: Seconds that any outcome is offered, also one that hardly anybody waits for.
LEAST_RETRY = 2.0
#: Seconds that an outcome is offered which the backend keeps anyway when nobody takes it.
KEPT_RETRY = 1.0
#: Seconds between offers, at random up to a part of how long the server has been away, so that a
#: fleet does not come back all at once, nor long after the server has.
FIRST_DELAY = 0.1
LONGEST_DELAY = 30.0
DELAY_SHARE = 0.5
#: The part of the time left that a worker waits at most: a short outage must not outlast a deadline.
LEFT_SHARE = 0.3
LEAST_DELAY = 0.05
#: Refusals after which there is no hope: wrong signatures do not become right ones.
_MAX_REFUSALS = 3
REFUSED_DELAY = (0.2, 1.0)


class Outages(Protocol):
    """What the processes of a fleet tell each other of callback servers that do not answer."""

    def known_for(self, origin: str) -> float:
        """Note that one does not answer; return for how many seconds that has been known. Does not raise."""

    def over(self, origin: str) -> None:
        """It has answered again. Does not raise."""


#: Set where each outcome is delivered by a process of its own, which knows nothing of the outages of others.
outages: Outages | None = None


def retry_seconds() -> float:
    """Return how long a worker tries to deliver an outcome: ``WOVE_RESULT_RETRY_SECONDS`` or 300."""
    text = os.environ.get("WOVE_RESULT_RETRY_SECONDS", "")
    try:
        return max(0.0, float(text)) if text else 300.0
    except ValueError:
        logger.warning("WOVE_RESULT_RETRY_SECONDS is a number of seconds, not %r; using 300", text)
        return 300.0


def patience(assignment: Assignment, begun: float, *, cancelled: bool) -> float:
    """Return how many seconds an outcome is worth offering to a server that does not answer.

    Args:
        assignment: the run.
        begun: when its execution began, in monotonic seconds.
        cancelled: whether its caller has given it up.
    """
    now = time.monotonic()
    seconds = retry_seconds()
    # One outage is waited for once: later runs of a submitter that is gone do not each
    # hold a slot of the fleet for minutes.
    seconds -= now - down_since.get(assignment.origin, now)
    if assignment.timeout is not None:
        # Nobody waits beyond the run's own deadline.
        seconds = min(seconds, assignment.timeout - (now - begun))
    least = LEAST_RETRY
    if assignment.keep:
        seconds = least = min(KEPT_RETRY, retry_seconds())
    if cancelled:
        seconds = 0.0
    return max(seconds, min(least, retry_seconds()))


def offer(
    post: Callable[[], Reply],
    assignment: Assignment,
    seconds: float,
    what: str = "the outcome",
    marks: Outages | None = None,
) -> Reply | None:
    """Make a request until the callback server has decided.

    Args:
        post: makes one request.
        assignment: the run.
        seconds: how long to try.
        what: what is offered, or asked for, for the log.
        marks: where other processes note an outage, which is waited for once.

    Returns:
        Its answer: taken (2xx), not wanted (410), or too large (413); None when it gave none in time.
    """
    begun = time.monotonic()
    give_up = begun + seconds
    refusals = attempt = 0
    marked = False
    while True:
        wait_for: float | None = None
        try:
            reply = post()
        except Exception as exc:
            if is_time_limit(exc):
                raise  # the task's time is up: its outcome is kept by the backend
            # Without a connection, or with a reply that is none of a callback server's.
            problem = f"{type(exc).__name__}: {exc}"
            if assignment.origin not in down_since:
                waited = marks.known_for(assignment.origin) if marks is not None else 0.0
                down_since[assignment.origin] = time.monotonic() - waited
                give_up = min(give_up, max(begun + LEAST_RETRY, give_up - waited))
                marked = True
        else:
            down_since.pop(assignment.origin, None)
            if marked and marks is not None:
                marks.over(assignment.origin)
                marked = False
            if reply.status < 300 or reply.status in (410, 413):
                return reply
            problem = f"the callback server answered {reply.status}"
            # A body that was cut on its way is 400 too, so these are tried again as well.
            refused = reply.status in (400, 401, 404)
            refusals += refused
            # A gateway in between may answer so for a moment.
            wait_for = random.uniform(*REFUSED_DELAY) if refused else retry_after(reply)  # noqa: S311 - no secret
        ceiling = max(FIRST_DELAY, (time.monotonic() - begun) * DELAY_SHARE)
        delay = wait_for or random.uniform(0, min(LONGEST_DELAY, ceiling))  # noqa: S311 - no secret
        # The last offer is made when the time is up, not before.
        left = give_up - time.monotonic()
        if refusals >= _MAX_REFUSALS or left <= 0:
            logger.error(
                "%s of run %s could not be exchanged with %s: %s",
                what, assignment.run_id, assignment.origin, problem,
            )  # fmt: skip
            return None
        logger.log(
            logging.WARNING if attempt == 0 else logging.DEBUG,
            "exchanging %s of run %s failed, trying again: %s", what, assignment.run_id, problem,
        )  # fmt: skip
        time.sleep(min(delay, max(LEAST_DELAY, left * LEFT_SHARE), left))
        attempt += 1


def retry_after(reply: Reply) -> float | None:
    """Return how many seconds the callback server asks to wait, spread a little."""
    try:
        asked = float(reply.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(30.0, max(0.05, asked)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
