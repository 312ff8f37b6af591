"""The callers: they call one thing after the other, and wait for each outcome as long as was promised."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from wove import ConfigurationError, ExecutorRuntime
from wove_tests.chaos import tasks
from wove_tests.chaos.fleet import RQ
from wove_tests.chaos.ledger import GRACE, Call, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from wove.handle import EnvironmentHandle

#: Share of calls that their caller cancels, that may be sent again, and that several callers share.
CANCELLED, RETRIED, SHARED = 0.06, 0.3, 0.05
RETRIES = 2
CANCEL_SECONDS = 5.0
#: Seconds that a caller whose call was refused waits before the next.
REFUSED_PAUSE = 0.3
#: Seconds that a call which was given up may take to go.
GIVE_UP_SECONDS = 3.0


class Job(NamedTuple):
    """What is to be called: a function and the arguments after its key."""

    kind: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    seconds: float
    deadline: float


def _short(pick: random.Random) -> Job:
    luck = pick.random()
    if luck < 0.08:
        return Job("fail", tasks.fail, (pick.randrange(1_000),), 0.0, 10.0)
    if luck < 0.14:
        return Job("mirror", tasks.mirror, (pick.randbytes(pick.randint(80_000, 400_000)),), 0.02, 10.0)
    return Job("noop", tasks.noop, (pick.randrange(1_000),), 0.0, 10.0)


def _medium(pick: random.Random) -> Job:
    seconds = pick.uniform(0.05, 0.3)
    func = pick.choice([tasks.sleep, tasks.sleep_async, tasks.work])
    return Job("medium", func, (pick.randrange(1_000), seconds), seconds, 12.0)


def _long(pick: random.Random) -> Job:
    if pick.random() < 0.3:
        return Job("work", tasks.work, (pick.randrange(1_000), 1.5), 1.5, 24.0)
    seconds = pick.uniform(2.0, 4.0)
    func = pick.choice([tasks.sleep, tasks.sleep_async])
    return Job("long", func, (pick.randrange(1_000), seconds), seconds, 24.0)


def _burst(pick: random.Random) -> list[Job]:
    """Return calls of one function that are made at once, and so travel together."""
    luck, count = pick.random(), pick.randint(4, 24)
    if luck < 0.2:
        return [Job("fail", tasks.fail, (pick.randrange(1_000),), 0.0, 12.0) for _ in range(count)]
    if luck < 0.5:
        func = pick.choice([tasks.sleep, tasks.sleep_async])
        lengths = [pick.choice([0.002, 0.01, 0.05, 0.3]) for _ in range(count)]
        return [Job("medium", func, (pick.randrange(1_000), length), length, 16.0) for length in lengths]
    return [Job("noop", tasks.noop, (pick.randrange(1_000),), 0.0, 12.0) for _ in range(count)]


#: How many callers of each sort an environment has, at once.
CALLERS: dict[str, tuple[tuple[Callable[[random.Random], Job], int], ...]] = {
    RQ: ((_short, 4), (_medium, 1), (_long, 1)),
    "": ((_short, 8), (_medium, 2), (_long, 1)),
}


def accepts(**setting: Any) -> bool:
    """Tell whether this version of Wove takes a delivery setting."""
    try:
        ExecutorRuntime({}, setting)
    except ConfigurationError:
        return False
    return True


def _expected(job: Job, key: int) -> Any:
    if job.kind == "mirror":
        return tasks.mirrored(*job.args)
    if job.kind == "fail":
        return (key, *job.args)
    return tasks.answer(key, job.args[0])


class Load:
    """All callers of all environments.

    Args:
        handles: the environments by name.
        ledger: what is told of every call.
        seed: decides what is called, and when it is cancelled.
        most_runs: stop after so many; None for no limit.
    """

    def __init__(
        self, handles: Mapping[str, EnvironmentHandle], ledger: Ledger, seed: int, most_runs: int | None
    ) -> None:
        self._handles = handles
        self._ledger = ledger
        self._seed = seed
        self._most = most_runs
        self._keys = itertools.count()
        self._retries = accepts(delivery_retries=RETRIES)
        self._sharing = accepts(delivery_idempotency_key="chaos")
        self.enough = asyncio.Event()
        self.features = {"delivery_retries": self._retries, "delivery_idempotency_key": self._sharing}

    async def run(self) -> None:
        """Call until it is enough, then wait for the calls that are open."""
        callers = []
        for name, handle in self._handles.items():
            for sort, count in CALLERS.get(name, CALLERS[""]):
                for number in range(count):
                    pick = random.Random(f"{self._seed} {name} {sort.__name__} {number}")
                    callers.append(self._caller(handle, sort, pick))
            callers.append(self._burst_caller(handle, random.Random(f"{self._seed} {name} burst")))
        await asyncio.gather(*callers)

    async def _burst_caller(self, handle: EnvironmentHandle, pick: random.Random) -> None:
        while not self.enough.is_set():
            jobs = _burst(pick)
            settings: dict[str, Any] = {"delivery_timeout": jobs[0].deadline}
            if pick.random() < RETRIED and self._retries:
                settings["delivery_retries"] = RETRIES
            calls = []
            for job in jobs:
                key = next(self._keys)
                call = Call(key, handle.name, job.kind, _expected(job, key), 0.0, job.deadline, settings)
                leaves = pick.uniform(0.0, job.seconds * 1.3 + 0.05) if pick.random() < CANCELLED else None
                if leaves is not None:
                    call.cancel_mode, call.cancel_timeout = (
                        pick.choice(["best_effort", "require_ack"]),
                        CANCEL_SECONDS,
                    )
                calls.append(self._follow(call, handle, job, leaves))
            await asyncio.gather(*calls)
            await asyncio.sleep(pick.uniform(0.0, 0.2))

    async def _caller(
        self, handle: EnvironmentHandle, sort: Callable[[random.Random], Job], pick: random.Random
    ) -> None:
        while not self.enough.is_set():
            outcomes = await self._call(handle, sort(pick), pick)
            if self._most is not None and self._ledger.submitted >= self._most:
                self.enough.set()
            if "SubmitError" in outcomes:
                await asyncio.sleep(pick.uniform(0.5, 1.5) * REFUSED_PAUSE)

    async def _call(self, handle: EnvironmentHandle, job: Job, pick: random.Random) -> set[str]:
        key = next(self._keys)
        settings: dict[str, Any] = {"delivery_timeout": job.deadline}
        waiters = 1
        # Drawn whether it is used or not: the seed means the same to every version.
        retried, shared, many = pick.random() < RETRIED, pick.random() < SHARED, pick.randint(2, 4)
        if retried and self._retries:
            settings["delivery_retries"] = RETRIES
        if shared and self._sharing:
            settings["delivery_idempotency_key"] = f"chaos-{key}"
            waiters = many
        cancel_after = pick.uniform(0.0, job.seconds * 1.3 + 0.02) if pick.random() < CANCELLED else None
        mode = pick.choice(["best_effort", "require_ack"])
        calls = []
        for number in range(waiters):
            call = Call(key, handle.name, job.kind, _expected(job, key), 0.0, job.deadline, settings)
            call.waiters = waiters
            leaves = cancel_after if number == 0 else None
            if leaves is not None:
                call.cancel_mode, call.cancel_timeout = mode, CANCEL_SECONDS
            calls.append(self._follow(call, handle, job, leaves))
        ended = await asyncio.gather(*calls)
        if waiters > 1:
            self._ledger.compare(ended)
        return {call.outcome for call in ended}

    async def _follow(
        self, call: Call, handle: EnvironmentHandle, job: Job, cancel_after: float | None
    ) -> Call:
        settings = dict(call.settings)
        if cancel_after is not None:
            settings |= {
                "delivery_cancel_mode": call.cancel_mode,
                "delivery_cancel_timeout": call.cancel_timeout,
            }
        changed = handle.options(**settings)
        self._ledger.submitted += 1
        call.begun = time.monotonic()
        task = asyncio.create_task(changed.run(job.func, call.key, *job.args), name=f"call-{call.key}")

        def ended(_: asyncio.Task[Any]) -> None:
            call.ended = time.monotonic()

        task.add_done_callback(ended)
        if cancel_after is not None:
            await asyncio.wait([task], timeout=cancel_after)
            if not task.done():
                call.cancelled_at = time.monotonic()
                task.cancel()
        if not task.done():
            await asyncio.wait([task], timeout=max(0.0, call.due + GRACE - time.monotonic()))
        if task.done():
            self._ledger.note(call, task)
        else:
            await self._give_up(call, task)
        return call

    async def _give_up(self, call: Call, task: asyncio.Task[Any]) -> None:
        where = "; ".join(str(frame) for frame in task.get_stack(limit=3))
        task.cancel()
        await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
        after = "went when cancelled" if task.done() else "does not even go when cancelled"
        self._ledger.note_lost(call, f"no outcome {GRACE:g} s after it was due; {after}; was at {where}")
