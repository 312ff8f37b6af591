"""What can be measured, in the order in which it is; those that share a fleet stand together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parts import ingest, large, starting, throughput

if TYPE_CHECKING:
    from collections.abc import Callable

    from parts.figures import Row
    from parts.fleets import Bench, Fleet, FleetStarter


@dataclass(frozen=True)
class Stage:
    """Some rows that are measured together.

    Args:
        key: what ``--only`` takes.
        title: what it is, for whoever waits.
        rows: measures them, on a fleet if there is one.
        fleet: which fleet it needs; None for none.
    """

    key: str
    title: str
    rows: Callable[..., list[Row]]
    fleet: str | None = None

    def start(self, starter: FleetStarter) -> Fleet:
        """Start the stage's fleet."""
        return _FLEETS[self.fleet or ""](starter)

    def measure(self, bench: Bench, fleet: Fleet | None) -> list[Row]:
        """Return the stage's rows, measured."""
        return self.rows(bench if fleet is None else fleet)


_FLEETS: dict[str, Callable[[FleetStarter], Fleet]] = {
    "celery": lambda starter: starter.celery(),
    "threads": lambda starter: starter.celery("threads", throughput.THREADS),
    "rq-fork": lambda starter: starter.rq(preload=True),
    "rq-simple": lambda starter: starter.rq("rq.SimpleWorker"),
}

STAGES = (
    Stage("celery", "no-ops on Celery", throughput.celery_rows, "celery"),
    Stage("stall", "the caller's event loop", throughput.stall_rows, "celery"),
    Stage("flat", "few and many runs in flight", throughput.window_rows, "celery"),
    Stage("threads", "tasks of 100 ms on 50 threads", throughput.threads_rows, "threads"),
    Stage("rq-fork", "no-ops on RQ, a fork per job", throughput.rq_fork_rows, "rq-fork"),
    Stage("rq-simple", "no-ops on RQ's SimpleWorker", throughput.rq_simple_rows, "rq-simple"),
    Stage("array", "a large array there and back", large.array_rows),
    Stage("start", "starting an environment", starting.start_rows),
    Stage("held", "many runs in flight", starting.memory_rows),
    Stage("ingest", "the callback server", ingest.ingest_rows),
    Stage("imports", "imports", starting.import_rows),
)
