"""How much is measured: enough for figures that hold, for a first look, or for a test of the harness itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Counts and times of one run of the benchmark.

    Args:
        name: what the report calls it.
        rounds: rounds of the comparisons.
        few_rounds: rounds of what takes long.
        light_rounds: rounds of what is over in a moment.
        celery: no-ops at once, on Celery.
        simple: the same on RQ's SimpleWorker.
        fork: the same on RQ's forking worker.
        items: items of a ``map`` at most; fewer where they would take much longer than ``map_seconds``.
        map_seconds: see there.
        calls: calls one after another; a fifth of them where each forks.
        naps: tasks of 100 ms on 50 threads.
        mebibytes: size of the array.
        stalls: submissions during which the loop is watched.
        held: runs in flight at once.
        requests: requests to the callback server, of each kind.
        imports: fresh processes for each import.
    """

    name: str
    rounds: int
    few_rounds: int
    light_rounds: int
    celery: int
    simple: int
    fork: int
    items: int
    map_seconds: float
    calls: int
    naps: int
    mebibytes: int
    stalls: int
    held: int
    requests: int
    imports: int


FULL = Scale(
    "full", rounds=5, few_rounds=3, light_rounds=5, celery=1000, simple=500, fork=200, items=10_000, map_seconds=3.0, calls=300,
    naps=1000, mebibytes=64, stalls=500, held=10_000, requests=4000, imports=7,
)  # fmt: skip
QUICK = Scale(
    "quick", rounds=3, few_rounds=1, light_rounds=3, celery=300, simple=200, fork=50, items=10_000, map_seconds=0.7, calls=100,
    naps=1000, mebibytes=64, stalls=500, held=4000, requests=800, imports=2,
)  # fmt: skip
#: What it measures says nothing; that it runs through does.
TINY = Scale(
    "tiny", rounds=1, few_rounds=1, light_rounds=1, celery=10, simple=10, fork=4, items=40, map_seconds=0.2, calls=10,
    naps=10, mebibytes=1, stalls=10, held=50, requests=80, imports=1,
)  # fmt: skip
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
