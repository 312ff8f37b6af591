"""What one short, unbatched task costs each process, in microseconds of CPU time: raw Celery or RQ, and Wove.

    .venv/bin/python benchmarks/hot_path.py celery
    .venv/bin/python benchmarks/hot_path.py rq --tasks 200

Both go through the same workers on the same Redis, in turns. CPU time of the submitter, Redis, the worker's parent
and its children, divided by the tasks, is what neighbours on the machine disturb least; rates stand beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
TICK = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu(pid: int, *, dead_children: bool = False) -> float:
    """Return the CPU seconds of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = int(fields[11]) + int(fields[12])
    return (own + (int(fields[13]) + int(fields[14]) if dead_children else 0)) / TICK


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def process(command: list[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A fleet's modules are compiled once, and not by each work horse anew.
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **variables},
            cwd=HERE,
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class Meter:
    """CPU time by role."""

    def __init__(self, redis: int, worker: int, *, forks: bool) -> None:
        self._redis, self._worker, self._forks = redis, worker, forks

    def read(self) -> dict[str, float]:
        used = {"submitter": time.process_time(), "redis": cpu(self._redis), "parent": cpu(self._worker)}
        if self._forks:
            used["children"] = cpu(self._worker, dead_children=True) - used["parent"]
        else:
            used["children"] = sum(cpu(pid) for pid in children(self._worker))
        return used


def raw_celery(app: Any, task: Any) -> tuple[Callable[[int], None], Callable[[int], list[float]]]:
    def many(count: int) -> None:
        for result in [task.delay(n) for n in range(count)]:
            result.get(timeout=120)

    def single(count: int) -> list[float]:
        times = []
        for n in range(count):
            begun = time.perf_counter()
            task.delay(n).get(timeout=60)
            times.append(time.perf_counter() - begun)
        return times

    return many, single


def raw_rq(queue: Any, func: Any) -> tuple[Callable[[int], None], Callable[[int], list[float]]]:
    def many(count: int) -> None:
        jobs = [queue.enqueue(func, n) for n in range(count)]
        while jobs[-1].get_status() != "finished":
            time.sleep(0.005)

    def single(count: int) -> list[float]:
        times = []
        for n in range(count):
            begun = time.perf_counter()
            job = queue.enqueue(func, n)
            while job.get_status() != "finished":
                time.sleep(0.001)
            times.append(time.perf_counter() - begun)
        return times

    return many, single


async def measure(
    name: str, meter: Meter, rounds: int, tasks: int, trips: int, raw: Any, config: Any, func: Any
) -> None:
    import wove

    raw_many, raw_single = raw
    runtime = wove.ExecutorRuntime({"fleet": {"executor": name, "executor_config": config}})
    figures: dict[str, dict[str, list[float]]] = {"raw": {}, "wove": {}}

    def note(kind: str, used: dict[str, float]) -> None:
        for key, value in used.items():
            figures[kind].setdefault(key, []).append(value)

    async with runtime:

        async def call(n: int) -> Any:
            return await runtime["fleet"].run(func, n)

        async def wove_many(count: int) -> None:
            await asyncio.gather(*(call(n) for n in range(count)))

        async def wove_single(count: int) -> list[float]:
            times = []
            for n in range(count):
                begun = time.perf_counter()
                await call(n)
                times.append(time.perf_counter() - begun)
            return times

        await wove_many(min(50, tasks))
        raw_many(min(50, tasks))
        for round_ in range(rounds):
            for kind in ("raw", "wove") if round_ % 2 else ("wove", "raw"):
                before, begun = meter.read(), time.perf_counter()
                if kind == "raw":
                    raw_many(tasks)
                else:
                    await wove_many(tasks)
                took = time.perf_counter() - begun
                after = meter.read()
                used = {key: (after[key] - before[key]) / tasks * 1e6 for key in after}
                note(kind, {**used, "all": sum(used.values()), "tasks/s": tasks / took})
                times = raw_single(trips) if kind == "raw" else await wove_single(trips)
                note(kind, {"p50 us": statistics.median(times) * 1e6})
    show(f"{name}: us of CPU time per task, median of {rounds} rounds of {tasks}", figures)


def show(title: str, figures: dict[str, dict[str, list[float]]]) -> None:
    print(title)
    for key in figures["raw"]:
        raw_value, own = (statistics.median(figures[kind][key]) for kind in ("raw", "wove"))
        ratios = [b / a for a, b in zip(figures["raw"][key], figures["wove"][key], strict=True) if a]
        ratio = statistics.median(ratios) if ratios else 0.0
        print(f"  {key:10s} raw {raw_value:8.0f}   wove {own:8.0f}   x {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("celery", "rq"))
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trips", type=int, default=100)
    parser.add_argument("--preload", metavar="MODULE", help="RQ: what the parent imports before it forks")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"
        os.environ["HOT_PATH_REDIS"] = url
        os.environ["WOVE_SECRET"] = "bench:" + "s" * 40
        sys.path.insert(0, str(HERE))
        redis = stack.enter_context(
            process(
                ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder)], folder / "redis"
            )
        )
        import redis as client

        connection = client.Redis.from_url(url)
        while True:
            try:
                connection.ping()
                break
            except client.ConnectionError:
                time.sleep(0.05)
        variables = {"PYTHONPATH": str(HERE)}
        import hot_path_tasks

        if arguments.backend == "celery":
            import hot_path_celery

            command = [
                sys.executable, "-m", "celery", "-A", "hot_path_celery", "worker", "-I", "wove.worker.celery", "-c", "2", "-P",
                "prefork", "-l", "warning",
            ]  # fmt: skip
            raw = raw_celery(hot_path_celery.app, hot_path_celery.celery_noop)
            config: dict[str, Any] = {"broker_url": url}
        else:
            from rq import Queue

            command = [str(Path(sys.executable).parent / "rq"), "worker", "-u", url, "--quiet"]
            if arguments.preload:
                command += ["-c", arguments.preload]
            raw = raw_rq(Queue(connection=connection), hot_path_tasks.noop)
            config = {"redis_url": url}
        worker = stack.enter_context(process(command, folder / "worker", **variables))
        meter = Meter(redis.pid, worker.pid, forks=arguments.backend == "rq")
        tasks = arguments.tasks or (1500 if arguments.backend == "celery" else 30)
        asyncio.run(
            measure(
                arguments.backend,
                meter,
                arguments.rounds,
                tasks,
                arguments.trips,
                raw,
                config,
                hot_path_tasks.noop,
            )
        )


if __name__ == "__main__":
    main()
