"""A large array there and back: seconds, and what caller and worker hold at their peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parts.figures import Row, Want
from parts.fleets import FleetStarter
from parts.processes import memory, say

if TYPE_CHECKING:
    from parts.fleets import Bench, Lane

MEBIBYTE = 1024 * 1024


def array_rows(bench: Bench) -> list[Row]:
    """Measure with fresh processes each time: a peak is that of a process's whole life."""
    size = bench.scale.mebibytes
    group = "Large values, Celery"
    title = f"{size} MiB array"
    seconds = Row("array", group, f"{title} there and back", "s", [Want(0.6), Want(8, "peer")], any_want=True)
    again = Row("array-again", group, "the same, second time", "s")
    caller = Row("array-caller", group, "peak memory of the caller, in arrays", "x", [Want(2.5)])
    worker = Row("array-worker", group, "peak memory of the worker, in arrays", "x", [Want(2.5)])
    rows = [seconds, again, caller, worker]

    def measure(lane: Lane) -> None:
        lane.work("array", mebibytes=1)  # imports NumPy on both sides
        before = {pid: memory(pid, "VmRSS") for pid in lane.worker.members()}
        figures = lane.work("array", mebibytes=size)
        grown = max(memory(pid, "VmHWM") - resident for pid, resident in before.items())
        seconds.add(lane.name, figures["seconds"])
        caller.add(lane.name, figures["grown"] / MEBIBYTE / size)
        worker.add(lane.name, grown / MEBIBYTE / size)
        again.add(lane.name, lane.work("array", mebibytes=size)["seconds"])

    for number in range(bench.scale.few_rounds):
        say(f"  array: round {number + 1} of {bench.scale.few_rounds}")
        with FleetStarter(bench) as starter:
            fleet = starter.celery(concurrency=1, contenders=("peer", "wove"))

            def turn(lane: Lane) -> tuple[()]:
                measure(lane)
                return ()

            fleet.race(1, turn)
            for row in rows:
                row.failures.update(fleet.failures())
    return rows
