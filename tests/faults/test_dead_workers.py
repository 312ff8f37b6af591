"""Workers die: before the task, in its midst, after its end. Rows 1-5 and 24 of the fault matrix."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from redis import Redis
from rq import Callback, Retry
from wove_tests import deeds, tasks
from wove_tests.crew import Crew, Job, kill
from wove_tests.waiting import run_states, until

from wove import DeliveryTimeoutError, ExecutorRuntime, WorkerLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from wove.handle import EnvironmentHandle

pytestmark = pytest.mark.redis

#: Seconds within which the caller must have heard of a death; it takes two as a rule.
SOON = 10.0


@pytest.fixture
async def started(crew: Crew) -> AsyncIterator[Callable[..., Any]]:
    """Starts an environment on a worker of the crew, which lives until the test ends."""
    runtime = ExecutorRuntime({})
    await runtime.start()

    async def start(name: str, **changes: Any) -> EnvironmentHandle:
        await runtime.ensure_environment(name, crew.definition(name, **changes))
        return runtime[name]

    yield start
    await runtime.stop()


class Death(NamedTuple):
    """Who is killed, while the task runs."""

    worker: str
    #: The worker with everything that belongs to it, and not only the process of the task.
    whole: bool
    #: What the backend says of it.
    word: str


DEATHS = {
    "celery-pool-process": Death("celery-prefork", False, r"signal 9"),
    "celery-prefork-worker": Death("celery-prefork", True, r"does not answer any more"),
    "celery-threads-worker": Death("celery-threads", True, r"does not answer any more"),
    "rq-work-horse": Death("rq-worker", False, r"signal 9|Work-horse"),
    "rq-worker-with-its-horse": Death("rq-worker", True, r"has left Redis"),
    "rq-simple-worker": Death("rq-simple", True, r"has left Redis"),
}


async def lost(call: asyncio.Task[Any]) -> WorkerLostError:
    """Return the error that the caller gets, soon."""
    begun = time.monotonic()
    with pytest.raises(WorkerLostError) as caught:
        await call
    assert time.monotonic() - begun < SOON
    return caught.value


class TestRow01BeforeStart:
    """A worker is killed that has taken work and not begun it."""

    async def test_row_01_sigkill_before_start_of_what_celery_had_reserved(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        handle = await started("celery-prefork")
        busy = [Job(handle, tmp_path, f"busy{number}") for number in range(2)]
        for each in busy:
            await each.begun()
        brief = handle.options(delivery_start_timeout=3.0)
        waiting = Job(brief, tmp_path, "waiting", deeds.mark)
        slot = crew.slot("celery-prefork")
        await until(lambda: slot.worker.log_text().count("received") >= 3, "the worker has taken all three")
        slot.worker.kill()
        for each in busy:
            await lost(each.call)
        # The message is on nobody's list: the broker keeps it for an hour.
        with pytest.raises(DeliveryTimeoutError, match="accepted by the backend, never started") as caught:
            await waiting.call
        assert "delivery_start_timeout=3 s" in str(caught.value)
        assert not waiting.executions

    async def test_row_01_sigkill_before_start_of_what_the_broker_gives_to_another(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        handle = await started("celery-late")
        busy = [Job(handle, tmp_path, f"busy{number}") for number in range(2)]
        for each in busy:
            await each.begun()
        slot = crew.slot("celery-late")
        waiting = Job(handle, tmp_path, "waiting", deeds.mark, 7)
        await until(lambda: run_states(handle).count("submitted") == 1, "it was accepted")
        slot.worker.kill()
        for each in busy:
            each.release()
        slot.replace()
        assert await waiting.call == 7
        assert len(waiting.executions) == 1
        await asyncio.gather(*(each.call for each in busy), return_exceptions=True)

    async def test_row_01_sigkill_before_start_of_what_is_queued_on_rq(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        handle = await started("rq-worker")
        busy = Job(handle, tmp_path, "busy")
        await busy.running()
        waiting = Job(handle, tmp_path, "waiting", deeds.mark, 7)
        await until(lambda: run_states(handle).count("submitted") == 1, "it was accepted")
        slot = crew.slot("rq-worker")
        slot.worker.kill()
        await lost(busy.call)
        slot.replace()
        assert await waiting.call == 7
        assert len(waiting.executions) == 1


class TestRow02MidTask:
    """The process of a running task, or its whole worker, is killed."""

    @pytest.mark.parametrize("death", DEATHS)
    async def test_row_02_sigkill_mid_task(
        self, death: str, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        name, whole, word = DEATHS[death]
        handle = await started(name)
        job = Job(handle, tmp_path)
        line = await job.running()
        slot = crew.slot(name)
        if whole:
            slot.worker.kill()
        else:
            assert line.pid != slot.worker.pid
            kill(line.pid)
        error = await lost(job.call)
        # Who, in which attempt, when last heard of, and what the backend says.
        for said in (socket.gethostname(), f"pid {line.pid}", "attempt 1", "last sign of life"):
            assert said in str(error)
        assert error.payload["worker"]["pid"] == line.pid
        assert [entry["attempt"] for entry in error.attempts] == [1]
        await until(lambda: len(handle._dispatcher.table) == 0, "nothing is kept of it")
        crew.slot(name)
        assert await handle.run(tasks.double, 21) == 42
        assert len(job.executions) == 1
        assert re.search(word, str(error))

    async def test_row_02_sigkill_of_the_worker_alone_leaves_the_work_horse_running(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        # It says so, whatever Redis says of its worker: that is no loss.
        handle = await started("rq-worker")
        job = Job(handle, tmp_path)
        line = await job.running()
        worker = crew.slot("rq-worker").worker
        kill(worker.pid)
        await until(lambda: not worker.running, "the worker is dead")
        # Longer than a lost worker takes to be noticed.
        await asyncio.wait([job.call], timeout=2.5)
        job.release()
        assert await job.call == "done"
        assert [line.pid] == [note.pid for note in deeds.notes(job.log, "end")]

    async def test_row_02_sigkill_of_the_worker_alone_takes_its_pool_processes_along(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        # Celery asks the kernel to end them with their parent.
        handle = await started("celery-prefork")
        job = Job(handle, tmp_path)
        await job.running()
        kill(crew.slot("celery-prefork").worker.pid)
        await lost(job.call)

    @pytest.mark.parametrize("name", ["celery-prefork", "celery-threads"])
    async def test_row_02_sigkill_of_the_whole_worker_in_the_first_moment(
        self, name: str, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        # Celery has acknowledged the message by then, and nobody else knows of it.
        handle = await started(name, delivery_timeout=None)
        # It knows the submitter's clock, and so how young the message is.
        assert await handle.run(tasks.double, 21) == 42
        job = Job(handle, tmp_path, "job", deeds.kill_the_worker)
        await lost(job.call)
        assert len(job.executions) == 1

    async def test_row_02_sigkill_mid_task_and_redelivery_re_opens_nothing(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        handle = await started("celery-visible")
        job = Job(handle, tmp_path)
        await job.running()
        slot = crew.slot("celery-visible")
        slot.worker.kill()
        await lost(job.call)
        slot.replace()
        await asyncio.to_thread(slot.worker.wait_for_log, "is not wanted (any more): skipped")
        assert await handle.run(tasks.double, 21) == 42
        assert len(job.executions) == 1


class TestRow03AfterDelivery:
    """A process is killed once its outcome was delivered, before its backend knows."""

    async def test_row_03_sigkill_before_celery_acknowledges(
        self, started: Any, crew: Crew, tmp_path: Path
    ) -> None:
        handle = await started("celery-late")
        job = Job(handle, tmp_path, "job", deeds.die_after_delivery)
        assert await job.call == 1
        # The broker delivers it again, to a worker that does not run it.
        await asyncio.to_thread(crew.slot("celery-late").worker.wait_for_log, "is not wanted (any more)")
        assert await handle.run(tasks.double, 21) == 42
        assert len(job.executions) == 1

    async def test_row_03_sigkill_before_rq_knows(self, started: Any, crew: Crew, tmp_path: Path) -> None:
        options = {"retry": Retry(max=1), "on_success": Callback("wove_tests.deeds.die_once")}
        handle = await started("rq-worker", executor_config={"enqueue_options": options})
        job = Job(handle, tmp_path, "job", deeds.mark, 7)
        assert await job.call == 7
        (line,) = job.executions
        with closing(Redis.from_url(crew.url("rq-worker"))) as client:
            # RQ runs it again, and it is not run.
            await until(lambda: not client.exists(f"rq:job:{line.run_id}"), "RQ is done with it")
        assert f"{line.run_id}: enqueued for retry" in crew.slot("rq-worker").worker.log_text()
        assert len(job.executions) == 1


@pytest.mark.parametrize("name", ["celery-prefork", "rq-worker"])
async def test_row_04_sigkill_after_the_task_before_its_result_is_sent(
    name: str, started: Any, tmp_path: Path
) -> None:
    handle = await started(name)
    job = Job(handle, tmp_path, "job", deeds.return_death)
    await lost(job.call)
    assert len(job.executions) == 1
    assert await handle.run(tasks.double, 21) == 42


#: The end of a process, in the words of Celery and of RQ.
ENDS = {
    "exit": r"exit ?code 3|waitpid returned 768",
    "SIGSEGV": r"SIGSEGV|signal 11",
    "SIGKILL": r"SIGKILL|signal 9",
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("name", ["celery-prefork", "rq-worker"])
async def test_row_05_os_exit_segmentation_fault_and_out_of_memory(
    name: str, how: str, started: Any, tmp_path: Path
) -> None:
    handle = await started(name)
    job = Job(handle, tmp_path, "job", deeds.die, how)
    error = await lost(job.call)
    assert re.search(ENDS[how], str(error))
    assert len(job.executions) == 1
    assert await handle.run(tasks.double, 21) == 42


async def test_row_24_a_child_that_keeps_the_connections_open_hides_no_death(
    started: Any, tmp_path: Path, crew: Crew
) -> None:
    # Neither the open beat nor Redis misses the process: its silence is what tells.
    handle = (await started("rq-simple")).options(delivery_heartbeat_seconds=2.0)
    release = tmp_path / "release"
    job = Job(handle, tmp_path, "job", deeds.leave_a_child, str(release))
    try:
        error = await lost(job.call)
    finally:
        release.touch()
        crew.slot("rq-simple")
    assert deeds.notes(job.log, "child"), "it was the child that held them"
    assert "no sign of life" in str(error)
    assert "delivery_heartbeat_seconds=2" in str(error)
