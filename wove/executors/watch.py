"""Finds runs whose workers are dead, and asks the backend before it says so.

Two things make a run suspect: that the process which ran it has lost its connections to the
callback server (a killed process does, within moments), and that nothing has been heard of it
for a while. Neither is proof: networks fail, and tasks hold the interpreter. So the worker gets
a moment to come back, and the backend is asked what it knows; only its word ends the run.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from wove import frames
from wove.errors import WoveError, lost, safe_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from wove.frames import Frame

logger = logging.getLogger("wove.executors")

#: Seconds between two looks at the agenda at most.
TICK = 1.0
#: Seconds after which a cancelled run is forgotten whose worker does not say a word.
FORGET_CANCELLED = 60.0
#: Seconds after the loss of the last connection before the backend is asked, and before it is believed.
ASK_AFTER = 0.3
GRACE = 1.0
#: Seconds of silence after which the backend is asked about a run that has started. Beats come every five.
QUIET = 7.0
#: Seconds after which it is asked about one that has not; then each time longer, up to the last.
UNSTARTED = (5.0, 10.0, 20.0, 30.0)
#: Seconds between two questions about the same started run; the first ones come sooner.
AGAIN = (1.0, 2.0, 5.0)
#: The part of the silence allowed after which the backend is asked again.
HEARTBEAT_SHARE = 0.4
#: Seconds for which a worker that asked for leave to start is taken to be waiting for it.
ASKING = 3.0
#: Runs that are asked about together at most.
MAX_TOGETHER = 200

#: What a backend says of work that will not report any more.
_OVER = frozenset({"lost", "gone", "failed", "done"})


class WatchedRun(Protocol):
    """What the callback server knows of a run; see ``wove.callback_server.runs.OpenRun``."""

    run_id: str
    job: str
    attempt: int
    cancelled: bool
    cancelled_at: float
    closed: bool
    doubtful: bool
    opened_at: float
    heartbeat: float | None
    asked_at: float
    obituary: dict[str, Any] | None
    worker: dict[str, Any]
    sink: Callable[[Iterable[Frame]], bool]

    @property
    def started(self) -> bool:
        """Whether a worker has spoken of the current attempt."""

    @property
    def last_contact(self) -> float:
        """When one last spoke of it, in monotonic seconds."""

    @property
    def suspect_since(self) -> float | None:
        """Since when no process that runs it has a connection."""

    def event(self, kind: str, **fields: Any) -> Frame:
        """Return an event of the run that arises on this side."""

    def forsake(self) -> None:
        """Expect nothing more of the executions there are."""


class Verdict(Protocol):
    """What a backend knows of a run; see ``wove.adapters.base.BackendState``."""

    @property
    def state(self) -> str:
        """One word."""

    @property
    def detail(self) -> str:
        """The backend's own words."""

    @property
    def outcome(self) -> bytes | None:
        """An outcome that was left with the backend."""

    @property
    def busy(self) -> bool:
        """Whether its process is computing this moment."""


class _Look:
    """What was found out about one attempt of a run so far."""

    __slots__ = ("attempt", "busy", "collected", "count", "last_contact", "next_at", "over")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.next_at = 0.0
        self.count = 0
        #: How often in a row the backend said that it is over.
        self.over = 0
        self.busy = False
        #: The hash of the outcome that was taken which was left with the backend; a retry may leave another.
        self.collected: int | None = None
        #: When the worker had last spoken, as far as the words of the backend are concerned.
        self.last_contact = 0.0


class Watch:
    """Watches the open runs of one environment.

    Args:
        environment: its name, for messages.
        close_run: forgets a run.
        probe: asks the backend; job id to state.
        take_parked: takes an outcome in that was left with the backend.
    """

    def __init__(
        self,
        environment: str,
        close_run: Callable[[str], None],
        probe: Callable[[Sequence[str]], Awaitable[Mapping[str, Verdict]]],
        take_parked: Callable[[str, bytes], Awaitable[None]],
    ) -> None:
        self._environment = environment
        self._close_run = close_run
        self._probe = probe
        self._take_parked = take_parked
        self._looks: dict[str, _Look] = {}
        self._questions: set[asyncio.Task[None]] = set()
        #: Runs to look at, and when; the counter keeps runs from being compared.
        self._agenda: list[tuple[float, int, WatchedRun]] = []
        #: Per run, when the agenda has it next; other entries are left from before.
        self._planned: dict[str, float] = {}
        self._counter = itertools.count()
        self._new: deque[tuple[float, WatchedRun]] = deque()
        self._loop = asyncio.get_running_loop()
        self._alarm = asyncio.Event()
        self._idle = False
        self._task = self._loop.create_task(self._watch(), name=f"wove-watch-{environment}")

    def opened(self, run: WatchedRun) -> None:
        """A run, or another attempt of it, was handed over. Callable from any thread."""
        self._new.append((time.monotonic() + UNSTARTED[0], run))
        if self._idle:
            self._wake()

    def suspect(self, run: WatchedRun) -> None:
        """A process that ran ``run`` has lost its connections, or the backend says that it is dead.

        Callable from any thread.
        """
        pause = 0.0 if run.obituary is not None else ASK_AFTER
        self._new.append((time.monotonic() + pause, run))
        self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._alarm.set)
        except RuntimeError:
            pass  # the loop has ended, and with it whoever waits

    async def stop(self) -> None:
        """Ask no more."""
        tasks = [self._task, *self._questions]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1.0)

    # --- the loop -----------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                pause = self._look_around()
            except Exception:
                logger.exception("environment %r: watching the runs failed", self._environment)
                pause = TICK
            self._idle = pause is None
            if self._idle and self._new:  # one was opened this moment
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._alarm.wait()
            except TimeoutError:
                pass
            self._alarm.clear()

    def _look_around(self) -> float | None:
        """Ask about the runs that are due; return after how many seconds to look again."""
        while self._new:
            self._plan(*self._new.popleft())
        now = time.monotonic()
        due: dict[str, WatchedRun] = {}
        while self._agenda and self._agenda[0][0] <= now and len(due) < MAX_TOGETHER:
            when, _, run = heapq.heappop(self._agenda)
            if self._planned.get(run.run_id) != when:
                continue
            del self._planned[run.run_id]
            try:
                due_at = self._due_at(run, now)
            except Exception:
                logger.exception("environment %r: looking at run %s failed", self._environment, run.run_id)
                due_at = now + TICK
            if due_at is None:
                continue
            if due_at > now:
                self._plan(due_at, run)
            else:
                due[run.run_id] = run
        # Apart: a long queue must not hold up the word on those that may be dead.
        suspects = [run for run in due.values() if run.suspect_since is not None or run.obituary is not None]
        others = [run for run in due.values() if run not in suspects]
        for runs in (suspects, others):
            if runs:
                self._ask(runs)
        if not self._agenda:
            return None
        return min(TICK, max(0.0, self._agenda[0][0] - now))

    def _plan(self, when: float, run: WatchedRun) -> None:
        planned = self._planned.get(run.run_id)
        if planned is None or when < planned:
            self._planned[run.run_id] = when
            heapq.heappush(self._agenda, (when, next(self._counter), run))

    def _due_at(self, run: WatchedRun, now: float) -> float | None:
        """Return when to ask about a run; None for not at all (now)."""
        look = self._looks.get(run.run_id)
        if run.closed or (look is not None and look.attempt != run.attempt):
            self._looks.pop(run.run_id, None)
            look = None
        if run.closed or (look is not None and look.busy):
            return None
        if run.cancelled:
            # Its worker has had the time to hear of it; who comes later is told that it is gone.
            forget_at = max(run.cancelled_at, run.last_contact) + FORGET_CANCELLED
            if forget_at <= now:
                self._close_run(run.run_id)
                return None
            return forget_at
        suspect_since = run.suspect_since
        if run.obituary is not None:
            return now
        if suspect_since is not None:
            first = suspect_since + ASK_AFTER
        elif run.started:
            first = run.last_contact + (QUIET if run.heartbeat is None else min(QUIET, run.heartbeat * 0.6))
        elif run.doubtful:
            # A backend that has never had it would call it gone.
            return now + TICK
        else:
            first = run.opened_at + UNSTARTED[0]
        return max(first, look.next_at) if look is not None else first

    def _ask(self, runs: list[WatchedRun]) -> None:
        looks = []
        for run in runs:
            look = self._looks.setdefault(run.run_id, _Look(run.attempt))
            look.busy = True
            looks.append((run, look))
        task = self._loop.create_task(self._examine(looks), name="wove-examine")
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    async def _examine(self, looks: list[tuple[WatchedRun, _Look]]) -> None:
        jobs = {run.run_id: run.job for run, _ in looks}
        asked_at = time.monotonic()
        try:
            states = await self._probe(list(jobs.values()))
        except Exception as exc:
            logger.info(
                "environment %r: the backend did not say what it knows of %d runs: %s",
                self._environment, len(looks), safe_text(exc, 300),
            )  # fmt: skip
            states = {}
        latest = max((run.suspect_since or 0.0 for run, _ in looks if run.obituary is None), default=0.0)
        if latest:
            await asyncio.sleep(latest + GRACE - time.monotonic())
        for run, look in looks:
            # Another attempt, with a look of its own, may have begun while the backend was asked.
            if self._looks.get(run.run_id) is look and look.attempt == run.attempt and not run.closed:
                look.busy = False
                try:
                    await self._judge(run, look, states.get(jobs[run.run_id]), asked_at)
                except Exception:
                    logger.exception("environment %r: examining run %s failed", self._environment, run.run_id)
            # Whatever was found: when it is due next, the agenda finds out.
            self._new.append((time.monotonic(), run))
        self._alarm.set()

    # --- one run -------------------------------------------------------------------

    async def _judge(self, run: WatchedRun, look: _Look, state: Verdict | None, asked_at: float) -> None:
        now = time.monotonic()
        look.count += 1
        look.next_at = now + _pause(run, look.count)
        if run.obituary is not None:
            # The backend itself has said that it is over; an outcome may lie there all the same.
            obituary = run.obituary
            said = None if state is None else state.outcome
            collected = said is not None and await self._collect(run, said)
            if collected and (run.closed or run.attempt != look.attempt):
                return
            self._lose(run, obituary)
            return
        if run.started and run.last_contact > asked_at:
            # It has spoken meanwhile: what the backend said before is void.
            self._looks.pop(run.run_id, None)
            return
        if run.last_contact > look.last_contact:
            look.over = 0
            look.last_contact = run.last_contact
        if state is None:
            return
        # What was left for a batch need not speak of all of its runs: the others are not waited for.
        left = state.outcome if state.outcome is not None and hash(state.outcome) != look.collected else None
        if left is not None and await self._collect(run, left):
            look.collected = hash(left)
            look.next_at = now + UNSTARTED[-1]
        elif state.state in _OVER:
            self._over(run, look, state, now)
        else:
            look.over = 0
            self._alive(run, state)

    def _over(self, run: WatchedRun, look: _Look, state: Verdict, now: float) -> None:
        word = state.detail or state.state
        # What is gone has ended in some way: whoever saw it, its outcome or a better word may be on its way.
        sure = state.state != "gone"
        look.over += 1
        if now - run.asked_at < ASKING:
            # Another worker was given it, and stands at the door.
            self._requeue(run, word)
        elif (run.suspect_since is not None and sure) or look.over > 1:
            # A lost connection and the backend's word are two witnesses; silence is none.
            self._lose(run, lost(word))
        else:
            look.next_at = now + AGAIN[0]  # to be heard once more

    def _alive(self, run: WatchedRun, state: Verdict) -> None:
        if not run.started:
            return
        if state.state == "running" and (state.busy or run.suspect_since is not None):
            # It cannot reach us, or has no time to, and is alive: the backend's word counts as its own.
            run.sink([run.event(frames.HEARTBEAT)])
        elif state.state == "queued" and run.suspect_since is not None:
            self._requeue(run, state.detail)

    def _requeue(self, run: WatchedRun, detail: str) -> None:
        word = f"the backend runs it again: {detail}"
        run.sink([run.event(frames.TASK_RETRY, error={**lost(word), "kind": "Requeued"})])
        run.forsake()

    async def _collect(self, run: WatchedRun, outcome: bytes) -> bool:
        """Take an outcome in that a worker has left; tell whether it was one."""
        try:
            await self._take_parked(run.run_id, outcome)
        except WoveError as exc:
            logger.warning(
                "environment %r: an outcome left for run %s: %s", self._environment, run.run_id, exc
            )
            return False
        return True

    def _lose(self, run: WatchedRun, error: dict[str, Any]) -> None:
        run.obituary = None
        run.forsake()
        run.sink([run.event(frames.TASK_ERROR, error=error)])


def _pause(run: WatchedRun, count: int) -> float:
    """Return after how many seconds to ask about a run again that was asked about ``count`` times."""
    pauses = AGAIN if run.started else UNSTARTED[1:]
    pause = pauses[min(count, len(pauses)) - 1]
    if run.started and run.heartbeat is not None:
        # The backend's word has to come before the silence counts.
        pause = min(pause, run.heartbeat * HEARTBEAT_SHARE)
    return pause


def worker_of(runs: Callable[[str], WatchedRun | None]) -> Callable[[str], Mapping[str, Any]]:
    """Return what adapters ask by: a job's id to what its worker has said of itself."""

    def find(job: str) -> Mapping[str, Any]:
        run = runs(job.partition("-")[0])
        return run.worker if run is not None else {}

    return find
