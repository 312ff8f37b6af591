"""``map`` over the local executor: order, bounds, the first error, and leaving early."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from wove_tests.waiting import until, until_states

from wove import ConfigurationError, ExecutorRuntime, WoveError
from wove.handle import MAP_IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator

    from wove.handle import EnvironmentHandle


@pytest.fixture
async def handle() -> AsyncIterator[EnvironmentHandle]:
    """A started local environment."""
    async with ExecutorRuntime({"here": {}}) as runtime:
        yield runtime["here"]


def begin(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Let work run beside the test; if it fails and the test does not look, that is no noise."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


class Gates:
    """A task per number that runs until it is let go; knows what began and what was cancelled."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self._open: dict[int, asyncio.Event] = {}

    def gate(self, number: int) -> asyncio.Event:
        return self._open.setdefault(number, asyncio.Event())

    def let_go(self, *numbers: int) -> None:
        for number in numbers:
            self.gate(number).set()

    async def task(self, number: int) -> int:
        self.begun.append(number)
        try:
            await self.gate(number).wait()
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        return number * 10


@pytest.fixture
def gates() -> Gates:
    """Tasks that end when the test says so."""
    return Gates()


async def times_ten(number: int) -> int:
    """A task that ends at once."""
    return number * 10


def times_ten_in_a_thread(number: int) -> int:
    """A task that ends at once."""
    return number * 10


async def odd_ones_fail(number: int) -> int:
    """A task that may fail."""
    if number % 2:
        raise ValueError(number)
    return number * 10


async def counting(*, upto: int | None = None) -> AsyncIterator[int]:
    """Count, asynchronously."""
    for number in itertools.count() if upto is None else range(upto):
        await asyncio.sleep(0)
        yield number


class TestOrder:
    """In the order of the items, or as they are ready."""

    @pytest.mark.parametrize("func", [times_ten, times_ten_in_a_thread])
    async def test_results_come_in_the_order_of_the_items(self, handle: EnvironmentHandle, func: Any) -> None:
        assert [result async for result in handle.map(func, range(300))] == [n * 10 for n in range(300)]

    async def test_a_result_waits_for_those_before_it(self, handle: EnvironmentHandle, gates: Gates) -> None:
        async with aclosing(handle.map(gates.task, range(3))) as results:
            first = begin(anext(results))
            await until(lambda: len(gates.begun) == 3, "all have begun")
            gates.let_go(1, 2)
            await until_states(handle, "started")
            assert not first.done()
            gates.let_go(0)
            assert await first == 0
            assert [result async for result in results] == [10, 20]

    async def test_unordered_results_come_as_they_are_ready(
        self, handle: EnvironmentHandle, gates: Gates
    ) -> None:
        async with aclosing(handle.map(gates.task, range(3), ordered=False)) as results:
            for number in (2, 0, 1):
                gates.let_go(number)
                assert await anext(results) == number * 10
            assert [result async for result in results] == []

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_no_items_no_results(self, handle: EnvironmentHandle, ordered: bool) -> None:
        assert [result async for result in handle.map(times_ten, [], ordered=ordered)] == []
        assert [result async for result in handle.map(times_ten, counting(upto=0), ordered=ordered)] == []

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_items_may_come_asynchronously(self, handle: EnvironmentHandle, ordered: bool) -> None:
        results = [r async for r in handle.map(times_ten, counting(upto=200), ordered=ordered)]
        assert sorted(results) == [n * 10 for n in range(200)]
        assert not ordered or results == sorted(results)

    async def test_results_are_handed_out_before_the_items_end(self, handle: EnvironmentHandle) -> None:
        more = asyncio.Event()

        async def items() -> AsyncIterator[int]:
            yield 1
            await more.wait()
            yield 2

        async with aclosing(handle.map(times_ten, items())) as results:
            assert await anext(results) == 10
            more.set()
            assert await anext(results) == 20


class TestBounds:
    """As many runs at once as allowed, and no item is read before its time."""

    @staticmethod
    def watched(read: list[int]) -> Iterator[int]:
        """Count without end and note what was read."""
        for number in itertools.count():
            read.append(number)
            yield number

    async def until_all_wait(self, handle: EnvironmentHandle, gates: Gates, number: int) -> None:
        """Wait until so many tasks have begun and everything else has had its turn."""
        await until(lambda: len(gates.begun) >= number, f"{number} tasks have begun")
        for _ in range(20):
            await asyncio.sleep(0)
        await until_states(handle, *["started"] * number)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_in_flight_bounds_the_open_runs_and_the_items_read(
        self, handle: EnvironmentHandle, gates: Gates, ordered: bool
    ) -> None:
        read: list[int] = []
        async with aclosing(
            handle.map(gates.task, self.watched(read), in_flight=3, ordered=ordered)
        ) as results:
            first = begin(anext(results))
            await self.until_all_wait(handle, gates, 3)
            assert gates.begun == [0, 1, 2]
            assert len(read) <= 4
            gates.let_go(0)
            assert await first == 0
            second = begin(anext(results))
            await until(lambda: len(gates.begun) == 4, "another one has begun")
            await self.until_all_wait(handle, gates, 3)
            assert len(gates.begun) == 4
            gates.let_go(1)
            assert await second == 10

    async def test_results_that_nobody_fetches_hold_further_runs_back(
        self, handle: EnvironmentHandle
    ) -> None:
        read: list[int] = []
        async with aclosing(handle.map(times_ten, self.watched(read), in_flight=4)) as results:
            assert await anext(results) == 0
            await until(lambda: len(handle._dispatcher.table) == 0, "the runs have ended")
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(read) <= 2 * 4 + 1
            assert await anext(results) == 10

    async def test_the_default_is_the_environments_limit(self, gates: Gates) -> None:
        definition = {"delivery_max_in_flight": 2}
        async with ExecutorRuntime({"here": definition}) as runtime:
            read: list[int] = []
            async with aclosing(runtime["here"].map(gates.task, self.watched(read))) as results:
                first = begin(anext(results))
                await self.until_all_wait(runtime["here"], gates, 2)
                assert len(read) <= 3
                gates.let_go(0)
                assert await first == 0

    async def test_without_any_limit_it_is_128(self, handle: EnvironmentHandle, gates: Gates) -> None:
        async with aclosing(handle.map(gates.task, self.watched([]))) as results:
            first = begin(anext(results))
            await self.until_all_wait(handle, gates, MAP_IN_FLIGHT)
            assert len(gates.begun) == 128
            gates.let_go(0)
            assert await first == 0

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_results_that_were_handed_out_are_not_kept(
        self, handle: EnvironmentHandle, ordered: bool
    ) -> None:
        class Large:
            pass

        async def make(number: int) -> Large:
            return Large()

        seen: list[weakref.ref[Large]] = []
        async with aclosing(handle.map(make, itertools.count(), in_flight=2, ordered=ordered)) as results:
            async for result in results:
                seen.append(weakref.ref(result))
                del result
                if len(seen) == 30:
                    break
            gc.collect()
            assert sum(each() is not None for each in seen) <= 4

    async def test_one_at_a_time(self, handle: EnvironmentHandle) -> None:
        assert [r async for r in handle.map(times_ten, range(5), in_flight=1)] == [0, 10, 20, 30, 40]

    @pytest.mark.parametrize("in_flight", [0, -1, 1.5, "4", True])
    async def test_an_unusable_limit_is_refused_at_the_call(
        self, handle: EnvironmentHandle, in_flight: Any
    ) -> None:
        with pytest.raises(
            ConfigurationError, match=f"in_flight is a whole number from 1; got {in_flight!r}"
        ):
            handle.map(times_ten, [], in_flight=in_flight)

    async def test_nothing_begins_before_the_first_result_is_asked_for(
        self, handle: EnvironmentHandle, gates: Gates
    ) -> None:
        results = handle.map(gates.task, range(3))
        for _ in range(20):
            await asyncio.sleep(0)
        assert gates.begun == []
        await results.aclose()


class Falsy(Exception):
    """An exception that holds no errors, and is falsy like an empty list."""

    def __len__(self) -> int:
        return 0


class TestErrors:
    """The first error is raised and cancels the rest, unless exceptions are wanted as results."""

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_the_first_error_is_raised_at_once_and_cancels_the_rest(
        self, handle: EnvironmentHandle, gates: Gates, ordered: bool
    ) -> None:
        async def second_one_fails(number: int) -> int:
            if number == 1:
                await gates.gate(1).wait()
                raise ValueError("the second one")
            return await gates.task(number)

        results = handle.map(second_one_fails, range(4), ordered=ordered)
        first = begin(anext(results))
        await until(lambda: len(gates.begun) == 3, "the others have begun")
        gates.let_go(1)
        with pytest.raises(ValueError, match=r"^the second one"):
            await first
        await until(lambda: sorted(gates.cancelled) == [0, 2, 3], "the others were cancelled")
        assert len(handle._dispatcher.table) == 0

    async def test_nothing_comes_after_the_error(self, handle: EnvironmentHandle) -> None:
        results = handle.map(odd_ones_fail, itertools.count())
        with pytest.raises(ValueError, match="1"):
            async for _ in results:
                pass
        with pytest.raises(StopAsyncIteration):
            await anext(results)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_exceptions_as_results(self, handle: EnvironmentHandle, ordered: bool) -> None:
        results = [
            result if isinstance(result, int) else (type(result), result.args)
            async for result in handle.map(odd_ones_fail, range(6), return_exceptions=True, ordered=ordered)
        ]
        expected = [n * 10 if n % 2 == 0 else (ValueError, (n,)) for n in range(6)]
        assert sorted(results, key=str) == sorted(expected, key=str)
        assert not ordered or results == expected

    async def test_a_falsy_exception_is_a_result_as_well(self, handle: EnvironmentHandle) -> None:
        async def fail(number: int) -> NoReturn:
            raise Falsy(number)

        (result,) = [result async for result in handle.map(fail, [1], return_exceptions=True)]
        assert type(result) is Falsy

    async def test_falsy_results_are_results(self, handle: EnvironmentHandle) -> None:
        values = [None, 0, "", [], False]

        async def echo(value: Any) -> Any:
            return value

        for wanted in (True, False):
            assert [r async for r in handle.map(echo, values, return_exceptions=wanted)] == values

    @pytest.mark.parametrize("return_exceptions", [True, False])
    async def test_items_that_fail_end_the_map_and_cancel_what_is_open(
        self, handle: EnvironmentHandle, gates: Gates, return_exceptions: bool
    ) -> None:
        broken = asyncio.Event()

        async def items() -> AsyncIterator[int]:
            yield 0
            yield 1
            await broken.wait()
            raise OSError("the database is gone")

        results = handle.map(gates.task, items(), return_exceptions=return_exceptions)
        first = begin(anext(results))
        await until(lambda: len(gates.begun) == 2, "both have begun")
        broken.set()
        with pytest.raises(OSError, match="the database is gone"):
            await first
        await until(lambda: sorted(gates.cancelled) == [0, 1], "both were cancelled")

    async def test_items_that_fail_at_once(self, handle: EnvironmentHandle) -> None:
        def items() -> Iterator[int]:
            raise OSError("no items")
            yield 1

        with pytest.raises(OSError, match="no items"):
            await anext(handle.map(times_ten, items()))

    async def test_items_that_are_none(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(TypeError, match="int"):
            await anext(handle.map(times_ten, 5))

    async def test_a_function_that_is_none(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(TypeError, match="takes a callable, not int"):
            await anext(handle.map(5, [1]))

    async def test_a_stopped_environment_is_an_error_and_no_silence(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            handle = runtime["here"]
        with pytest.raises(WoveError, match="is stopped"):
            await anext(handle.map(times_ten, [1]))


class TestLeavingEarly:
    """What is open when nobody iterates any more is cancelled."""

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("asynchronous", [True, False])
    async def test_breaking_out_of_endless_items(
        self, handle: EnvironmentHandle, ordered: bool, asynchronous: bool
    ) -> None:
        items: Any = counting() if asynchronous else itertools.count()
        seen = []
        async with aclosing(handle.map(times_ten, items, ordered=ordered, in_flight=8)) as results:
            async for result in results:
                seen.append(result)
                if len(seen) == 50:
                    break
        assert len(set(seen)) == 50
        assert len(handle._dispatcher.table) == 0

    async def test_aclose_cancels_what_is_open_and_waits_until_that_was_passed_on(
        self, handle: EnvironmentHandle, gates: Gates
    ) -> None:
        results = handle.map(gates.task, itertools.count(), in_flight=3)
        gates.let_go(0)
        assert await anext(results) == 0
        await until(lambda: len(gates.begun) == 4, "three more have begun")
        await results.aclose()
        assert len(handle._dispatcher.table) == 0
        await until(lambda: sorted(gates.cancelled) == [1, 2, 3], "they were cancelled")
        assert len(gates.begun) == 4

    async def test_a_source_that_waits_is_ended(self, handle: EnvironmentHandle) -> None:
        ended = asyncio.Event()

        async def items() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with aclosing(handle.map(times_ten, items())) as results:
            assert await anext(results) == 10
        assert ended.is_set()

    async def test_cancelling_the_caller_cancels_what_is_open(
        self, handle: EnvironmentHandle, gates: Gates
    ) -> None:
        async def consume() -> None:
            async for _ in handle.map(gates.task, range(3)):
                pass

        caller = begin(consume())
        await until(lambda: len(gates.begun) == 3, "all have begun")
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await until(lambda: sorted(gates.cancelled) == [0, 1, 2], "all were cancelled")
        assert len(handle._dispatcher.table) == 0

    async def test_a_loop_that_was_left_without_closing_is_tidied_up_too(
        self, handle: EnvironmentHandle, gates: Gates
    ) -> None:
        gates.let_go(0)
        async for _ in handle.map(gates.task, range(3)):
            break
        gc.collect()
        await until(lambda: sorted(gates.cancelled) == [1, 2], "the rest was cancelled")

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_exceptions_that_nobody_fetched_are_no_noise(
        self, handle: EnvironmentHandle, gates: Gates, ordered: bool
    ) -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        async def fail(number: int) -> NoReturn:
            gates.begun.append(number)
            await gates.gate(0).wait()
            raise ValueError(number)

        async with aclosing(handle.map(fail, range(5), return_exceptions=True, ordered=ordered)) as results:
            first = begin(anext(results))
            await until(lambda: len(gates.begun) == 5, "all have begun")
            gates.let_go(0)
            assert isinstance(await first, ValueError)
            await until(lambda: len(handle._dispatcher.table) == 0, "all have failed")
        del first, results
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()
        assert reported == []

    async def test_no_task_of_ours_is_left(self, handle: EnvironmentHandle, gates: Gates) -> None:
        before = asyncio.all_tasks()
        gates.let_go(0)
        async with aclosing(handle.map(gates.task, itertools.count(), in_flight=5)) as results:
            assert await anext(results) == 0
        await until(lambda: asyncio.all_tasks() <= before, "no task is left")
