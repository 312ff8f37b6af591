"""Wove, this one and the published 2.0.3: asyncio callers of an environment."""

import asyncio
import gc
import time

from bench_tasks import nap, noop
from drive import Clock, percentiles

#: Seconds between two looks at whether the loop is still moving.
TICK = 0.001


class Wove:
    """This project, by its handle."""

    def __init__(self, definition):
        self.definition = definition

    async def open(self):
        """Start the environment."""
        from wove import ExecutorRuntime

        self.runtime = ExecutorRuntime({"there": self.definition})
        await self.runtime.start()
        self.call = self.runtime["there"].run

    async def throughput(self, count):
        """All calls at once."""
        return await self.all_of(noop, count)

    async def naps(self, count):
        """The same with tasks of 100 ms."""
        return await self.all_of(nap, count)

    async def map(self, count):
        """As many items through ``map``, which batches as it sees fit."""
        with Clock() as clock:
            async with asyncio.timeout(patience(count)):
                values = [value async for value in self.runtime["there"].map(noop, range(count))]
        check(values, range(count))
        return clock.figures

    async def latency(self, count):
        """One call after another."""
        taken = []
        for number in range(count):
            begun = time.perf_counter()
            check([await self.call(noop, number)], [number])
            taken.append(time.perf_counter() - begun)
        return percentiles(taken)

    async def window(self, count, limit):
        """As many calls, so many of them in flight at once."""
        numbers = iter(range(count))

        async def caller():
            for number in numbers:
                await self.call(noop, number)

        with Clock() as clock:
            async with asyncio.timeout(patience(count)):
                await asyncio.gather(*(caller() for _ in range(limit)))
        return clock.figures

    async def stall(self, count):
        """The longest time that the loop stood still while as many calls were submitted and came back."""
        longest = 0.0
        gc.collect()  # Python's own stops, which any program has, are not what is asked for

        async def tick():
            nonlocal longest
            while True:
                begun = time.perf_counter()
                await asyncio.sleep(TICK)
                longest = max(longest, time.perf_counter() - begun - TICK)

        ticking = asyncio.ensure_future(tick())
        await asyncio.sleep(5 * TICK)
        await self.all_of(noop, count)
        ticking.cancel()
        return {"stall": 1000 * longest}

    async def all_of(self, func, count):
        with Clock() as clock:
            calls = [asyncio.ensure_future(self.call(func, number)) for number in range(count)]
            _, lost = await asyncio.wait(calls, timeout=patience(count))
        if lost:
            for call in lost:
                call.cancel()
            raise RuntimeError(f"{len(lost)} of {count} calls have no outcome after {patience(count):.0f} s")
        check([call.result() for call in calls], range(count))
        return clock.figures

    async def array(self, mebibytes):
        """Send an array there and back: seconds, and by how much this process grew meanwhile at its peak."""
        import numpy

        resident = memory("VmRSS")
        sent = numpy.arange(mebibytes * 1024 * 1024 // 8, dtype="float64")
        with Clock() as clock:
            async with asyncio.timeout(patience(1000)):
                back = await self.call(noop, sent)
        if back.nbytes != sent.nbytes or back[-1] != sent[-1] or back[0] != sent[0]:
            raise RuntimeError("the array came back changed")
        return {**clock.figures, "grown": memory("VmHWM") - resident}


class Peer(Wove):
    """Wove 2.0.3, by the call that its own ``weave`` makes."""

    async def open(self):
        """Start the environment."""
        from wove.environment import ExecutorRuntime

        _mend_job_ids()
        self.runtime = ExecutorRuntime(environment_definitions={"there": self.definition}, run_config={})
        await self.runtime.start()

    async def call(self, func, value):
        return await self.runtime.run_task(
            task_name=func.__name__,
            task_func=func,
            task_args={"value": value},
            task_info={"environment": "there"},
        )


def _mend_job_ids():
    # 2.0.3 names its jobs "task:id", and RQ 2.12 and later take no colon.
    from wove.integrations.rq import RQAdapter

    submit = RQAdapter.submit

    async def mended(self, payload, frame):
        return await submit(self, payload, {**frame, "run_id": frame["run_id"].replace(":", "-")})

    RQAdapter.submit = mended


def patience(count):
    """Return the seconds that as many calls may take, even while others keep the machine busy."""
    return 20 + count / 20


def check(values, expected):
    """Raise unless the calls returned what they should."""
    if list(values) != list(expected):
        raise RuntimeError("the results are not those of the calls")


def memory(field):
    """Return a figure of this process's memory, in bytes: ``VmRSS`` or ``VmHWM``."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
