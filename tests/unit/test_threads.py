"""DaemonPool: bounded, lazy, and never in the way of the interpreter's end."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from wove import threads
from wove.threads import DaemonPool, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds until a condition that does not come true fails a test.
PATIENCE = 20.0


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def alive(name: str) -> list[threading.Thread]:
    """Return the threads of a pool."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


class Gate:
    """A call that begins, then waits until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.open.wait(PATIENCE)
        return "through"


@pytest.fixture
def gate() -> Iterator[Gate]:
    """A gate that is open at the end of the test, whatever happened."""
    made = Gate()
    yield made
    made.open.set()


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[DaemonPool]:
    """A pool of two threads."""
    made = DaemonPool(2, request.node.name)
    yield made
    made.close()


class TestCalls:
    """A future gets what the call comes to."""

    def test_a_result(self, pool: DaemonPool) -> None:
        assert pool.submit(divmod, 7, 2).result(PATIENCE) == (3, 1)

    @pytest.mark.parametrize("exc", [ValueError("bad"), SystemExit(4), KeyboardInterrupt()], ids=repr)
    def test_an_exception_of_any_kind(self, pool: DaemonPool, exc: BaseException) -> None:
        def fail() -> None:
            raise exc

        assert pool.submit(fail).exception(PATIENCE) is exc
        assert pool.submit(abs, -1).result(PATIENCE) == 1

    def test_a_queued_call_that_is_cancelled_never_starts(self, gate: Gate) -> None:
        pool = DaemonPool(1, "cancelled")
        started: list[int] = []
        first = pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        queued, behind = pool.submit(started.append, 1), pool.submit(started.append, 2)
        assert queued.cancel()
        gate.open.set()
        behind.result(PATIENCE)
        assert started == [2]
        assert first.result(PATIENCE) == "through"
        pool.close()

    def test_a_running_call_cannot_be_cancelled(self, pool: DaemonPool, gate: Gate) -> None:
        future = pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        assert not future.cancel()
        gate.open.set()
        assert future.result(PATIENCE) == "through"

    def test_nothing_of_a_call_is_kept_alive_after_it(self, pool: DaemonPool) -> None:
        class Large:
            pass

        argument = Large()
        reference = weakref.ref(argument)
        pool.submit(id, argument).result(PATIENCE)
        del argument

        def gone() -> bool:
            gc.collect()
            return reference() is None

        until(gone)
        assert alive("test_nothing_of_a_call_is_kept_alive_after_it"), "the idle thread is still there"


class TestThreads:
    """As many as are needed, never more than the size."""

    def test_they_are_daemons_and_bear_the_pools_name(self, gate: Gate) -> None:
        pool = DaemonPool(2, "named-pool")
        pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        (thread,) = alive("named-pool")
        assert thread.daemon
        assert thread.name == "named-pool-1"
        pool.close()

    def test_none_is_started_before_there_is_work(self) -> None:
        DaemonPool(8, "lazy-pool")
        assert alive("lazy-pool") == []

    def test_one_call_after_the_other_needs_few(self) -> None:
        pool = DaemonPool(8, "sequential-pool")
        for number in range(50):
            assert pool.submit(abs, -number).result(PATIENCE) == number
        # A second one, where a thread has handed its result over and has yet to turn round.
        assert 1 <= len(alive("sequential-pool")) <= 2
        pool.close()

    def test_calls_run_side_by_side_up_to_the_size_and_not_beyond(self) -> None:
        size, calls = 3, 12
        pool = DaemonPool(size, "bounded-pool")
        lock = threading.Lock()
        together = threading.Barrier(size)
        running = most = 0

        def work() -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            together.wait(PATIENCE)  # passes only when as many as the size run at once
            with lock:
                running -= 1

        futures = [pool.submit(work) for _ in range(calls)]
        for future in futures:
            future.result(PATIENCE)
        assert most == size
        assert len(alive("bounded-pool")) == size
        pool.close()

    def test_idle_threads_end_and_the_pool_works_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "IDLE_SECONDS", 0.001)
        pool = DaemonPool(2, "idle-pool")
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        until(lambda: not alive("idle-pool"))
        assert pool.submit(abs, -2).result(PATIENCE) == 2
        pool.close()

    def test_a_call_that_comes_just_as_an_idle_thread_gives_up_is_not_forgotten(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gives_up, submitted = threading.Event(), threading.Event()

        class LateQueue(queue.SimpleQueue[Any]):
            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                if self.empty() and not submitted.is_set():
                    gives_up.set()
                    assert submitted.wait(PATIENCE)
                    raise queue.Empty
                return super().get(block, timeout)

        monkeypatch.setattr(queue, "SimpleQueue", LateQueue)
        pool = DaemonPool(1, "late-pool")
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        assert gives_up.wait(PATIENCE)
        future = pool.submit(abs, -2)
        submitted.set()
        assert future.result(PATIENCE) == 2
        pool.close()

    def test_no_call_is_forgotten_while_threads_come_and_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "IDLE_SECONDS", 0)  # an idle thread ends at once
        pool = DaemonPool(3, "busy-pool")
        results: list[int] = []

        def submit_many() -> None:
            for number in range(300):
                future = pool.submit(abs, -number)
                if number % 3 == 0:
                    results.append(future.result(PATIENCE))

        submitters = [threading.Thread(target=submit_many) for _ in range(4)]
        for thread in submitters:
            thread.start()
        for thread in submitters:
            thread.join(PATIENCE)
        assert len(results) == 400
        assert len(alive("busy-pool")) <= 3
        pool.close()


class TestClose:
    """What runs may end; what is queued never starts."""

    def test_a_closed_pool_takes_no_work(self, pool: DaemonPool) -> None:
        pool.close()
        with pytest.raises(RuntimeError, match=r"pool 'test_a_closed_pool_takes_no_work' is closed"):
            pool.submit(abs, 1)

    def test_queued_calls_are_cancelled_and_running_ones_end(self, gate: Gate) -> None:
        pool = DaemonPool(1, "closed-pool")
        running = pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        queued: list[Future[Any]] = [pool.submit(abs, -n) for n in range(5)]
        pool.close()
        assert all(future.cancelled() for future in queued)
        with pytest.raises(CancelledError):
            queued[0].result(PATIENCE)
        gate.open.set()
        assert running.result(PATIENCE) == "through"
        until(lambda: not alive("closed-pool"))

    def test_idle_threads_end_at_once(self) -> None:
        pool = DaemonPool(2, "ended-pool")
        together = threading.Barrier(2)
        for future in [pool.submit(together.wait, PATIENCE) for _ in range(2)]:
            future.result(PATIENCE)
        assert len(alive("ended-pool")) == 2
        begun = time.monotonic()
        pool.close()
        until(lambda: not alive("ended-pool"))
        assert time.monotonic() - begun < threads.IDLE_SECONDS / 2

    def test_closing_after_what_was_submitted_cancels_nothing(self, gate: Gate) -> None:
        pool = DaemonPool(1, "closed-after-pool")
        running = pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        queued = [pool.submit(abs, -n) for n in range(5)]
        pool.close_after()
        with pytest.raises(RuntimeError, match="is closed"):
            pool.submit(abs, 1)
        gate.open.set()
        assert [future.result(PATIENCE) for future in queued] == [0, 1, 2, 3, 4]
        assert running.result(PATIENCE) == "through"
        until(lambda: not alive("closed-after-pool"))

    def test_closing_twice_is_harmless(self, pool: DaemonPool) -> None:
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        pool.close()
        pool.close()
        until(lambda: not alive("test_closing_twice_is_harmless"))

    def test_a_call_that_never_returns_does_not_hold_close_up(self, pool: DaemonPool, gate: Gate) -> None:
        future = pool.submit(gate)
        assert gate.begun.wait(PATIENCE)
        pool.close()
        assert not future.done()


class TestInThread:
    """One blocking call in a thread of its own."""

    async def test_results_and_exceptions_come_back(self) -> None:
        assert await in_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 7, 0)

    async def test_it_needs_no_place_in_the_applications_own_pool(self, gate: Gate) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, gate)
        assert await in_thread(abs, -1) == 1
        gate.open.set()
        assert await blocked == "through"

    async def test_its_thread_ends_with_it(self) -> None:
        thread = await in_thread(threading.current_thread)
        assert thread.daemon
        until(lambda: not thread.is_alive())
