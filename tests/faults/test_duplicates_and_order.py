"""Payloads and events come twice, late, and in any order. Rows 13-15, 30, 31 and 36 of the fault matrix."""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import signal
import threading
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from wove_tests import deeds, tasks
from wove_tests.callbacks import Sink, event, events_path, open_run, packed, post, signed
from wove_tests.crew import Crew, Job
from wove_tests.waiting import until, until_states

from wove import BackendAdapterEnvironmentExecutor, DeliveryTimeoutError, ExecutorRuntime, frames
from wove.adapters.celery import CeleryAdapter
from wove.adapters.memory import MemoryAdapter
from wove.adapters.rq import RqAdapter
from wove.worker import session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from wove.adapters.base import BackendAdapter
    from wove.callback_server.hub import Lease
    from wove.handle import EnvironmentHandle

redis = pytest.mark.redis


class Copying:
    """Hands each payload to the backend several times, and keeps it."""

    copies: ClassVar[int] = 1
    sent: ClassVar[list[tuple[bytes, Any]]] = []


class CopyingSoon(Copying):
    """With adapters that submit in the environment's loop."""

    async def submit_many(self, batch: Sequence[tuple[bytes, Any]]) -> list[Any]:
        self.sent.extend(batch)
        results: list[Any] = await super().submit_many(batch)
        for _ in range(self.copies - 1):
            await super().submit_many(batch)
        return results


class CopyingBlocking(Copying):
    """With adapters that submit in a thread of their caller's."""

    def submit_blocking(self, batch: Sequence[tuple[bytes, Any]]) -> list[Any]:
        self.sent.extend(batch)
        results: list[Any] = super().submit_blocking(batch)
        for _ in range(self.copies - 1):
            super().submit_blocking(batch)
        return results


class CopyingCelery(CopyingBlocking, CeleryAdapter):
    """On Celery."""


class CopyingRq(CopyingBlocking, RqAdapter):
    """On RQ."""


class CopyingMemory(CopyingSoon, MemoryAdapter):
    """In this process."""


COPYING: dict[str, type[BackendAdapter]] = {"celery": CopyingCelery, "rq": CopyingRq, "memory": CopyingMemory}


@asynccontextmanager
async def copying(crew: Crew, name: str, copies: int) -> AsyncIterator[EnvironmentHandle]:
    """An environment whose payloads reach the backend so many times."""
    Copying.copies, Copying.sent = copies, []
    memory = {"executor": "memory", "executor_config": {}, "delivery_timeout": 30}
    definition = memory if name == "memory" else crew.definition(name)
    kind = definition["executor"]
    executor = BackendAdapterEnvironmentExecutor(kind, adapter_class=COPYING[kind])
    async with ExecutorRuntime({"fleet": {**definition, "executor": executor}}) as runtime:
        yield runtime["fleet"]
        if name != "memory":
            # What is left of it would run, find nobody to report to, and keep its worker for minutes.
            await until(lambda: crew.at_rest(name), "every copy was taken, and has ended", 40.0)


async def deliver_again(crew: Crew, name: str) -> None:
    """Hand every payload to the backend once more, as a broker does that redelivers."""
    definition = crew.definition(name)
    plain = {"celery": CeleryAdapter, "rq": RqAdapter}[definition["executor"]]
    adapter = plain(name="again", config=definition["executor_config"], callback_url="", run_config={})
    await adapter.start()
    try:
        results = await adapter.submit_many(Copying.sent)
        assert not [each for each in results if isinstance(each, Exception)]
    finally:
        await adapter.close()
        adapter.release_threads()


class TestRow13DuplicatePayloads:
    """The broker delivers a payload more than once."""

    @pytest.mark.parametrize(
        "name",
        [
            "memory",
            *(pytest.param(each, marks=redis) for each in ("celery-prefork", "celery-threads", "rq-worker")),
        ],
    )
    async def test_row_13_three_copies_at_once_make_one_outcome(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        calls = 12 if name == "rq-worker" else 40
        async with copying(crew, name, 3) as handle:
            jobs = [Job(handle, tmp_path, f"job{n}", deeds.mark, n) for n in range(calls)]
            assert await asyncio.gather(*(job.call for job in jobs)) == list(range(calls))
            # What takes longer than a moment is done by one of them.
            long = [Job(handle, tmp_path, f"long{n}", deeds.take, 0.3, n) for n in range(2)]
            assert await asyncio.gather(*(job.call for job in long)) == [0, 1]
            assert len(handle._dispatcher.table) == 0

    @redis
    @pytest.mark.parametrize("name", ["celery-threads", "celery-prefork", "rq-worker"])
    async def test_row_13_a_copy_is_not_run_beside_the_first(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        with ExitStack() as stack:
            workers = [crew.slot(name).worker]
            if name == "rq-worker":  # it runs one job at a time
                workers.append(stack.enter_context(crew.new_worker(name)))
            async with copying(crew, name, 1) as handle:
                job = Job(handle, tmp_path)
                await job.running()
                seen = sum(worker.log_text().count("deeds.hold") for worker in workers)
                await deliver_again(crew, name)
                await until(
                    lambda: sum(worker.log_text().count("deeds.hold") for worker in workers) >= seen + 2,
                    "the copy was taken, and let go",
                )
                job.release()
                assert await job.call == "done"
                assert await handle.run(tasks.double, 21) == 42
                assert len(job.executions) == 1

    def test_row_13_the_successor_of_a_process_that_died_this_moment_is_not_sent_away(
        self, lease: Lease, sink: Sink
    ) -> None:
        run = open_run(lease, sink)
        first = http.client.HTTPConnection(lease.host, lease.port, timeout=10)
        body = packed([event(run, frames.TASK_STARTED)], execution="first")
        first.request("POST", events_path(run), body, signed(run, body, final=False))
        assert first.getresponse().status == 204
        first.close()
        body = packed([event(run, frames.TASK_STARTED, fence=True)], execution="second")
        # To be asked again in a moment, when it is known whether the first one lives.
        assert post(lease, run, body, final=False).status == 503

    @redis
    @pytest.mark.parametrize("name", ["celery-threads", "celery-prefork", "rq-worker"])
    async def test_row_31_a_replayed_payload_of_a_closed_run_does_not_run(
        self, name: str, crew: Crew, tmp_path: Path
    ) -> None:
        async with copying(crew, name, 1) as handle:
            jobs = [Job(handle, tmp_path, f"job{n}", deeds.mark, n) for n in range(5)]
            assert await asyncio.gather(*(job.call for job in jobs)) == list(range(5))
            for _ in range(2):
                await deliver_again(crew, name)
            await until(lambda: crew.idle(name), "every copy was taken")
            assert [result async for result in handle.map(tasks.double, range(8))] == [*range(0, 16, 2)]
            assert [len(job.executions) for job in jobs] == [1] * 5


class TestRow14Events:
    """Events come several times, in any order, from workers and from whoever has recorded them."""

    @pytest.fixture
    def repeated(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """Send each request three times, and older ones again in between; return the answers to copies."""
        pick, real, lock = random.Random(14), session.request, threading.Lock()
        past: list[tuple[Any, ...]] = []
        answers: list[int] = []

        def request(*arguments: Any, **options: Any) -> Any:
            with lock:
                past.append((arguments, options))
                older = pick.sample(past, min(3, len(past)))
            for before, settings in older:
                answers.append(real(*before, **settings).status)
            reply = real(*arguments, **options)
            for _ in range(2):
                answers.append(real(*arguments, **options).status)
            return reply

        monkeypatch.setattr(session, "request", request)
        yield answers

    async def test_row_14_every_event_three_times_in_any_order(self, repeated: list[int]) -> None:
        definition = {"executor": "memory", "delivery_timeout": 60}
        async with ExecutorRuntime({"memory": definition}) as runtime:
            handle = runtime["memory"]
            results = await asyncio.gather(
                *(handle.run(tasks.double, n) for n in range(100)),
                *(handle.run(tasks.pid_and_sleep, 0.1) for _ in range(8)),
                handle.run(tasks.fail_custom),
                handle.run(tasks.report_progress),
                return_exceptions=True,
            )
            assert results[:100] == [2 * n for n in range(100)]
            assert set(results[100:108]) == {os.getpid()}
            assert isinstance(results[108], tasks.TwoArguments)
            assert len(handle._dispatcher.table) == 0
        # What is over is over; a worker that hears it twice is harmed by nothing.
        assert set(repeated) <= {200, 204, 409, 410, 503}
        assert repeated.count(410) > 100


@redis
@pytest.mark.parametrize("name", ["celery-prefork", "celery-threads", "rq-worker"])
@pytest.mark.parametrize("why", ["timeout", "cancel"])
async def test_row_15_a_late_result_is_counted_and_dropped(
    name: str, why: str, crew: Crew, tmp_path: Path
) -> None:
    async with ExecutorRuntime({"fleet": crew.definition(name)}) as runtime:
        handle = runtime["fleet"]
        job = Job(handle.options(delivery_timeout=2.0), tmp_path)
        await job.running()
        if why == "cancel":
            job.call.cancel()
        with pytest.raises((DeliveryTimeoutError, asyncio.CancelledError)):
            await job.call
        job.release()
        await job.ended()
        dropped = handle._dispatcher.table.dropped
        await until(lambda: dropped["late"], "its result has come, late")
        assert len(handle._dispatcher.table) == 0
        assert await handle.run(tasks.double, 21) == 42


@redis
class TestRow36StaleAttempts:
    """A worker that was given up comes back while the next attempt is under way."""

    @pytest.fixture
    async def stale(
        self, crew: Crew, tmp_path: Path
    ) -> AsyncIterator[tuple[EnvironmentHandle, Job, deeds.Line]]:
        """A run in its second attempt, whose first one stands still."""
        async with ExecutorRuntime({"fleet": crew.definition("celery-prefork")}) as runtime:
            handle = runtime["fleet"]
            strict = handle.options(delivery_retries=1, delivery_heartbeat_seconds=1.5)
            job = Job(strict, tmp_path, "job", deeds.hold_attempt, str(tmp_path))
            first = await job.running()
            os.kill(first.pid, signal.SIGSTOP)
            try:
                second = await job.begun(2)
                assert (first.attempt, second.attempt) == (1, 2)
                await until_states(handle, "started")
                yield handle, job, first
            finally:
                os.kill(first.pid, signal.SIGCONT)
                for attempt in (1, 2):
                    deeds.release_attempt(tmp_path, attempt)
                await asyncio.gather(job.call, return_exceptions=True)

    async def test_row_36_its_error_ends_nothing(self, stale: Any, crew: Crew, tmp_path: Path) -> None:
        _, job, first = stale
        deeds.release_attempt(tmp_path, 1, "error")
        os.kill(first.pid, signal.SIGCONT)
        # Celery writes of it once it was reported.
        await asyncio.to_thread(crew.slot("celery-prefork").worker.wait_for_log, "LookupError: attempt 1")
        assert not job.call.done()
        deeds.release_attempt(tmp_path, 2)
        assert await job.call == "attempt 2"

    async def test_row_36_its_result_is_a_result(self, stale: Any, tmp_path: Path) -> None:
        handle, job, first = stale
        deeds.release_attempt(tmp_path, 1)
        os.kill(first.pid, signal.SIGCONT)
        assert await job.call == "attempt 1"
        deeds.release_attempt(tmp_path, 2)
        await until(lambda: len(deeds.notes(job.log, "end")) == 2, "both have ended")
        assert await handle.run(tasks.double, 21) == 42
