"""An environment stops with many runs in flight. Row 38 of the fault matrix."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from redis import Redis
from rq.job import Job as RqJob
from wove_tests import deeds, tasks
from wove_tests.chaos.vitals import Vitals, tasks_left
from wove_tests.crew import FULL
from wove_tests.waiting import run_states, until

from wove import DeliveryOrphanedError, ExecutorRuntime
from wove.callback_server import hub
from wove.demo.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wove_tests.crew import Crew

pytestmark = pytest.mark.redis

RUNS = 200
#: Fleets that keep what nobody waits for, and how many tasks each runs at once.
SLOTS = {"celery-impatient": 2, "rq-impatient": 1}
#: Runs that are done in the end: RQ forks a process for each, and the tests wait for the last.
DONE = {"celery-impatient": RUNS, "rq-impatient": 60} if FULL else {"celery-impatient": 40, "rq-impatient": 8}


class Flight:
    """Many runs of an environment, of which the first are under way and the others wait."""

    def __init__(self, crew: Crew, name: str, folder: Path, policy: str, runs: int = RUNS) -> None:
        self._crew, self._name, self._runs = crew, name, runs
        self._port = free_port()
        self._definition = crew.definition(
            name, delivery_orphan_policy=policy, executor_config={"callback_port": self._port}
        )
        self._release = folder / "release"
        self.log = folder / "log"

    async def stop(self) -> list[Any]:
        """Begin, stop, and return what each caller got; nothing of it is left in this process."""
        # What the first environment of a process leaves for the next ones is no leak.
        async with ExecutorRuntime({"fleet": self._definition}) as runtime:
            assert await runtime["fleet"].run(tasks.double, 21) == 42
        before, tasks_before = Vitals.take(), tasks_left()
        runtime = ExecutorRuntime({"fleet": self._definition})
        await runtime.start()
        handle = runtime["fleet"]
        calls = [
            asyncio.create_task(handle.run(deeds.hold_number, str(self.log), str(self._release), number))
            for number in range(self._runs)
        ]
        slots = SLOTS[self._name]
        await until(lambda: len(self.started()) == slots, "the first ones run")
        await until(lambda: set(run_states(handle)) == {"started", "submitted"}, "all are accepted")
        begun = time.monotonic()
        await runtime.stop()
        assert time.monotonic() - begun < 5.0
        await asyncio.wait(calls, timeout=0.5)
        assert all(call.done() for call in calls), "nobody waits any longer"
        results = await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: tasks_left() == tasks_before, "its tasks have ended")
        await until(lambda: Vitals.take().threads <= before.threads, "its threads have ended")
        await until(lambda: Vitals.take().descriptors <= before.descriptors, "what it had open is closed")
        return results

    def started(self) -> list[deeds.Line]:
        """What was begun."""
        return deeds.notes(self.log)

    async def land(self, *, heard: bool = True) -> None:
        """Let what goes on end.

        Args:
            heard: whether another submitter has the port by now: it knows of none of this, and says so. Without
                one each execution offers its outcome for a second before it is kept.
        """
        lease = hub.acquire("127.0.0.1", self._port) if heard else None
        self._release.touch()
        try:
            await until(lambda: self._crew.idle(self._name), "nothing is left in the queue", 40.0)
        finally:
            if lease is not None:
                lease.release()

    async def done(self) -> None:
        """Wait until each run was done by some execution."""
        await until(
            lambda: len({line.run_id for line in deeds.notes(self.log, "end")}) == self._runs,
            "all of it is done",
        )


def kept(crew: Crew, name: str) -> Callable[[str], Any]:
    """Return what tells how a backend keeps the outcome of a job: its value, or None while there is none."""
    if name == "rq-impatient":

        def of_rq(job: str) -> Any:
            with closing(Redis.from_url(crew.url(name))) as client:
                return RqJob.fetch(job, connection=client).return_value()

        return of_rq

    def of_celery(job: str) -> Any:
        with Celery("reader", backend=crew.url(name), set_as_current=False) as app:
            result = app.AsyncResult(job)
            return result.result if result.ready() else None

    return of_celery


@pytest.mark.parametrize("name", SLOTS)
class TestRow38:
    """Each policy does what it says."""

    @pytest.mark.parametrize(
        ("policy", "error"), [("cancel", asyncio.CancelledError), ("fail", DeliveryOrphanedError)]
    )
    async def test_row_38_cancel_and_fail_end_the_work(
        self, policy: str, error: type[BaseException], name: str, crew: Crew, tmp_path: Path
    ) -> None:
        flight = Flight(crew, name, tmp_path, policy)
        ended = await flight.stop()
        assert [type(each) for each in ended] == [error] * RUNS
        await flight.land()
        async with ExecutorRuntime({"fleet": crew.definition(name)}) as runtime:
            # Whatever was queued has had its turn when these are done.
            assert [each async for each in runtime["fleet"].map(tasks.double, range(4))] == [0, 2, 4, 6]
        assert len(flight.started()) == SLOTS[name], "what was queued never began"

    async def test_row_38_detached_work_is_done_and_kept(self, name: str, crew: Crew, tmp_path: Path) -> None:
        runs = DONE[name]
        flight = Flight(crew, name, tmp_path, "detach", runs)
        ended = await flight.stop()
        assert [type(each) for each in ended] == [DeliveryOrphanedError] * runs
        await flight.land()
        await flight.done()
        done = [line.run_id for line in flight.started()]
        assert len(set(done)) == len(done) == runs, "each once"
        assert {line.run_id for line in flight.started()} == {run for run in done if _names(ended, run)}
        find = kept(crew, name)
        numbers = [
            await until(lambda job=run: find(job) is not None and [find(job)], "it is kept") for run in done
        ]
        assert sorted(number for (number,) in numbers) == list(range(runs))

    async def test_row_38_requeued_work_is_begun_anew(self, name: str, crew: Crew, tmp_path: Path) -> None:
        runs = DONE[name]
        flight = Flight(crew, name, tmp_path, "requeue", runs)
        ended = await flight.stop()
        assert [type(each) for each in ended] == [DeliveryOrphanedError] * runs
        interrupted = {line.run_id for line in flight.started()}
        await flight.land()
        await flight.done()
        await until(
            lambda: interrupted <= {n.run_id for n in deeds.notes(flight.log, "end") if n.attempt == 2},
            "what had begun is done in another attempt",
        )
        waited = {line.run_id for line in flight.started()} - interrupted
        find = kept(crew, name)
        for run in interrupted:
            assert await until(lambda job=f"{run}-2": find(job) is not None and [find(job)], "it is kept")
        for run in waited:
            assert await until(lambda job=run: find(job) is not None and [find(job)], "it is kept")

    async def test_row_38_detached_work_is_kept_when_nobody_answers(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        flight = Flight(crew, name, tmp_path, "detach", 5)
        ended = await flight.stop()
        assert [type(each) for each in ended] == [DeliveryOrphanedError] * 5
        await flight.land(heard=False)
        await flight.done()
        find = kept(crew, name)
        for line in flight.started():
            assert await until(lambda job=line.run_id: find(job) is not None and [find(job)], "it is kept")


def _names(errors: list[Any], run_id: str) -> bool:
    return any(run_id in str(error) for error in errors)
