"""Cancelling and stopping at the worst moment."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from wove_tests import hostile, tasks
from wove_tests.waiting import until, until_exists, until_states

from wove import BackendAdapterEnvironmentExecutor, ConfigurationError, ExecutorRuntime, SubmitError
from wove.adapters.memory import MemoryAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wove_tests.fleets import Fleets

MEMORY = {"executor": "memory", "delivery_timeout": 30}


def wove_threads() -> set[str]:
    """Return the names of Wove's threads; a worker's courier of this process lingers on purpose."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("wove-") and name != "wove-courier"}


class TestCancel:
    async def test_a_cancel_that_overtakes_its_submission_keeps_the_task_from_running(
        self, tmp_path: Path
    ) -> None:
        async with ExecutorRuntime({"memory": MEMORY}) as runtime:
            handle = runtime["memory"]
            never = tmp_path / "never"
            for _ in range(4):
                call = asyncio.create_task(handle.run(_touch_with, str(never), hostile.SlowToPickle(0.2)))
                await until_states(handle, "queued")
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
            # Encoded after them, in turn: when it is back, they have been dealt with.
            assert await handle.run(tasks.double, 1) == 2
            assert not never.exists()

    async def test_require_ack_returns_at_once_for_a_run_that_was_never_sent(self) -> None:
        async with ExecutorRuntime({"memory": MEMORY}) as runtime:
            handle = runtime["memory"].options(delivery_cancel_mode="require_ack", delivery_cancel_timeout=20)
            call = asyncio.create_task(handle.run(tasks.double, 1))
            await asyncio.sleep(0)
            call.cancel()
            begun = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert time.monotonic() - begun < 5

    @pytest.mark.redis
    async def test_stopping_a_running_rq_job_is_acknowledged(self, fleets: Fleets, tmp_path: Path) -> None:
        definition = fleets.executor_definition("rq-worker", executor_config={"stop_on_cancel": True})
        started, release = tmp_path / "started", tmp_path / "release"
        async with ExecutorRuntime({"rq": definition}) as runtime:
            handle = runtime["rq"].options(delivery_cancel_mode="require_ack", delivery_cancel_timeout=25)
            call = asyncio.create_task(handle.run(tasks.touch_and_wait, str(started), str(release)))
            await until_exists(started)
            begun = time.monotonic()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert time.monotonic() - begun < 20
            assert await handle.run(tasks.double, 1) == 2


def _touch_with(path: str, _: Any) -> None:
    tasks.touch(path)


class TestDeadlines:
    async def test_what_has_arrived_counts_however_late_a_busy_loop_reads_it(self) -> None:
        async with ExecutorRuntime({"memory": MEMORY}) as runtime:
            handle = runtime["memory"]
            call = asyncio.create_task(
                handle.options(delivery_timeout=1.0, delivery_heartbeat_seconds=0.9).run(
                    tasks.pid_and_sleep, 0.2
                )
            )
            await until_states(handle, "started")
            time.sleep(1.5)  # the application blocks its loop beyond both deadlines
            assert await call > 0

    async def test_a_heartbeat_setting_does_not_kill_local_tasks_which_send_none(self) -> None:
        async with ExecutorRuntime({"here": {}}, {"delivery_heartbeat_seconds": 0.1}) as runtime:
            assert await runtime["here"].run(tasks.pid_and_sleep, 0.5) > 0


class MisbehavingAdapter(MemoryAdapter):
    """Raises what no adapter should, the first time."""

    raises: ClassVar[list[BaseException]] = []

    async def submit_many(self, batch: Sequence[tuple[bytes, Any]]) -> list[Any]:
        if self.raises:
            raise self.raises.pop()
        return await super().submit_many(batch)


class TestAdapters:
    @pytest.mark.parametrize(
        "failure", [asyncio.CancelledError(), SystemExit(3), OSError("broken")], ids=repr
    )
    async def test_whatever_an_adapter_raises_ends_the_run_and_no_other(self, failure: BaseException) -> None:
        executor = BackendAdapterEnvironmentExecutor("misbehaving", adapter_class=MisbehavingAdapter)
        async with ExecutorRuntime({"bad": {"executor": executor, "delivery_timeout": 30}}) as runtime:
            handle = runtime["bad"]
            MisbehavingAdapter.raises = [failure]
            with pytest.raises(SubmitError):
                await handle.run(tasks.double, 1)
            assert await handle.run(tasks.double, 2) == 4

    async def test_one_executor_instance_serves_one_environment(self) -> None:
        executor = BackendAdapterEnvironmentExecutor("memory")
        with pytest.raises(ConfigurationError, match="serves environment"):
            await ExecutorRuntime({"one": {"executor": executor}, "two": {"executor": executor}}).start()


class TestStop:
    async def test_a_cancelled_start_leaves_nothing_behind(self) -> None:
        before = wove_threads()
        for turns in range(0, 60, 6):
            runtime = ExecutorRuntime({"a": MEMORY, "b": MEMORY})
            starting = asyncio.create_task(runtime.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            if starting.cancel():
                await asyncio.wait([starting])
                assert starting.cancelled()
            else:
                await runtime.stop()  # it was faster
        await until(lambda: wove_threads() <= before, "the threads have ended")

    async def test_a_cancelled_stop_is_finished_by_the_next(self) -> None:
        before = wove_threads()
        runtime = ExecutorRuntime({"a": MEMORY})
        await runtime.start()
        stopping = asyncio.create_task(runtime.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        await asyncio.wait([stopping])
        await runtime.stop()
        await until(lambda: wove_threads() <= before, "the threads have ended")

    async def test_starting_needs_no_thread_of_the_applications_own_pool(self) -> None:
        release = threading.Event()
        loop = asyncio.get_running_loop()
        hogs = [loop.run_in_executor(None, release.wait) for _ in range(64)]
        try:
            async with asyncio.timeout(15):
                async with ExecutorRuntime({"memory": MEMORY}) as runtime:
                    assert await runtime["memory"].run(tasks.double, 1) == 2
        finally:
            release.set()
            await asyncio.gather(*hogs)

    async def test_stop_is_quick_with_many_open_runs(self, tmp_path: Path) -> None:
        runtime = ExecutorRuntime({"memory": {**MEMORY, "executor_config": {"threads": 4}}})
        await runtime.start()
        release = tmp_path / "release"
        calls = [
            asyncio.create_task(
                runtime["memory"].run(tasks.touch_and_wait, str(tmp_path / f"{n}"), str(release))
            )
            for n in range(200)
        ]
        await until_exists(tmp_path / "0")
        begun = time.monotonic()
        await runtime.stop()
        assert time.monotonic() - begun < 5
        release.touch()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
