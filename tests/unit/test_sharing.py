"""Calls with equal keys share one run: what their key is, and who gets what."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests.waiting import until

from wove.errors import ConfigurationError, DeliveryTimeoutError
from wove.sharing import MAX_KEY, SharedCalls, sharing_key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from wove.waiter import OnProgress


def report(account: int, day: str = "today", *pages: int, fast: bool = False, **extra: Any) -> None:
    """Stand for a task."""


def another(account: int) -> None:
    """Stand for another one."""


class TestKeys:
    """A template and the arguments of a call make its key."""

    @pytest.mark.parametrize(
        ("template", "positional", "keywords", "key"),
        [
            ("nightly", (7,), {}, "nightly"),
            ("100%", (7,), {}, "100%"),
            ("}", (7,), {}, "}"),
            ("report-{account}", (7,), {}, "report-7"),
            ("report-{account}", (), {"account": 7}, "report-7"),
            ("report-{0}", (7,), {}, "report-7"),
            ("{0}-{1}", (7, "monday"), {}, "7-monday"),
            ("{account}-{day}", (7,), {}, "7-today"),
            ("{account}-{day}-{fast}", (7, "monday"), {"fast": True}, "7-monday-True"),
            ("{pages}", (7, "monday", 1, 2), {}, "(1, 2)"),
            ("{account}-{region}", (7,), {"region": "eu"}, "7-eu"),
            ("{account:04d}", (7,), {}, "0007"),
            ("{day.__class__.__name__}", (7,), {}, "str"),
            ("{extra_key[name]}", (7,), {"extra_key": {"name": "x"}}, "x"),
            ("{{{account}}}", (7,), {}, "{7}"),
            (lambda account: f"by-{account}", (7,), {}, "by-7"),
            (lambda account, *, day: f"{day}-{account}", (7,), {"day": "monday"}, "monday-7"),
            (str, (7,), {}, "7"),
            ("x" * MAX_KEY, (7,), {}, "x" * MAX_KEY),
        ],
    )
    def test_the_key_of_a_call(
        self, template: Any, positional: tuple[Any, ...], keywords: dict[str, Any], key: str
    ) -> None:
        assert sharing_key(template, report, positional, keywords) == key

    def test_a_call_is_known_by_its_arguments_however_they_are_passed(self) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((7,), {}),
            ((7, "today"), {}),
            ((), {"account": 7}),
            ((), {"day": "today", "account": 7}),
        ]
        assert {sharing_key("{account}-{day}", report, *call) for call in calls} == {"7-today"}

    def test_a_callable_without_a_signature_is_known_by_what_it_is_given(self) -> None:
        assert sharing_key("{0}", min, (3, 4), {}) == "3"
        assert sharing_key("{key}", min, (3, 4), {"key": "k"}) == "k"

    def test_a_call_that_does_not_fit_is_left_to_say_so_itself(self) -> None:
        assert sharing_key("{account}", report, (), {"account": 7, "day": 1, "fast": True}) == "7"
        assert sharing_key("{nobody}", another, (1, 2, 3), {"nobody": "x"}) == "x"

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{acount}", "KeyError: 'acount'"),
            ("{5}", "IndexError: "),
            ("{account", "ValueError: "),
            ("{account.name}", "AttributeError: "),
            ("{account:nonsense}", "ValueError: "),
        ],
    )
    def test_a_template_that_does_not_fit_is_named_together_with_the_arguments(
        self, template: str, reason: str
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            sharing_key(template, report, (7, "monday"), {"region": "eu"})
        text = str(caught.value)
        assert text.startswith(f"delivery_idempotency_key {template!r} does not fit the call of ")
        assert "report, whose arguments are account, day, pages, fast, region: " in text
        assert reason in text
        assert caught.value.__cause__ is not None

    def test_a_callable_that_fails_is_a_mistake_of_the_setting(self) -> None:
        def broken(account: int) -> str:
            raise LookupError("no such account")

        with pytest.raises(ConfigurationError, match="LookupError: no such account") as caught:
            sharing_key(broken, report, (7,), {})
        assert isinstance(caught.value.__cause__, LookupError)

    def test_a_call_without_arguments_has_none(self) -> None:
        with pytest.raises(ConfigurationError, match="whose arguments are none: KeyError"):
            sharing_key("{account}", lambda: None, (), {})

    @pytest.mark.parametrize(
        "key", [None, 7, b"bytes", "", "x" * (MAX_KEY + 1), ["list"]], ids=lambda key: f"{key!r:.20}"
    )
    def test_a_key_is_a_string_that_is_neither_empty_nor_endless(self, key: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            sharing_key(lambda account: key, report, (7,), {})
        assert "report is a string of 1 to 1000 characters; got " in str(caught.value)
        assert len(str(caught.value)) < 300

    def test_a_formatted_key_has_the_same_bounds(self) -> None:
        with pytest.raises(ConfigurationError, match="1 to 1000 characters"):
            sharing_key("{day}", report, (7, "x" * (MAX_KEY + 1)), {})
        with pytest.raises(ConfigurationError, match="1 to 1000 characters"):
            sharing_key("{day}", report, (7, ""), {})


class Work:
    """A run that others wait for: it begins, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.reports: list[OnProgress] = []
        self.ending = asyncio.Event()
        #: Held back by a run that is being cancelled.
        self.farewell = asyncio.Event()
        self.farewell.set()
        self.failure: BaseException | None = None

    def begin(self, report: OnProgress) -> Coroutine[Any, Any, Any]:
        self.reports.append(report)
        return self._run()

    async def _run(self) -> str:
        self.begun += 1
        number = self.begun
        try:
            await self.ending.wait()
        except asyncio.CancelledError:
            await self.farewell.wait()
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return f"result {number}"


@pytest.fixture
async def work() -> Work:
    """What the calls begin."""
    return Work()


@pytest.fixture
async def calls() -> SharedCalls:
    """The shared runs of an environment."""
    return SharedCalls("reports")


class Callers:
    """Calls that wait beside the test."""

    def __init__(self, calls: SharedCalls, work: Work) -> None:
        self._calls = calls
        self._work = work

    def call(
        self,
        key: str = "k",
        func: Callable[..., Any] = report,
        patience: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> asyncio.Task[Any]:
        """Begin to call."""
        return asyncio.create_task(
            self._calls.call(key, func, self._work.begin, patience=patience, on_progress=on_progress)
        )

    async def waiting(self, number: int, key: str = "k") -> list[asyncio.Task[Any]]:
        """Return so many callers that wait for one run, which has begun."""
        tasks = [self.call(key) for _ in range(number)]
        shared = self._calls._open
        await until(lambda: key in shared and shared[key].waiters == number, "all of them wait")
        await until(lambda: self._work.begun, "the run has begun")
        return tasks


@pytest.fixture
async def callers(calls: SharedCalls, work: Work) -> Callers:
    """Whoever calls."""
    return Callers(calls, work)


class TestSharing:
    """Many callers, one run."""

    async def test_one_run_serves_all_who_call_while_it_is_open(
        self, calls: SharedCalls, work: Work, callers: Callers
    ) -> None:
        tasks = await callers.waiting(20)
        assert len(calls) == 1
        work.ending.set()
        assert await asyncio.gather(*tasks) == ["result 1"] * 20
        assert (work.begun, len(calls)) == (1, 0)

    async def test_a_run_that_has_ended_serves_nobody_else(
        self, calls: SharedCalls, work: Work, callers: Callers
    ) -> None:
        work.ending.set()
        assert [await callers.call(), await callers.call()] == ["result 1", "result 2"]
        assert len(calls) == 0

    async def test_other_keys_are_other_runs(self, calls: SharedCalls, work: Work, callers: Callers) -> None:
        tasks = [callers.call(f"k{number}") for number in range(5)]
        await until(lambda: work.begun == 5, "five runs have begun")
        assert len(calls) == 5
        work.ending.set()
        assert sorted(await asyncio.gather(*tasks)) == [f"result {number}" for number in range(1, 6)]

    async def test_another_function_under_the_same_key_is_refused(self, work: Work, callers: Callers) -> None:
        (first,) = await callers.waiting(1)
        with pytest.raises(ConfigurationError) as caught:
            await callers.call(func=another)
        text = str(caught.value)
        assert text.startswith("environment 'reports': the delivery_idempotency_key 'k' of ")
        assert "another is in use for an open run of " in text
        assert text.endswith("report: keys of different functions have to differ")
        work.ending.set()
        assert await first == "result 1"
        assert await callers.call(func=another) == "result 2"  # nobody else has it any more

    async def test_progress_reaches_everybody_who_asked_for_it_while_they_wait(
        self, work: Work, callers: Callers
    ) -> None:
        seen: dict[str, list[Any]] = {"first": [], "second": [], "third": []}

        def listener(name: str) -> Callable[[Mapping[str, Any]], None]:
            return lambda frame: seen[name].append(frame["message"])

        first = callers.call(on_progress=listener("first"))
        await until(lambda: work.begun, "the run has begun")
        (tell,) = work.reports
        tell({"message": "a"})
        second, silent = callers.call(on_progress=listener("second")), callers.call()
        await asyncio.sleep(0)
        tell({"message": "b"})
        first.cancel()
        await asyncio.wait([first])
        tell({"message": "c"})
        assert seen == {"first": ["a", "b"], "second": ["b", "c"], "third": []}
        work.ending.set()
        assert await second == await silent == "result 1"

    async def test_one_listener_of_two_callers_leaves_with_each_of_them(
        self, work: Work, callers: Callers
    ) -> None:
        seen: list[Any] = []
        tasks = [callers.call(on_progress=seen.append) for _ in range(2)]
        await until(lambda: work.begun, "the run has begun")
        (tell,) = work.reports
        tell({"n": 1})
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        tell({"n": 2})
        assert [frame["n"] for frame in seen] == [1, 1, 2]
        work.ending.set()
        await tasks[1]


class TestFailures:
    """A run's exception is everybody's, and each has an own one to raise."""

    async def test_each_caller_gets_an_exception_of_its_own(self, work: Work, callers: Callers) -> None:
        tasks = await callers.waiting(3)
        cause = OSError("disk")
        work.failure = ValueError("bad", 7)
        work.failure.__cause__ = cause
        work.ending.set()
        caught = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(type(exc), exc.args) for exc in caught] == [(ValueError, ("bad", 7))] * 3
        assert len({id(exc) for exc in caught}) == 3
        assert all(exc.__cause__ is cause for exc in caught)
        # Raised by each in its own place: none has the frames of the others.
        depths = [len(traceback.extract_tb(exc.__traceback__)) for exc in caught]
        assert max(depths) - min(depths) <= 1

    async def test_one_that_cannot_be_copied_is_shared(self, work: Work, callers: Callers) -> None:
        class Stubborn(Exception):
            def __init__(self, code: int, text: str) -> None:
                super().__init__(text)  # not what it would be made from again

        class Other(Exception):
            def __reduce__(self) -> Any:
                return ValueError, ("something else",)

        for failure in (Stubborn(7, "bad"), Other("bad")):
            work.begun = 0
            work.ending.clear()
            tasks = await callers.waiting(2)
            work.failure = failure
            work.ending.set()
            caught = await asyncio.gather(*tasks, return_exceptions=True)
            assert caught == [failure, failure]

    async def test_the_only_caller_gets_the_exception_itself(self, work: Work, callers: Callers) -> None:
        work.failure = ValueError("bad")
        work.ending.set()
        (caught,) = await asyncio.gather(callers.call(), return_exceptions=True)
        assert caught is work.failure

    async def test_a_run_that_is_cancelled_from_within_cancels_its_callers(
        self, calls: SharedCalls, callers: Callers
    ) -> None:
        tasks = await callers.waiting(2)
        task = calls._open["k"].task
        assert task is not None
        task.cancel()
        for caught in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(caught, asyncio.CancelledError)
        assert len(calls) == 0


class TestCancellation:
    """The run goes on as long as anybody waits for it."""

    @pytest.mark.parametrize("leaver", [0, 1, 2])
    async def test_cancelling_one_caller_leaves_the_run_to_the_others(
        self, work: Work, callers: Callers, leaver: int
    ) -> None:
        tasks = await callers.waiting(3)
        gone = tasks.pop(leaver)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        work.ending.set()
        assert await asyncio.gather(*tasks) == ["result 1"] * 2
        assert work.cancelled == 0

    @pytest.mark.parametrize("together", [True, False])
    async def test_cancelling_the_last_caller_cancels_the_run_and_waits_for_it(
        self, calls: SharedCalls, work: Work, callers: Callers, together: bool
    ) -> None:
        tasks = await callers.waiting(3)
        work.farewell.clear()
        for task in tasks:
            task.cancel()
            if not together:
                await asyncio.wait([task], timeout=0)
                await asyncio.sleep(0)
        await until(lambda: sum(task.done() for task in tasks) == 2, "two are gone")
        (last,) = (task for task in tasks if not task.done())
        assert (work.cancelled, last.cancelling()) == (0, 1)
        work.farewell.set()
        await asyncio.wait([last])
        assert last.cancelled()
        assert (work.cancelled, len(calls)) == (1, 0)

    async def test_whoever_calls_while_a_run_is_being_cancelled_begins_another(
        self, calls: SharedCalls, work: Work, callers: Callers
    ) -> None:
        (first,) = await callers.waiting(1)
        work.farewell.clear()
        first.cancel()
        await until(lambda: len(calls) == 0, "nobody joins it any more")
        second = callers.call()
        await until(lambda: work.begun == 2, "another run has begun")
        work.farewell.set()
        await asyncio.wait([first])
        assert len(calls) == 1  # the end of the first one is not that of the second
        third = callers.call()
        await until(lambda: calls._open["k"].waiters == 2, "the next one joins")
        work.ending.set()
        assert await second == await third == "result 2"

    async def test_a_second_cancellation_ends_the_wait_for_the_run(
        self, work: Work, callers: Callers
    ) -> None:
        (task,) = await callers.waiting(1)
        work.farewell.clear()
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        assert (task.cancelled(), work.cancelled) == (True, 0)
        work.farewell.set()
        await until(lambda: work.cancelled, "the run has ended all the same")

    async def test_a_run_that_fails_as_it_is_cancelled_troubles_nobody(
        self, calls: SharedCalls, callers: Callers
    ) -> None:
        async def fail_at_the_end(_: OnProgress) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("while ending")

        task = asyncio.create_task(calls.call("k", report, fail_at_the_end, patience=None, on_progress=None))
        await until(lambda: len(calls), "the run has begun")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


class TestPatience:
    """Whoever joins a run brings a deadline of its own."""

    async def test_a_joiner_gives_up_alone(self, work: Work, callers: Callers) -> None:
        (first,) = await callers.waiting(1)
        with pytest.raises(DeliveryTimeoutError) as caught:
            await callers.call(patience=0.001)
        assert str(caught.value) == (
            "the run with delivery_idempotency_key 'k' in environment 'reports', begun by another caller, had no "
            "outcome within this caller's delivery_timeout=0.001 s"
        )
        work.ending.set()
        assert await first == "result 1"
        assert work.cancelled == 0

    async def test_the_deadline_of_who_began_it_is_that_of_the_run_itself(
        self, work: Work, callers: Callers
    ) -> None:
        first = callers.call(patience=0.001)
        with pytest.raises(DeliveryTimeoutError):
            await callers.call(patience=0.002)  # later than the other one's would have been
        assert not first.done()
        work.ending.set()
        assert await first == "result 1"

    async def test_the_last_one_to_give_up_ends_the_run(
        self, calls: SharedCalls, work: Work, callers: Callers
    ) -> None:
        (first,) = await callers.waiting(1)
        joiner = callers.call(patience=0.05)
        await until(lambda: calls._open["k"].waiters == 2, "it has joined")
        first.cancel()
        with pytest.raises(DeliveryTimeoutError):
            await joiner
        assert (work.cancelled, len(calls)) == (1, 0)
