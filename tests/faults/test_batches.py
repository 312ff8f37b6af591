"""Runs that travel together: each keeps its own outcome, cancellation and worker's death."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import deeds, tasks
from wove_tests.waiting import run_states, until, until_exists

from wove import EncodeError, EnvironmentExecutionError, ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove_tests.crew import Crew

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

#: Runs in one message, in all of these tests.
TOGETHER = 10
#: How many tasks each fleet runs at once.
SLOTS = {"celery-prefork": 2, "rq-worker": 1}


@pytest.fixture(params=SLOTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def handle(name: str, crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    definition = crew.definition(name)
    config = {**definition["executor_config"], "batch": TOGETHER}
    async with ExecutorRuntime({"fleet": {**definition, "executor_config": config}}) as runtime:
        yield runtime["fleet"]


async def gathered(handle: EnvironmentHandle, func: Any, count: int = TOGETHER) -> list[Any]:
    """Run ``func`` with each number, in one message, and return results and exceptions."""
    return await asyncio.gather(*(handle.run(func, n) for n in range(count)), return_exceptions=True)


async def test_runs_travel_in_one_message(handle: EnvironmentHandle, tmp_path: Path) -> None:
    assert await gathered(handle, tasks.double) == [2 * n for n in range(TOGETHER)]
    assert await gathered(handle, deeds.number_async) == list(range(TOGETHER))
    log = str(tmp_path / "log")
    await gathered(handle, partial(deeds.mark, log))
    assert len({line.pid for line in deeds.notes(log, "start")}) == 1


async def test_each_keeps_its_error(handle: EnvironmentHandle, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    outcomes = await gathered(handle, partial(deeds.number_or_fail, log))
    for number, outcome in enumerate(outcomes):
        if number % 3:
            assert outcome == number
        else:
            assert isinstance(outcome, ValueError)
            assert str(outcome) == f"{number} is a multiple of three"
            assert any("attempt 1" in note for note in outcome.__notes__)
    assert [len(deeds.notes(log, f"start-{n}")) for n in range(TOGETHER)] == [1] * TOGETHER


async def test_what_does_not_travel_with_others_goes_alone(handle: EnvironmentHandle) -> None:
    large, lock, left, long, plain, *ids = await gathered(handle, deeds.strange)
    assert large == bytes(300_000)
    assert isinstance(lock, EnvironmentExecutionError | EncodeError)
    assert "lock" in str(lock)
    assert isinstance(left, EnvironmentExecutionError)
    assert left.payload["kind"] == "SystemExit"
    assert isinstance(long, ValueError)
    assert len(str(long)) == 100_000
    assert plain == {1, (2, 3)}
    assert len(set(ids)) == len(ids) == TOGETHER - 5


async def test_progress_comes_from_each(handle: EnvironmentHandle) -> None:
    seen: list[Any] = []
    outcomes = await gathered(handle.options(on_progress=seen.append), deeds.number_async)
    assert outcomes == list(range(TOGETHER))
    assert {frame["fraction"] for frame in seen} == {n / 100 for n in range(TOGETHER)}
    assert len({frame["run_id"] for frame in seen}) == TOGETHER


async def test_one_is_cancelled_while_it_runs(handle: EnvironmentHandle, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    calls = [
        asyncio.ensure_future(
            handle.options(delivery_cancel_mode="require_ack").run(deeds.until_told, log, n)
        )
        for n in range(TOGETHER)
    ]
    await until(lambda: deeds.notes(log, "start-0"), "the first of them runs")
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    assert await asyncio.gather(*calls[1:]) == ["not me"] * (TOGETHER - 1)
    await until(lambda: deeds.notes(log, "told"), "it was told")


async def test_one_that_waits_is_cancelled_and_never_starts(
    name: str, handle: EnvironmentHandle, tmp_path: Path
) -> None:
    log, release = str(tmp_path / "log"), tmp_path / "release"
    busy = []
    for n in range(SLOTS[name]):  # one after the other: each in a message of its own
        busy.append(
            asyncio.ensure_future(handle.run(tasks.touch_and_wait, str(tmp_path / f"{n}"), str(release)))
        )
        await until_exists(tmp_path / f"{n}")
    calls = [asyncio.ensure_future(handle.run(deeds.number_or_fail, log, n)) for n in range(TOGETHER)]
    await until(lambda: run_states(handle).count("submitted") == TOGETHER, "they wait")
    calls[5].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[5]
    release.touch()
    await asyncio.gather(*busy)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [outcomes[n] for n in (1, 2, 4, 7, 8)] == [1, 2, 4, 7, 8]
    assert [len(deeds.notes(log, f"start-{n}")) for n in range(TOGETHER)] == [
        int(n != 5) for n in range(TOGETHER)
    ]


# One RQ worker is one slot: there is nobody to give them to.
@pytest.mark.parametrize("name", ["celery-prefork"], indirect=True)
async def test_those_behind_a_long_one_are_given_back(handle: EnvironmentHandle, tmp_path: Path) -> None:
    log, release = str(tmp_path / "log"), tmp_path / "release"
    calls = [
        asyncio.ensure_future(handle.run(deeds.first_holds, log, str(release), n)) for n in range(TOGETHER)
    ]
    assert await asyncio.wait_for(asyncio.gather(*calls[1:]), 30) == list(range(1, TOGETHER))
    assert not calls[0].done()
    release.touch()
    assert await calls[0] == 0
    assert [len(deeds.notes(log, f"start-{n}")) for n in range(TOGETHER)] == [1] * TOGETHER


async def test_a_killed_worker_loses_those_it_had_not_reported(
    handle: EnvironmentHandle, tmp_path: Path
) -> None:
    outcomes = await gathered(handle, partial(deeds.number_or_die, str(tmp_path / "log")))
    lost = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, WorkerLostError)]
    assert 7 in lost
    assert all(outcomes[n] == n for n in range(TOGETHER) if n not in lost)
    assert "pid" in str(outcomes[7])


async def test_those_that_a_killed_worker_lost_are_submitted_again(
    handle: EnvironmentHandle, tmp_path: Path
) -> None:
    again = handle.options(delivery_retries=1)
    assert await gathered(again, partial(deeds.number_or_die, str(tmp_path / "log"))) == list(range(TOGETHER))


async def test_a_map_that_is_left_starts_no_more(handle: EnvironmentHandle, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    results = handle.map(partial(deeds.take, log, 0.02), range(500), in_flight=100)
    async for _ in results:
        break
    await results.aclose()
    await until(lambda: len(handle._dispatcher.table) == 0, "every run has ended")
    # What was under way may end; the rest never starts.
    assert await handle.run(tasks.double, 1) == 2
    assert len(deeds.notes(log, "start")) < 100
