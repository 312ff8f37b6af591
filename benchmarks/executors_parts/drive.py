"""Measures one environment of whichever Wove this interpreter has. Started by executors.py, which says when.

Reads one request per line, as JSON, and answers each with one line: ``{"measure": "latency", "calls": 200}`` with
the times of that many calls one after another, in milliseconds; ``"throughput"`` with calls a second;
``"array"`` with the seconds of one round trip. What cannot be measured is answered with ``{"fails": why}``.
"""

import asyncio
import json
import sys
import time

from bench_tasks import noop

SECONDS = 60
#: Bytes of the array that goes there and back.
ARRAY_BYTES = 64 * 1024 * 1024


async def latency(call, options):
    """Return the times of calls one after another, in milliseconds."""
    took = []
    for number in range(options["calls"]):
        begun = time.perf_counter()
        await call(number)
        took.append((time.perf_counter() - begun) * 1000)
    return took


async def throughput(call, options):
    """Return calls a second."""
    calls = options["calls"]
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

    sent = numpy.arange(ARRAY_BYTES // 8, dtype="float64")
    begun = time.perf_counter()
    back = await call(sent)
    took = time.perf_counter() - begun
    if back.nbytes != sent.nbytes or back[-1] != sent[-1]:
        raise RuntimeError("came back changed")
    return took


MEASURES = {"latency": latency, "throughput": throughput, "array": array}


async def measured(call, options):
    """Return a figure, or why there is none."""
    try:
        return await asyncio.wait_for(MEASURES[options["measure"]](call, options), SECONDS)
    except TimeoutError:
        return {"fails": f"no end within {SECONDS} s"}
    except Exception as exc:
        return {"fails": f"fails: {type(exc).__name__}"}


async def main(definition):
    """Answer requests until there are no more."""
    from wove.environment import ExecutorRuntime

    loop = asyncio.get_running_loop()
    runtime = ExecutorRuntime(environment_definitions={"there": definition}, run_config={})
    await runtime.start()

    async def call(value):
        return await runtime.run_task(
            task_name="noop", task_func=noop, task_args={"value": value}, task_info={"environment": "there"}
        )

    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await measured(call, json.loads(line))), flush=True)
    try:
        await asyncio.wait_for(runtime.stop(), 10)
    except Exception as exc:  # what was measured counts
        print(exc, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
