"""The demo's three acts: a lot of work, a failing call, a cancelled call."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from wove import ExecutorRuntime
from wove.demo import analysis

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wove.demo.fleets import Fleet
    from wove.demo.screen import Bars, Screen
    from wove.handle import EnvironmentHandle

    # What was found, and in how many seconds.
    _Row = tuple[analysis.Facts, float]

# RQ forks a process per job, so a job should be worth a fork.
_FILES_PER_TASK = 20
_SLOW_FILES = 80
_SLOW_SECONDS = 0.05
_DELIVERY_SECONDS = 60.0
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.02


async def play(screen: Screen, fleets: list[Fleet], modules: int | None = None) -> bool:
    """Run all acts, with at most ``modules`` files; return whether everything came out as it should."""
    environments: dict[str, Mapping[str, Any]] = {fleet.name: fleet.environment for fleet in fleets}
    environments["local"] = {"executor": "local"}
    passed = True
    async with ExecutorRuntime(environments) as runtime:
        passed &= await _analyse(screen, runtime, fleets, analysis.standard_library()[:modules])
        passed &= await _fail(screen, runtime, fleets[0])
        passed &= await _cancel(screen, runtime, fleets[-1])
    return passed


async def _analyse(screen: Screen, runtime: ExecutorRuntime, fleets: list[Fleet], paths: list[str]) -> bool:
    shares = {fleet.name: paths[number :: len(fleets)] for number, fleet in enumerate(fleets)}
    screen.title(f"Modules of the standard library: {len(paths):,}, up to {_FILES_PER_TASK} per task")
    rows = await _spread(screen, runtime, shares)

    screen.title('The same in this process, to compare: runtime["local"]')
    local = {}
    with screen.bars({"local": len(paths)}, "files") as bars:
        for name, share in shares.items():
            # One at a time: threads would only take turns.
            local[name] = await _analyse_share(runtime["local"], share, bars, in_flight=1)

    screen.table({**rows, "local": _together(local, one_after_another=True)})
    passed = True
    for name, (facts, _) in local.items():
        same = facts == rows[name][0]
        passed &= same
        screen.check(
            same, f"the totals of {name} {'match' if same else 'differ from'} a local run over its files"
        )
    unparsable = sum(facts["unparsable"] for facts, _ in local.values())
    if unparsable:
        screen.line(f"{unparsable} of the files do not parse, on purpose: the parser is tested with them")
    return passed


async def _spread(
    screen: Screen, runtime: ExecutorRuntime, shares: Mapping[str, list[str]]
) -> dict[str, _Row]:
    with screen.bars({name: len(share) for name, share in shares.items()}, "files") as bars:
        found = await asyncio.gather(
            *(_analyse_share(runtime[name], share, bars) for name, share in shares.items())
        )
    rows = dict(zip(shares, found, strict=True))
    return rows if len(rows) == 1 else {**rows, "together": _together(rows)}


def _together(rows: Mapping[str, _Row], *, one_after_another: bool = False) -> _Row:
    total = analysis.nothing()
    for facts, _ in rows.values():
        total = analysis.add(total, facts)
    seconds = [seconds for _, seconds in rows.values()]
    return total, sum(seconds) if one_after_another else max(seconds)


async def _analyse_share(
    handle: EnvironmentHandle, paths: list[str], bars: Bars, in_flight: int | None = None
) -> _Row:
    tasks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]
    total = analysis.nothing()
    began = time.perf_counter()
    async for facts in handle.map(analysis.analyse_all, tasks, ordered=False, in_flight=in_flight):
        total = analysis.add(total, facts)
        bars.advance(handle.name, facts["files"])
    return total, time.perf_counter() - began


async def _fail(screen: Screen, runtime: ExecutorRuntime, fleet: Fleet) -> bool:
    screen.title(f"A task that fails, on {fleet.name}: await run(find_class, 'analysis.py', 'Zen')")
    try:
        await runtime[fleet.name].run(analysis.find_class, analysis.__file__, "Zen")
    except analysis.ClassNotFoundError as error:
        screen.remote_error(error)
        return True
    screen.check(False, "the task did not fail")
    return False


async def _cancel(screen: Screen, runtime: ExecutorRuntime, fleet: Fleet) -> bool:
    screen.title(f"A task that is cancelled half-way, on {fleet.name}")
    journal = fleet.worker.folder / "journal"
    half = asyncio.Event()
    with screen.bars({fleet.name: _SLOW_FILES}, "files") as bars:

        def on_progress(frame: Mapping[str, Any]) -> None:
            fraction = frame.get("fraction") or 0.0
            bars.reach(fleet.name, round(fraction * _SLOW_FILES))
            if fraction >= 0.5:
                half.set()

        handle = runtime[fleet.name].options(on_progress=on_progress, delivery_timeout=_DELIVERY_SECONDS)
        paths = analysis.standard_library()[:_SLOW_FILES]
        task = asyncio.create_task(handle.run(analysis.analyse_slowly, paths, _SLOW_SECONDS, str(journal)))
        cancelled = await _cancel_when(half, task)
    screen.check(cancelled, "the caller's task is cancelled")
    verdict = await _read_when_written(journal)
    screen.check("stopped" in verdict, f"the worker says: {verdict or 'nothing'}")
    return cancelled and "stopped" in verdict


async def _cancel_when(event: asyncio.Event, task: asyncio.Task[Any]) -> bool:
    """Cancel a task once the event is set; tell whether it ended as cancelled. Its own failure is raised."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return True
    task.result()
    return False


async def _read_when_written(path: Path) -> str:
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        text = _read(path)
        if text or time.monotonic() > deadline:
            return text
        await asyncio.sleep(_POLL_SECONDS)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
