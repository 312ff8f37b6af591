"""The fleets: for each contender workers and a caller of its own, on one Redis server."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parts.processes import REMOTE, BenchError, Child, processor_seconds, say
from wove.demo.processes import CeleryWorker, ProcessError, RedisServer, RqWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Self

    from parts.figures import Row
    from parts.scale import Scale
    from wove.demo.managed import ManagedProcess

DATABASES = 256


@dataclass
class Lane:
    """One contender on one fleet: a caller, and the workers that run what it calls."""

    name: str
    caller: Child
    worker: ManagedProcess
    #: Why it is out of the race; None while it is in.
    failure: str | None = None

    def work(self, do: str, **options: Any) -> dict[str, Any]:
        """Have the caller do something; ``caller_cpu`` and ``worker_cpu`` then hold processor seconds.

        Raises:
            BenchError: it fails.
        """
        before = processor_seconds(self.worker.members())
        figures = self.caller.ask(do, **options)
        if "cpu" in figures:
            figures["caller_cpu"] = figures.pop("cpu")
            figures["worker_cpu"] = processor_seconds(self.worker.members()) - before
        return figures


class Bench:
    """One run of the benchmark: its scale, its Redis server, and who takes part.

    Args:
        scale: how much is measured.
        peer_python: the interpreter that has Wove 2.0.3; None leaves it out.
    """

    def __init__(self, scale: Scale, peer_python: str | None) -> None:
        self.scale = scale
        self.peer_python = peer_python
        self._redis = RedisServer(extra_args=("--databases", str(DATABASES)))
        self._database = itertools.count()

    def __enter__(self) -> Self:
        self._redis.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._redis.stop()

    def redis_url(self) -> str:
        """Return the URL of a database that nobody has used yet."""
        return f"redis://127.0.0.1:{self._redis.port}/{next(self._database) % DATABASES}"

    def caller(self, kind: str, url: str, definition: dict[str, Any] | None = None) -> Child:
        """Start a caller: ``raw-celery``, ``raw-rq``, ``peer`` or ``wove``."""
        python = self.peer_python if kind == "peer" else sys.executable
        options = json.dumps({"kind": kind, "redis_url": url, "definition": definition})
        command = [python or sys.executable, str(REMOTE / "drive.py"), options]
        return Child(command, kind, {"BENCH_REDIS_URL": url})


@dataclass
class Fleet:
    """What competes at one kind of worker; see :meth:`started`."""

    bench: Bench
    lanes: list[Lane] = field(default_factory=list)
    _rounds: int = 0

    def racing(self, *names: str) -> list[Lane]:
        """Return the lanes that take part, those of the given names or all."""
        return [lane for lane in self.lanes if lane.failure is None and (not names or lane.name in names)]

    def race(
        self, rounds: int, measure: Callable[[Lane], Iterable[tuple[Row, str, float]]], *names: str
    ) -> None:
        """Let the lanes take turns; who begins changes with each round.

        ``measure`` yields a row, the contender and its figure. Whoever fails is out from then on.
        """
        for _ in range(rounds):
            lanes = self.racing(*names)
            self._rounds += 1
            shift = self._rounds % max(1, len(lanes))
            for lane in lanes[shift:] + lanes[:shift]:
                try:
                    for row, contender, figure in measure(lane):
                        row.add(contender, figure)
                except BenchError as exc:
                    lane.failure = str(exc)
                    say(f"out of the race: {exc}")

    def warm_up(self, count: int, do: str = "throughput") -> None:
        """Have each lane do something before it is measured."""

        def warm(lane: Lane) -> Iterator[tuple[Row, str, float]]:
            lane.work(do, count=count)
            lane.work("latency", count=max(2, count // 10))
            yield from ()

        self.race(1, warm)

    def failures(self) -> dict[str, str]:
        """Return why which lane is out."""
        return {lane.name: lane.failure for lane in self.lanes if lane.failure is not None}


class FleetStarter:
    """Starts a fleet's workers side by side, then its callers; stops them in the end."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._stack = ExitStack()
        self._starting: list[tuple[str, str, ManagedProcess, str, dict[str, Any] | None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def celery(
        self,
        pool: str = "prefork",
        concurrency: int = 2,
        contenders: Sequence[str] = ("raw", "peer", "wove"),
    ) -> Fleet:
        """Start Celery workers for these contenders."""
        common: dict[str, Any] = {"pool": pool, "concurrency": concurrency, "cwd": REMOTE}
        for name in self._contenders(*contenders):
            url = self._bench.redis_url()
            env = {"BENCH_REDIS_URL": url}
            if name == "wove":
                worker = CeleryWorker(url, env=env, **common)
            else:
                worker = CeleryWorker(url, app=f"bench_{name}_celery", include=(), env=env, **common)
            definition = {"executor": "celery", "executor_config": {"broker_url": url}}
            self._start(name, "raw-celery" if name == "raw" else name, worker, url, definition)
        return self._fleet()

    def rq(self, worker_class: str | None = None, *, preload: bool = False) -> Fleet:
        """Start RQ workers for all contenders; with ``preload`` one more, which has made Wove ready before it forks."""
        names = ("raw", "peer", "wove", "preloaded") if preload else ("raw", "peer", "wove")
        for name in self._contenders(*names):
            url = self._bench.redis_url()
            extra = ("-c", "wove.worker.rq_preload") if name == "preloaded" else ()
            worker = RqWorker(url, worker_class=worker_class, cwd=REMOTE, extra_args=extra)
            definition = {"executor": "rq", "executor_config": {"redis_url": url}}
            kind = {"raw": "raw-rq", "peer": "peer"}.get(name, "wove")
            self._start(name, kind, worker, url, definition)
        return self._fleet()

    def _contenders(self, *names: str) -> list[str]:
        return [name for name in names if name != "peer" or self._bench.peer_python]

    def _start(
        self, name: str, kind: str, worker: ManagedProcess, url: str, definition: dict[str, Any]
    ) -> None:
        if name == "peer":
            worker.command[0] = self._bench.peer_python or ""
        worker.start()
        self._stack.callback(worker.stop)
        self._starting.append((name, kind, worker, url, definition))

    def _fleet(self) -> Fleet:
        fleet = Fleet(self._bench)
        for name, kind, worker, url, definition in self._starting:
            try:
                worker.wait_ready()
            except ProcessError as exc:
                raise BenchError(f"the worker of {name} does not start: {exc}") from exc
            caller = self._stack.enter_context(self._bench.caller(kind, url, definition))
            fleet.lanes.append(Lane(name, caller, worker))
        self._starting.clear()
        return fleet
