"""What can be measured without a worker: starting environments, and holding runs in flight; as drive.py."""

import asyncio
import gc
import json
import os
import statistics
import sys
import time
import tracemalloc

from bench_tasks import noop
from drive_wove import memory

STARTS = 7
WARM_UP = 500
QUEUE = "celery"
PATIENCE = 120


class Lonely:
    """One contender without a fleet."""

    def __init__(self, kind, url):
        self.kind = kind
        self.definition = {"executor": "celery", "executor_config": {"broker_url": url}}
        self.url = url

    def runtime(self, name="there"):
        """Return a runtime that was not started."""
        if self.kind == "peer":
            from wove.environment import ExecutorRuntime

            return ExecutorRuntime(environment_definitions={name: self.definition}, run_config={})
        from wove import ExecutorRuntime

        return ExecutorRuntime({name: self.definition})

    async def starts(self):
        """Start environments; milliseconds."""
        runtime = self.runtime()  # `import wove` is measured elsewhere
        first = await timed(runtime.start)
        beside = []
        for number in range(STARTS):
            other = self.runtime(f"other-{number}")
            beside.append(await timed(other.start))
            await other.stop()
        await runtime.stop()
        second, stop = [], []
        for _ in range(STARTS):
            runtime = self.runtime()
            second.append(await timed(runtime.start))
            stop.append(await timed(runtime.stop))
        return {
            "first": first,
            "second": statistics.median(second),
            "beside": statistics.median(beside),
            "stop": statistics.median(stop),
        }

    async def hold(self, count, trace):
        """Submit runs that nobody takes; bytes that this process grew by."""
        self.started = self.runtime()
        await self.started.start()
        calls = await self.submit(WARM_UP, 0)
        if trace:
            tracemalloc.start()
            before = traced()
            tasks = [asyncio.ensure_future(bare(number)) for number in range(count)]
            await asyncio.sleep(0)
            alone = traced() - before
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            del tasks
        gc.collect()
        resident, held = memory("VmRSS"), traced() if trace else 0
        begun = time.perf_counter()
        calls += await self.submit(count, WARM_UP)
        figures = {"seconds": time.perf_counter() - begun}
        if trace:
            figures.update(traced=traced() - held, bare=alone)
        gc.collect()
        figures["rss"] = memory("VmRSS") - resident
        if any(call.done() for call in calls):
            raise RuntimeError("a run ended although there is no worker")
        return figures

    async def submit(self, count, already):
        """Begin calls and return when all of them are in the queue."""
        from redis import Redis

        calls = [asyncio.ensure_future(self.call(number)) for number in range(count)]
        with Redis.from_url(self.url) as connection:
            deadline = time.monotonic() + PATIENCE
            while connection.llen(QUEUE) < count + already:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{connection.llen(QUEUE)} of {count + already} runs have arrived")
                await asyncio.sleep(0.02)
        return calls

    async def call(self, number):
        if self.kind == "peer":
            return await self.started.run_task(
                task_name="noop",
                task_func=noop,
                task_args={"value": number},
                task_info={"environment": "there"},
            )
        return await self.started["there"].run(noop, number)


async def bare(number):
    """Wait as a caller waits, for nothing."""
    return await asyncio.get_running_loop().create_future()


def traced():
    """Return what Python's allocator holds."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def timed(start):
    """Return how long it takes, in milliseconds."""
    begun = time.perf_counter()
    await start()
    return 1000 * (time.perf_counter() - begun)


async def main(replies):
    """Answer one question."""
    ask = json.loads(await asyncio.to_thread(sys.stdin.readline))
    contender = Lonely(**json.loads(sys.argv[1]))
    try:
        answer = await getattr(contender, ask.pop("do"))(**ask)
    except Exception as exc:
        answer = {"error": f"{type(exc).__name__}: {exc}"[:300]}
    print(json.dumps(answer), file=replies, flush=True)
    # Thousands of runs are open, on purpose; nobody waits for them.
    os._exit(0)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        asyncio.run(main(stream))
