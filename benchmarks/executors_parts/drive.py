"""Measures one environment of whichever Wove this interpreter has; prints JSON. Started by executors.py."""

import asyncio
import json
import statistics
import sys
import time

from bench_tasks import noop

SECONDS = 60
#: Calls one after another.
LATENCIES = 1_000
#: Calls before anything is measured, one after another and at once, and round trips of the array.
WARM_UP = 200
WARM_UP_AT_ONCE = 1_000
ARRAYS = 3


async def latency(call, options):
    """Return the sorted times of calls one after another, in seconds."""
    took = []
    for number in range(LATENCIES):
        begun = time.perf_counter()
        await call(number)
        took.append(time.perf_counter() - begun)
    return sorted(took)


async def throughput(call, options, calls=None):
    """Return calls a second."""
    calls = calls or options["calls"]
    numbers = iter(range(calls))

    async def caller():
        for number in numbers:
            await call(number)

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(options["concurrency"])))
    return calls / (time.perf_counter() - begun)


async def array(call, options):
    """Return the seconds that 64 MiB take there and back."""
    import numpy

    sent = numpy.arange(8 * 1024 * 1024, dtype="float64")
    took = []
    for _ in range(ARRAYS):
        begun = time.perf_counter()
        back = await call(sent)
        took.append(time.perf_counter() - begun)
        if back.nbytes != sent.nbytes or back[-1] != sent[-1]:
            raise RuntimeError("came back changed")
    return statistics.median(took)


async def measured(measure, call, options):
    """Return a figure, or why there is none."""
    try:
        return await asyncio.wait_for(measure(call, options), SECONDS)
    except TimeoutError:
        return f"no end within {SECONDS} s"
    except Exception as exc:
        return f"fails: {type(exc).__name__}"


async def main(options):
    """Print what was measured."""
    from wove.environment import ExecutorRuntime

    runtime = ExecutorRuntime(environment_definitions={"there": options["definition"]}, run_config={})
    await runtime.start()

    async def call(value):
        return await runtime.run_task(
            task_name="noop", task_func=noop, task_args={"value": value}, task_info={"environment": "there"}
        )

    for _ in range(WARM_UP):
        await call(0)
    await throughput(call, options, WARM_UP_AT_ONCE)
    took = await measured(latency, call, options)
    found = {
        "p50_ms": took[LATENCIES // 2] * 1000 if isinstance(took, list) else took,
        "p99_ms": took[LATENCIES * 99 // 100] * 1000 if isinstance(took, list) else took,
        "per_second": await measured(throughput, call, options),
        "array_s": await measured(array, call, options),
    }
    print(json.dumps(found), flush=True)
    try:
        await asyncio.wait_for(runtime.stop(), 10)
    except Exception as exc:  # what was measured counts
        print(exc, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
