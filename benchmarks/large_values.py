"""A large array there and back over Celery: seconds, and the memory that either side takes for it.

    python benchmarks/large_values.py [rounds] [MiB]

Each round is a submitter and a worker of their own. ``peak`` is what a process held at most (VmHWM) above
what it held before, as a multiple of the array; the submitter's array is in it, the worker's result too.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

WARM_UP = 3


async def one_round(broker: str, mebibytes: int) -> dict[str, float]:
    # On the path of both processes of a round, not of the one that starts them.
    import large_tasks
    import numpy as np

    from wove import ExecutorRuntime

    definition = {
        "executor": "celery",
        "executor_config": {"broker_url": broker},
        "delivery_timeout": 120,
    }
    async with ExecutorRuntime({"fleet": definition}) as runtime:
        fleet = runtime["fleet"]
        for _ in range(WARM_UP):
            await fleet.run(large_tasks.double, np.zeros(4))
        worker_base = await fleet.run(large_tasks.begin)
        own_base = large_tasks.begin()
        worker_cpu, own_cpu = await fleet.run(time.process_time), time.process_time()
        array = np.arange(mebibytes * 2**17, dtype=np.float64)
        begun = time.perf_counter()
        result = await fleet.run(large_tasks.double, array)
        seconds = time.perf_counter() - begun
        own_cpu = time.process_time() - own_cpu
        own_peak = large_tasks.peak() - own_base
        worker_cpu = await fleet.run(time.process_time) - worker_cpu
        worker_peak = await fleet.run(large_tasks.peak) - worker_base
        if not (result.flags.writeable and np.array_equal(result, array * 2)):
            raise SystemExit("the array came back changed")
        size = array.nbytes
        return {
            "seconds": seconds,
            "submitter_peak": own_peak / size,
            "worker_peak": worker_peak / size,
            "submitter_cpu": own_cpu,
            "worker_cpu": worker_cpu,
            "aligned": float(result.flags.aligned),
        }


def main() -> None:
    from wove.demo.processes import CeleryWorker, RedisServer

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    mebibytes = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    path = os.pathsep.join(filter(None, [str(HERE / "executors_parts"), os.environ.get("PYTHONPATH")]))
    taken = []
    env = {"PYTHONPATH": path}
    with RedisServer() as redis:
        for _ in range(rounds):
            with CeleryWorker(redis.url, concurrency=1, env=env):
                command = [sys.executable, __file__, "--submit", redis.url, str(mebibytes)]
                done = subprocess.run(
                    command, env={**os.environ, **env}, check=True, capture_output=True, text=True
                )
                taken.append(json.loads(done.stdout))
            print("  ".join(f"{name} {value:.2f}" for name, value in taken[-1].items()))
    print(f"median of {rounds}, {mebibytes} MiB:")
    for name in taken[0]:
        print(f"  {name:15} {statistics.median(row[name] for row in taken):6.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--submit"]:
        print(json.dumps(asyncio.run(one_round(sys.argv[2], int(sys.argv[3])))))
    else:
        main()
