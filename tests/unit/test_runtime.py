"""ExecutorRuntime over executors that do what the test says, hang, or raise."""

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from wove_tests.waiting import until

from wove import alarm, dispatch, frames
from wove.environment import (
    BackendAdapterEnvironmentExecutor,
    DeliveryOrphanedError,
    DeliveryTimeoutError,
    EnvironmentExecutionError,
    EnvironmentExecutor,
    ExecutorRuntime,
    GrpcEnvironmentExecutor,
    HttpEnvironmentExecutor,
    LocalEnvironmentExecutor,
    StdioEnvironmentExecutor,
    WebSocketEnvironmentExecutor,
    WorkerLostError,
    WoveError,
    build_executor_from_name,
    coerce_executor,
)
from wove.errors import ConfigurationError, SubmitError
from wove.worker import current

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from wove.frames import Frame
    from wove.handle import EnvironmentHandle

    Hook = Callable[..., Awaitable[Any]]


async def never(*_: object) -> NoReturn:
    """Hang."""
    await asyncio.Event().wait()
    raise AssertionError


def raising(exc: BaseException) -> Hook:
    """Make a hook that raises."""

    async def hook(*_: object) -> NoReturn:
        raise exc

    return hook


class Scripted(EnvironmentExecutor):
    """Notes what it is told; reports what the test puts in; hooks hang or raise."""

    def __init__(
        self,
        *,
        start: Hook | None = None,
        send: Hook | None = None,
        recv: Hook | None = None,
        stop: Hook | None = None,
        heartbeat: float | None = None,
    ) -> None:
        self.default_heartbeat_seconds = heartbeat
        self.hooks = {"start": start, "send": send, "recv": recv, "stop": stop}
        self.calls: list[str] = []
        self.sent: list[Frame] = []
        self.given: dict[str, Any] = {}
        self.events: asyncio.Queue[Any] = asyncio.Queue()

    async def _hook(self, name: str, *args: Any) -> Any:
        hook = self.hooks[name]
        return await hook(*args) if hook is not None else None

    async def start(self, **given: Any) -> None:
        self.calls.append("start")
        self.given = given
        await self._hook("start")

    async def send(self, frame: Frame) -> None:
        self.sent.append(frame)
        await self._hook("send", frame)

    async def recv(self) -> Frame:
        await self._hook("recv")
        return await self.events.get()

    async def stop(self) -> None:
        self.calls.append("stop")
        await self._hook("stop")

    def commands(self, kind: str) -> list[Frame]:
        """Return the commands of a kind that were sent."""
        return [frame for frame in self.sent if frame["type"] == kind]

    async def runs(self, count: int = 1) -> list[Frame]:
        """Wait for so many ``run_task`` commands."""
        await until(lambda: len(self.commands("run_task")) >= count, f"{count} runs were sent")
        return self.commands("run_task")

    async def cancels(self, count: int = 1) -> list[Frame]:
        """Wait for so many ``cancel_task`` commands."""
        await until(lambda: len(self.commands("cancel_task")) >= count, f"{count} cancellations were sent")
        return self.commands("cancel_task")

    def report(self, run: Frame, kind: str, **fields: Any) -> None:
        """Report an event of a run."""
        if kind == "task_error" and "error" not in fields:
            fields["error"] = {"kind": "Boom", "message": "it broke", "source": "task"}
        self.events.put_nowait(frames.event(kind, run["run_id"], run["task_id"], 1, 1, **fields))


class LoopClock:
    """The loop's clock, which jumps when told to: a deadline of a minute takes no time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        real = loop.time
        self.ahead = 0.0
        loop.time = lambda: real() + self.ahead

    async def advance(self, seconds: float) -> None:
        """Let so many seconds pass, and whatever was due in them happen."""
        self.ahead += seconds
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture
async def clock() -> LoopClock:
    """The clock of this test's loop."""
    return LoopClock(asyncio.get_running_loop())


@pytest.fixture(autouse=True)
def _hang_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What still hangs when a test is over holds its environment up for a moment only."""
    monkeypatch.setattr(dispatch, "STOP_SECONDS", 0.05)


@pytest.fixture
async def executor() -> Scripted:
    """An executor that accepts everything and reports nothing by itself."""
    return Scripted()


@pytest.fixture
async def handle(executor: Scripted, clock: LoopClock) -> AsyncIterator[EnvironmentHandle]:
    """Its environment, started; its timers go by the clock."""
    async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
        yield runtime["there"]


def task(*_: Any, **__: Any) -> NoReturn:
    """Never runs: a scripted executor runs nothing."""
    raise AssertionError


def begin(work: Awaitable[Any]) -> asyncio.Future[Any]:
    """Let work run beside the test; if it fails and the test does not look, that is no noise."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


async def ended(*callers: asyncio.Future[Any]) -> None:
    """Wait for calls to end, with whatever outcome."""
    await until(lambda: all(caller.done() for caller in callers), "the calls have ended")


class TestDefinitions:
    """A mistake in a definition is an error that names it, before anything starts."""

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("executr", "executor"),
            ("executor_conf", "executor_config"),
            ("delivery_timeot", "delivery_timeout"),
            ("delivery_hartbeat_seconds", "delivery_heartbeat_seconds"),
        ],
    )
    def test_a_misspelt_key_is_named_together_with_the_nearest(self, key: str, meant: str) -> None:
        with pytest.raises(
            ConfigurationError, match=f"environment 'reports': unknown key '{key}'; did you mean '{meant}'"
        ):
            ExecutorRuntime({"reports": {key: 1}})

    async def test_a_misspelt_executor_config_key_is_named_together_with_the_nearest(self) -> None:
        runtime = ExecutorRuntime({"reports": {"executor_config": {"thread": 4}}})
        with pytest.raises(
            ConfigurationError,
            match="environment 'reports': unknown executor_config key 'thread'; did you mean 'threads'",
        ):
            await runtime.start()

    def test_an_unusable_delivery_value_is_named_together_with_the_environment(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"environment 'reports': delivery_timeout is .*got '60'"
        ):
            ExecutorRuntime({"reports": {"delivery_timeout": "60"}})

    @pytest.mark.parametrize("threads", [0, -1, "4", 1.5, True])
    async def test_an_unusable_executor_config_value_is_refused(self, threads: Any) -> None:
        runtime = ExecutorRuntime({"reports": {"executor_config": {"threads": threads}}})
        with pytest.raises(ConfigurationError, match=r"'reports': executor_config\[\"threads\"\] is a whole"):
            await runtime.start()

    @pytest.mark.parametrize("definition", [None, 5, "local", ["executor"]])
    def test_a_definition_that_is_no_mapping_is_refused(self, definition: Any) -> None:
        with pytest.raises(ConfigurationError, match="environment 'reports': a definition is a mapping"):
            ExecutorRuntime({"reports": definition})

    @pytest.mark.parametrize("config", [5, "redis://localhost", ["threads"]])
    def test_an_executor_config_that_is_no_mapping_is_refused(self, config: Any) -> None:
        with pytest.raises(ConfigurationError, match="environment 'reports': executor_config is a mapping"):
            ExecutorRuntime({"reports": {"executor_config": config}})

    @pytest.mark.parametrize("name", ["", 5, None, "x" * 201, "ä" * 101])
    def test_an_unusable_name_is_refused(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match="a string of 1 to 200 bytes"):
            ExecutorRuntime({name: {}})

    def test_a_misspelt_setting_of_the_runtime_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="'delivery_timeot'; did you mean 'delivery_timeout'"):
            ExecutorRuntime({}, run_config={"delivery_timeot": 1})

    async def test_the_executor_is_given_what_was_configured(self) -> None:
        executor = Scripted()
        definition = {"executor": executor, "executor_config": {"url": "x"}}
        async with ExecutorRuntime({"there": definition}, run_config={"app": 1}):
            assert executor.given == {
                "environment_name": "there",
                "environment_config": {"url": "x"},
                "run_config": {"app": 1},
            }

    async def test_an_empty_definition_is_a_local_environment(self) -> None:
        async with ExecutorRuntime({"here": {"executor_config": None}}) as runtime:
            assert await runtime["here"].run(abs, -1) == 1

    async def test_the_nearest_setting_wins(self) -> None:
        far, near = Scripted(), Scripted()
        definitions = {"far": {"executor": far}, "near": {"executor": near, "delivery_timeout": 20}}
        async with ExecutorRuntime(definitions, run_config={"delivery_timeout": 10}) as runtime:
            calls = [
                begin(call)
                for call in (
                    runtime["far"].run(task),
                    runtime["near"].run(task),
                    runtime["near"].options(delivery_timeout=30).run(task),
                    runtime["near"].options(delivery_timeout=30).options(delivery_timeout=None).run(task),
                )
            ]
            assert [run["delivery"]["timeout"] for run in await far.runs()] == [10]
            assert [run["delivery"]["timeout"] for run in await near.runs(3)] == [20, 30, None]
        await ended(*calls)


class TestLookup:
    """A wrong name is an error that names the right one."""

    @pytest.mark.parametrize(
        "look",
        [
            lambda runtime: runtime["reprots"],
            lambda runtime: runtime.is_local_environment("reprots"),
            lambda runtime: runtime.run_task(
                task_name="t", task_func=task, task_args={}, task_info={"environment": "reprots"}
            ),
        ],
        ids=["getitem", "is_local_environment", "run_task"],
    )
    async def test_an_unknown_environment_is_a_name_error_with_the_nearest_name(self, look: Any) -> None:
        async with ExecutorRuntime({"reports": {}, "mail": {}}) as runtime:
            with pytest.raises(NameError, match="unknown environment 'reprots'; did you mean 'reports'"):
                await look(runtime)

    async def test_without_a_near_name_all_are_listed(self) -> None:
        async with ExecutorRuntime({"reports": {}, "mail": {}}) as runtime:
            with pytest.raises(NameError, match="unknown environment 'xyz'; known: mail, reports"):
                runtime["xyz"]

    async def test_an_environment_that_is_not_started_is_told_from_an_unknown_one(self) -> None:
        runtime = ExecutorRuntime({"reports": {}})
        with pytest.raises(WoveError, match=r"'reports' is not started: use `async with .*start\(\)"):
            runtime["reports"]
        await runtime.start()
        assert runtime["reports"].name == "reports"
        await runtime.stop()
        with pytest.raises(WoveError, match="'reports' is not started"):
            runtime["reports"]

    async def test_local_environments_are_told_from_others_before_and_after_the_start(self) -> None:
        runtime = ExecutorRuntime(
            {
                "default": {},
                "by name": {"executor": "local"},
                "by instance": {"executor": LocalEnvironmentExecutor()},
                "scripted": {"executor": Scripted()},
            }
        )
        for _ in range(2):
            assert [
                runtime.is_local_environment(name)
                for name in ("default", "by name", "by instance", "scripted")
            ] == [True, True, True, False]
            await runtime.start()
        await runtime.stop()
        assert ExecutorRuntime({"far": {"executor": "celery"}}).is_local_environment("far") is False


class TestStart:
    """All or nothing, and at the same time."""

    async def test_environments_start_concurrently(self) -> None:
        together = asyncio.Barrier(3)
        executors = [Scripted(start=together.wait) for _ in range(3)]
        async with ExecutorRuntime({str(n): {"executor": e} for n, e in enumerate(executors)}):
            assert [executor.calls for executor in executors] == [["start"]] * 3

    async def test_one_that_fails_closes_the_others_and_the_note_names_it(self) -> None:
        good, bad = Scripted(), Scripted(start=raising(OSError("no broker")))
        runtime = ExecutorRuntime({"good": {"executor": good}, "bad": {"executor": bad}})
        with pytest.raises(OSError, match="no broker") as caught:
            await runtime.start()
        assert caught.value.__notes__ == ["while starting environment 'bad'"]
        assert good.calls == ["start", "stop"]
        assert bad.calls == ["start", "stop"]
        with pytest.raises(WoveError, match="not started"):
            runtime["good"]

    async def test_one_that_is_quick_to_fail_waits_for_the_others_to_be_closed(self) -> None:
        bad_has_failed = asyncio.Event()

        async def fail() -> NoReturn:
            bad_has_failed.set()
            raise OSError("no broker")

        slow, bad = Scripted(start=bad_has_failed.wait), Scripted(start=fail)
        with pytest.raises(OSError, match="no broker"):
            await ExecutorRuntime({"slow": {"executor": slow}, "bad": {"executor": bad}}).start()
        assert slow.calls == ["start", "stop"]

    async def test_a_failed_start_can_be_repeated(self) -> None:
        executor = Scripted(start=raising(OSError("no broker")))
        runtime = ExecutorRuntime({"there": {"executor": executor}})
        with pytest.raises(OSError, match="no broker"):
            await runtime.start()
        executor.hooks["start"] = None
        async with runtime:
            assert runtime["there"].name == "there"

    async def test_a_start_that_is_cancelled_closes_what_has_started(self) -> None:
        good, slow = Scripted(), Scripted(start=never)
        runtime = ExecutorRuntime({"good": {"executor": good}, "slow": {"executor": slow}})
        starting = begin(runtime.start())
        await until(lambda: good.calls and slow.calls, "both are starting")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert slow.calls == ["start", "stop"]
        assert good.calls == ["start", "stop"]

    async def test_a_start_that_hangs_ends(self, clock: LoopClock) -> None:
        executor = Scripted(start=never)
        starting = begin(ExecutorRuntime({"there": {"executor": executor}}).start())
        await until(lambda: executor.calls, "it is starting")
        await clock.advance(dispatch.START_SECONDS - 1)
        assert not starting.done()
        await clock.advance(2)
        with pytest.raises(TimeoutError, match="environment 'there' did not start within 30 s") as caught:
            await starting
        assert caught.value.__notes__ == ["while starting environment 'there'"]
        assert executor.calls == ["start", "stop"]

    async def test_one_executor_cannot_serve_two_environments(self) -> None:
        executor = Scripted()
        runtime = ExecutorRuntime({"one": {"executor": executor}, "two": {"executor": executor}})
        with pytest.raises(
            ConfigurationError, match="'two': its executor instance serves environment 'one' already"
        ):
            await runtime.start()
        assert executor.calls == ["start", "stop"]

    async def test_one_executor_cannot_serve_two_runtimes(self) -> None:
        executor = Scripted()
        definitions = {"there": {"executor": executor}}
        async with ExecutorRuntime(definitions) as runtime:
            with pytest.raises(ConfigurationError, match="serves environment 'there' already"):
                await ExecutorRuntime(definitions).start()
            call = begin(runtime["there"].run(task))
            executor.report((await executor.runs())[0], "task_result", result=1)
            assert await call == 1
        assert executor.calls == ["start", "stop"]

    async def test_an_executor_may_serve_another_environment_once_it_was_stopped(self) -> None:
        executor = Scripted()
        for name in ("one", "two"):
            async with ExecutorRuntime({name: {"executor": executor}}):
                pass
        assert executor.calls == ["start", "stop"] * 2

    async def test_an_executor_needs_no_hash(self) -> None:
        class Unhashable(Scripted):
            def __eq__(self, other: object) -> bool:
                return self is other

            __hash__ = None

        async with ExecutorRuntime({"there": {"executor": Unhashable()}}) as runtime:
            assert runtime["there"].name == "there"

    @pytest.mark.parametrize("how", ["start", "ensure_environment"])
    async def test_what_is_starting_while_the_runtime_stops_is_stopped_too(self, how: str) -> None:
        go_on = asyncio.Event()
        executor = Scripted(start=go_on.wait)
        definition = {"executor": executor}
        runtime = ExecutorRuntime({"there": definition} if how == "start" else {})
        starting = begin(
            runtime.start() if how == "start" else runtime.ensure_environment("there", definition)
        )
        await until(lambda: executor.calls, "it is starting")
        await runtime.stop()
        go_on.set()
        with pytest.raises(WoveError, match="stopped while environment 'there' was starting"):
            await starting
        assert executor.calls == ["start", "stop"]

    async def test_starting_and_stopping_are_idempotent(self) -> None:
        executor = Scripted()
        runtime = ExecutorRuntime({"there": {"executor": executor}})
        await runtime.stop()
        await runtime.start()
        await runtime.start()
        await runtime.stop()
        await runtime.stop()
        assert executor.calls == ["start", "stop"]

    async def test_a_stopped_runtime_can_be_started_again(self) -> None:
        runtime = ExecutorRuntime({"here": {}})
        for _ in range(2):
            async with runtime:
                assert await runtime["here"].run(abs, -1) == 1


class TestEnsureEnvironment:
    """Adds an environment to a runtime, once."""

    async def test_it_starts_an_environment_and_is_idempotent(self) -> None:
        executor = Scripted(start=lambda: asyncio.sleep(0))
        async with ExecutorRuntime({}) as runtime:
            await asyncio.gather(
                *(runtime.ensure_environment("there", {"executor": executor}) for _ in range(5))
            )
            await runtime.ensure_environment("there", {"executor": executor})
            assert executor.calls == ["start"]
            assert runtime["there"].name == "there"
        assert executor.calls == ["start", "stop"]

    async def test_the_running_one_stays_although_the_definition_differs(self) -> None:
        first, second = Scripted(), Scripted()
        async with ExecutorRuntime({"there": {"executor": first}}) as runtime:
            await runtime.ensure_environment("there", {"executor": second})
            call = begin(runtime["there"].run(task))
            (run,) = await first.runs()
            first.report(run, "task_result", result=1)
            assert await call == 1
        assert second.calls == []

    async def test_a_failure_names_the_environment_leaves_nothing_and_can_be_repeated(self) -> None:
        executor = Scripted(start=raising(OSError("no broker")))
        async with ExecutorRuntime({}) as runtime:
            with pytest.raises(OSError, match="no broker") as caught:
                await runtime.ensure_environment("there", {"executor": executor})
            assert caught.value.__notes__ == ["while starting environment 'there'"]
            assert executor.calls == ["start", "stop"]
            with pytest.raises(NameError):
                runtime["there"]
            executor.hooks["start"] = None
            await runtime.ensure_environment("there", {"executor": executor})
            assert runtime["there"].name == "there"

    async def test_the_definition_is_checked(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            with pytest.raises(ConfigurationError, match="environment 'here': unknown key 'executr'"):
                await runtime.ensure_environment("here", {"executr": "local"})

    @pytest.mark.parametrize(("executor", "error"), [("celry", ValueError), (5, TypeError)])
    async def test_an_unusable_executor_is_named_together_with_the_environment(
        self, executor: Any, error: type[Exception]
    ) -> None:
        async with ExecutorRuntime({}) as runtime:
            with pytest.raises(error) as caught:
                await runtime.ensure_environment("there", {"executor": executor})
        assert caught.value.__notes__ == ["while starting environment 'there'"]


class TestExecutorNames:
    """A name or an instance."""

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("local", LocalEnvironmentExecutor),
            ("stdio", StdioEnvironmentExecutor),
            ("http", HttpEnvironmentExecutor),
            ("https", HttpEnvironmentExecutor),
            ("grpc", GrpcEnvironmentExecutor),
            ("websocket", WebSocketEnvironmentExecutor),
            ("celery", BackendAdapterEnvironmentExecutor),
            ("rq", BackendAdapterEnvironmentExecutor),
            ("memory", BackendAdapterEnvironmentExecutor),
        ],
    )
    def test_every_name_is_a_new_executor(self, name: str, cls: type[EnvironmentExecutor]) -> None:
        one, other = build_executor_from_name(name), coerce_executor(name)
        assert type(one) is type(other) is cls
        assert one is not other
        if isinstance(one, BackendAdapterEnvironmentExecutor):
            assert one.name == name

    def test_https_insists_on_https(self) -> None:
        assert build_executor_from_name("https").require_https is True
        assert build_executor_from_name("http").require_https is False

    async def test_an_instance_is_taken_as_it_is(self) -> None:
        executor = Scripted()
        assert coerce_executor(executor) is executor

    @pytest.mark.parametrize("value", [None, 5, b"local", ["local"], LocalEnvironmentExecutor], ids=repr)
    def test_anything_else_is_a_type_error(self, value: Any) -> None:
        with pytest.raises(
            TypeError,
            match=f"^an executor is a name or an EnvironmentExecutor instance, not {type(value).__name__}$",
        ):
            coerce_executor(value)

    def test_an_unknown_name_is_a_value_error_with_the_nearest_and_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"^unknown executor 'celry'; did you mean 'celery'") as caught:
            coerce_executor("celry")
        for name in ("local", "stdio", "http", "https", "grpc", "websocket", "celery", "rq"):
            assert name in str(caught.value)
        with pytest.raises(ValueError, match=r"^unknown executor 'xyz'; known: .*celery.*websocket"):
            build_executor_from_name("xyz")


class TestRunTask:
    """The call that frameworks make."""

    def test_its_signature(self) -> None:
        parameters = inspect.signature(ExecutorRuntime.run_task).parameters
        assert list(parameters) == ["self", "task_name", "task_func", "task_args", "task_info"]
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[1:])

    async def test_it_runs_the_function_with_its_arguments(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            info = {"environment": "here"}
            result = await runtime.run_task(
                task_name="sort", task_func=dict, task_args={"a": 1, "b": 2}, task_info=info
            )
            assert result == {"a": 1, "b": 2}
            assert await runtime.run_task(task_name="t", task_func=dict, task_args=None, task_info=info) == {}

    async def test_the_name_is_the_tasks_id_and_the_settings_are_this_runs(
        self, executor: Scripted, clock: LoopClock
    ) -> None:
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(
                runtime.run_task(
                    task_name="nightly",
                    task_func=task,
                    task_args={},
                    task_info={"environment": "there", "delivery_timeout": 5, "unrelated": object()},
                )
            )
            (run,) = await executor.runs()
            assert (run["task_id"], run["delivery"]["timeout"]) == ("nightly", 5)
            assert frames.is_run_id(run["run_id"])
            await clock.advance(6)
            with pytest.raises(DeliveryTimeoutError, match=r"of nightly in environment 'there'.*timeout=5 s"):
                await call

    async def test_progress_is_handed_on(self) -> None:
        def work() -> None:
            current().progress(0.5, "half")

        seen: list[Any] = []
        async with ExecutorRuntime({"here": {}}) as runtime:
            info = {"environment": "here", "on_progress": seen.append}
            await runtime.run_task(task_name="t", task_func=work, task_args={}, task_info=info)
        assert [(frame["fraction"], frame["message"]) for frame in seen] == [(0.5, "half")]

    async def test_a_call_without_an_environment_is_named(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            with pytest.raises(ConfigurationError, match="task 'nightly': task_info has no \"environment\""):
                await runtime.run_task(task_name="nightly", task_func=task, task_args={}, task_info={})

    @pytest.mark.parametrize("name", [5, b"nightly", "x" * 1001])
    async def test_an_unusable_name_is_refused(self, name: Any) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            with pytest.raises(TypeError, match="a task's name is a string of at most 1000 characters"):
                await runtime.run_task(
                    task_name=name, task_func=dict, task_args={}, task_info={"environment": "here"}
                )

    async def test_a_misspelt_setting_is_an_error(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            info = {"environment": "here", "delivery_timeot": 5}
            with pytest.raises(ConfigurationError, match="did you mean 'delivery_timeout'"):
                await runtime.run_task(task_name="t", task_func=task, task_args={}, task_info=info)


class TestHandle:
    """``runtime["name"]``."""

    async def test_it_names_its_environment(self, handle: EnvironmentHandle) -> None:
        assert handle.name == "there"
        assert repr(handle) == "<EnvironmentHandle 'there'>"

    async def test_a_call_becomes_a_frame(self, handle: EnvironmentHandle, executor: Scripted) -> None:
        call = begin(handle.run(task, 1, (2,), key=3))
        (run,) = await executor.runs()
        assert (run["callable"], run["positional"], run["args"]) == (task, (1, (2,)), {"key": 3})
        assert run["task_id"].endswith("test_runtime.task")
        executor.report(run, "task_result", result="done")
        assert await call == "done"

    async def test_options_make_another_handle(self, handle: EnvironmentHandle, executor: Scripted) -> None:
        hurried = handle.options(delivery_timeout=5)
        calls = [begin(each.run(task)) for each in (hurried, handle)]
        assert [run["delivery"]["timeout"] for run in await executor.runs(2)] == [5, None]
        for run in executor.sent:
            executor.report(run, "task_result", result=1)
        await asyncio.gather(*calls)

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"timeout": 5}, "unknown option 'timeout'"),
            ({"delivery_timeot": 5}, "did you mean 'delivery_timeout'"),
            ({"delivery_timeout": "5"}, "delivery_timeout is a number"),
        ],
        ids=str,
    )
    async def test_unusable_options_are_refused(
        self, handle: EnvironmentHandle, settings: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=named):
            handle.options(**settings)

    async def test_what_is_no_callable_is_refused(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        with pytest.raises(TypeError, match="takes a callable, not str"):
            await handle.run("app.task")
        assert executor.sent == []

    async def test_a_call_that_fails_before_it_begins_keeps_nothing_alive(self) -> None:
        class Large:
            pass

        async def takes_nothing() -> None:
            pass

        argument = Large()
        reference = weakref.ref(argument)
        async with ExecutorRuntime({"here": {}}) as runtime:
            with pytest.raises(TypeError, match="takes 0 positional arguments"):
                await runtime["here"].run(takes_nothing, argument)
            del argument

            def gone() -> bool:
                gc.collect()
                return reference() is None

            await until(gone, "the argument is given free", patience=2)


class TestOutcomes:
    """What the caller gets, whatever order things come in."""

    async def test_an_error(self, handle: EnvironmentHandle, executor: Scripted) -> None:
        call = begin(handle.run(task))
        (run,) = await executor.runs()
        executor.report(run, "task_error")
        with pytest.raises(EnvironmentExecutionError, match="Boom: it broke"):
            await call

    async def test_a_cancellation_that_the_caller_did_not_ask_for_is_an_error(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        call = begin(handle.run(task))
        (run,) = await executor.runs()
        executor.report(run, "task_cancelled")
        with pytest.raises(
            EnvironmentExecutionError, match="was cancelled on the other side, not by its caller"
        ):
            await call

    async def test_a_result_that_is_ahead_of_the_brokers_answer(self) -> None:
        accepted = asyncio.Event()
        executor = Scripted(send=lambda frame: accepted.wait())
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(runtime["there"].run(task))
            (run,) = await executor.runs()
            executor.report(run, "task_result", result=1)
            assert await call == 1
            accepted.set()

    async def test_a_second_outcome_is_ignored(self, handle: EnvironmentHandle, executor: Scripted) -> None:
        call = begin(handle.run(task))
        (run,) = await executor.runs()
        executor.report(run, "task_result", result=1)
        executor.report(run, "task_error")
        executor.report(run, "task_result", result=2)
        assert await call == 1
        await until(executor.events.empty, "all was read")
        assert handle._dispatcher.table.dropped == {"late": 2}

    async def test_outcomes_reach_the_callers_they_belong_to(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        calls = [begin(handle.run(task, number)) for number in range(50)]
        for run in reversed(await executor.runs(50)):
            executor.report(run, "task_result", result=run["positional"][0] * 10)
        assert await asyncio.gather(*calls) == [number * 10 for number in range(50)]

    async def test_progress_and_log_reach_the_callers_callback(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        seen: list[Any] = []
        call = begin(handle.options(on_progress=seen.append).run(task))
        (run,) = await executor.runs()
        executor.report(run, "progress", fraction=0.5, message="half")
        executor.report(run, "log", message="a line")
        executor.report(run, "heartbeat")
        executor.report(run, "task_result", result=1)
        await call
        assert [frame["type"] for frame in seen] == ["progress", "log"]

    async def test_a_callback_that_fails_harms_nobody(
        self, handle: EnvironmentHandle, executor: Scripted, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(frame: object) -> NoReturn:
            raise ValueError("in the callback")

        call = begin(handle.options(on_progress=fail).run(task))
        (run,) = await executor.runs()
        executor.report(run, "log", message="a line")
        executor.report(run, "task_result", result=1)
        assert await call == 1
        assert f"on_progress failed for run {run['run_id']}" in caplog.text

    async def test_malformed_progress_does_not_reach_the_callback(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        seen: list[Any] = []
        call = begin(handle.options(on_progress=seen.append).run(task))
        (run,) = await executor.runs()
        executor.report(run, "progress", fraction="a half", message=5)
        executor.report(run, "task_result", result=1)
        assert await call == 1
        assert seen == []


@dataclass(frozen=True)
class Frozen(Exception):
    """Lets nothing be set on it."""

    code: int


class TestMalformedEvents:
    """A malformed event harms at most its own run."""

    @pytest.mark.parametrize(
        "event",
        [
            None,
            "progress",
            ["progress"],
            {},
            {"type": None},
            {"type": ["progress"]},
            {"type": "progress"},
            {"type": "progress", "run_id": ["unhashable"]},
            {"type": "log", "run_id": {}},
            {"type": "heartbeat", "run_id": ["unhashable"]},
            {"type": "task_result", "run_id": 5},
            frames.event("of_a_newer_peer", "a" * 32, "task", 1, 1),
            frames.event("task_result", "a" * 32, "task", 1, 1, result=1),
        ],
        ids=str,
    )
    async def test_other_runs_go_on(self, handle: EnvironmentHandle, executor: Scripted, event: Any) -> None:
        call = begin(handle.run(task))
        (run,) = await executor.runs()
        executor.events.put_nowait(event)
        executor.report(run, "task_result", result=1)
        assert await call == 1

    async def test_an_exception_that_lets_nothing_be_set_on_it_harms_its_own_run_only(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        calls = [begin(handle.run(task)) for _ in range(2)]
        first, second = await executor.runs(2)
        error = {"kind": "Frozen", "message": "7", "traceback": "tb", "source": "task"}
        executor.report(first, "task_error", error=error, exception=Frozen(7), worker={"host": "w1"})
        executor.report(second, "task_result", result=1)
        with pytest.raises((Frozen, EnvironmentExecutionError)) as caught:
            await calls[0]
        assert "out of order" not in str(caught.value)
        assert await calls[1] == 1


class TestDeadlines:
    """They hold whatever the executor does."""

    async def test_a_run_without_an_outcome_ends_and_its_work_is_cancelled(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        call = begin(handle.options(delivery_timeout=60).run(task))
        (run,) = await executor.runs()
        executor.report(run, "task_started")
        await clock.advance(59)
        assert not call.done()
        await clock.advance(2)
        with pytest.raises(DeliveryTimeoutError, match="delivery_timeout=60 s"):
            await call
        (cancel,) = await executor.cancels()
        assert cancel["run_id"] == run["run_id"]

    async def test_a_run_that_does_not_start_ends(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        impatient = handle.options(delivery_start_timeout=60)
        calls = [begin(impatient.run(task)) for _ in range(2)]
        started, queued = await executor.runs(2)
        executor.report(started, "task_started")
        await until(executor.events.empty, "the start was read")
        await clock.advance(61)
        with pytest.raises(
            DeliveryTimeoutError, match="delivery_start_timeout=60 s: accepted by the backend"
        ):
            await calls[1]
        assert [cancel["run_id"] for cancel in await executor.cancels()] == [queued["run_id"]]
        assert not calls[0].done()
        executor.report(started, "task_result", result=1)
        assert await calls[0] == 1

    @pytest.mark.parametrize("first", ["task_started", "heartbeat", "progress", "log"])
    async def test_silence_after_the_first_sign_of_life_is_a_lost_worker(
        self, clock: LoopClock, first: str
    ) -> None:
        executor = Scripted(heartbeat=15)
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(runtime["there"].run(task))
            (run,) = await executor.runs()
            await clock.advance(100)  # silence in the queue is none
            for _ in range(3):
                assert not call.done()
                executor.report(run, first)
                await until(executor.events.empty, "the event was read")
                await clock.advance(10)
            assert not call.done()
            await clock.advance(6)
            assert call.done(), "nobody was woken for the deadline"
            with pytest.raises(WorkerLostError, match="no sign of life"):
                await call

    async def test_the_executor_says_how_often_its_workers_beat_and_the_user_may_differ(
        self, clock: LoopClock
    ) -> None:
        executor = Scripted(heartbeat=15)
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            handle = runtime["there"]
            watched = begin(handle.run(task))
            patient = begin(handle.options(delivery_heartbeat_seconds=None).run(task))
            runs = await executor.runs(2)
            assert [run["delivery"]["heartbeat_seconds"] for run in runs] == [15, None]
            for run in runs:
                executor.report(run, "task_started")
            await until(executor.events.empty, "the starts were read")
            await clock.advance(16)
            with pytest.raises(WorkerLostError):
                await watched
            assert not patient.done()
            executor.report(runs[1], "task_result", result=1)
            assert await patient == 1

    async def test_silence_means_nothing_where_workers_send_no_heartbeats(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        call = begin(handle.options(delivery_heartbeat_seconds=15).run(task))
        (run,) = await executor.runs()
        executor.report(run, "task_started")
        await until(executor.events.empty, "the start was read")
        await clock.advance(1000)
        executor.report(run, "task_result", result=1)
        assert await call == 1

    async def test_what_has_arrived_counts_however_late_it_is_read(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        turns = iter([2, *[1] * 100])

        async def a_turn_or_two() -> None:
            for _ in range(next(turns)):
                await asyncio.sleep(0)

        executor.hooks["recv"] = a_turn_or_two
        call = begin(handle.options(delivery_timeout=60).run(task))
        (run,) = await executor.runs()
        for _ in range(20):
            executor.report(run, "heartbeat")
        executor.report(run, "task_result", result=1)
        clock.ahead += 61  # the loop was busy all the while
        assert await call == 1

    async def test_a_flood_of_events_does_not_put_a_deadline_off(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        busy, late = begin(handle.run(task)), begin(handle.options(delivery_timeout=60).run(task))
        runs = await executor.runs(2)

        async def flood() -> None:
            executor.report(runs[0], "heartbeat")
            await asyncio.sleep(0)

        executor.hooks["recv"] = flood
        executor.report(runs[0], "heartbeat")
        await clock.advance(61)
        for _ in range(10 * alarm.MAX_CATCH_UP):
            await asyncio.sleep(0)
        assert late.done()
        executor.hooks["recv"] = None
        executor.report(runs[0], "task_result", result=1)
        assert await busy == 1

    async def test_many_deadlines_each_in_its_turn(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        calls = {
            seconds: begin(handle.options(delivery_timeout=seconds).run(task))
            for seconds in (50, 10, 30, 20, 40)
        }
        await executor.runs(5)
        await clock.advance(25)
        await ended(calls[10], calls[20])
        assert [seconds for seconds, call in calls.items() if not call.done()] == [50, 30, 40]
        await clock.advance(30)
        await ended(*calls.values())
        assert all(isinstance(call.exception(), DeliveryTimeoutError) for call in calls.values())


class TestBrokenSend:
    """``send`` hangs or raises: every run ends all the same."""

    async def test_what_it_raises_is_what_the_caller_gets(self) -> None:
        error = OSError("no broker")
        async with ExecutorRuntime({"there": {"executor": Scripted(send=raising(error))}}) as runtime:
            with pytest.raises(OSError, match="no broker") as caught:
                await runtime["there"].run(task)
            assert caught.value is error
            assert len(runtime["there"]._dispatcher.table) == 0

    async def test_one_that_was_cancelled_from_within_ends_the_run(self) -> None:
        executor = Scripted(send=raising(asyncio.CancelledError("of the executor's own")))
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(runtime["there"].run(task))
            await until(call.done, "the call has ended", patience=2)
            with pytest.raises(SubmitError, match="cancelled its own send"):
                await call

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ("delivery_timeout", "delivery_timeout=60 s"),
            ("delivery_start_timeout", "delivery_start_timeout=60 s: not accepted by the backend yet"),
        ],
    )
    async def test_one_that_hangs_is_ended_by_the_deadline_and_cancelled(
        self, clock: LoopClock, setting: str, text: str
    ) -> None:
        cancelled = asyncio.Event()

        async def hang(frame: Frame) -> None:
            try:
                await never()
            finally:
                if frame["type"] == "run_task":
                    cancelled.set()

        executor = Scripted(send=hang)
        async with ExecutorRuntime({"there": {"executor": executor, setting: 60}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
            await clock.advance(61)
            with pytest.raises(DeliveryTimeoutError, match=text):
                await call
            assert cancelled.is_set()

    @pytest.mark.parametrize("hook", [never, raising(OSError("no broker"))], ids=["hangs", "raises"])
    async def test_a_cancellation_that_cannot_be_sent_does_not_hide_the_timeout(
        self, clock: LoopClock, hook: Hook
    ) -> None:
        async def accept_runs_only(frame: Frame) -> None:
            if frame["type"] != "run_task":
                await hook()

        executor = Scripted(send=accept_runs_only)
        async with ExecutorRuntime({"there": {"executor": executor, "delivery_timeout": 60}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
            await clock.advance(61)
            with pytest.raises(DeliveryTimeoutError):
                await call
            await executor.cancels()

    async def test_cancelling_the_caller_while_it_hangs_returns_at_once(self) -> None:
        executor = Scripted(send=never)
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert len(runtime["there"]._dispatcher.table) == 0

    async def test_one_that_hangs_does_not_hold_other_runs_up(self) -> None:
        async def hang_for_the_first(frame: Frame) -> None:
            if frame.get("positional") == (1,):
                await never()

        executor = Scripted(send=hang_for_the_first)
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            stuck = begin(runtime["there"].run(task, 1))
            other = begin(runtime["there"].run(task, 2))
            executor.report((await executor.runs(2))[1], "task_result", result=2)
            assert await other == 2
            assert not stuck.done()
        await ended(stuck)


class TestBrokenRecv:
    """``recv`` raises: the environment is out of order, and says so."""

    async def test_open_and_later_runs_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        broken = asyncio.Event()

        async def break_down() -> None:
            await broken.wait()
            raise OSError("connection lost")

        executor, healthy = Scripted(recv=break_down), Scripted()
        definitions = {"there": {"executor": executor}, "elsewhere": {"executor": healthy}}
        async with ExecutorRuntime(definitions) as runtime:
            calls = [begin(runtime["there"].run(task)) for _ in range(3)]
            unharmed = begin(runtime["elsewhere"].run(task))
            await executor.runs(3)
            broken.set()
            await ended(*calls)
            for call in (*calls, begin(runtime["there"].run(task))):
                with pytest.raises(
                    EnvironmentExecutionError, match="'there' is out of order: connection lost"
                ) as caught:
                    await call
                assert caught.value.payload["source"] == "executor"
                assert isinstance(caught.value.__cause__, OSError)
            assert len(executor.commands("run_task")) == 3
            (run,) = await healthy.runs()
            healthy.report(run, "task_result", result=1)
            assert await unharmed == 1
        assert "its executor stopped receiving" in caplog.text
        assert executor.calls == ["start", "stop"]

    async def test_one_that_was_cancelled_from_within_is_no_silence(self) -> None:
        broken = asyncio.Event()

        async def break_down() -> None:
            await broken.wait()
            raise asyncio.CancelledError("of the executor's own")

        executor = Scripted(recv=break_down)
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
            broken.set()
            await until(call.done, "the call has ended", patience=2)
            with pytest.raises(EnvironmentExecutionError, match="out of order"):
                await call

    async def test_one_that_never_returns_is_ended_by_the_deadline(self, clock: LoopClock) -> None:
        executor = Scripted(recv=never)
        async with ExecutorRuntime({"there": {"executor": executor, "delivery_timeout": 60}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
            await clock.advance(61)
            with pytest.raises(DeliveryTimeoutError):
                await call


class TestCancel:
    """Cancelling the awaiting task cancels the run."""

    async def test_best_effort_returns_at_once_and_passes_it_on(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        call = begin(handle.run(task))
        (run,) = await executor.runs()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        (cancel,) = await executor.cancels()
        assert (cancel["run_id"], cancel["task_id"]) == (run["run_id"], run["task_id"])

    @pytest.mark.parametrize("answer", ["task_cancelled", "task_result", "task_error"])
    async def test_require_ack_returns_when_the_worker_has_answered(
        self, handle: EnvironmentHandle, executor: Scripted, answer: str
    ) -> None:
        call = begin(handle.options(delivery_cancel_mode="require_ack").run(task))
        (run,) = await executor.runs()
        call.cancel()
        await executor.cancels()
        assert not call.done()
        executor.report(run, answer, **({"result": 1} if answer == "task_result" else {}))
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(handle._dispatcher.table) == 0

    async def test_require_ack_does_not_wait_for_ever_and_says_so(
        self,
        handle: EnvironmentHandle,
        executor: Scripted,
        clock: LoopClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        strict = handle.options(delivery_cancel_mode="require_ack", delivery_cancel_timeout=30)
        call = begin(strict.run(task))
        await executor.runs()
        call.cancel()
        await executor.cancels()
        await clock.advance(29)
        assert not call.done()
        await clock.advance(2)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert "did not acknowledge that within delivery_cancel_timeout=30 s" in caplog.text

    async def test_a_second_cancellation_ends_the_wait(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        call = begin(handle.options(delivery_cancel_mode="require_ack").run(task))
        await executor.runs()
        call.cancel()
        await executor.cancels()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def test_a_timeout_of_the_callers_own_cancels_the_run(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock
    ) -> None:
        async def impatient() -> None:
            async with asyncio.timeout(60):
                await handle.run(task)

        call = begin(impatient())
        await executor.runs()
        await clock.advance(61)
        with pytest.raises(TimeoutError):
            await call
        await executor.cancels()


class TestMaxInFlight:
    """``delivery_max_in_flight`` bounds all runs of an environment together."""

    @pytest.fixture
    async def handle(self, executor: Scripted, clock: LoopClock) -> AsyncIterator[EnvironmentHandle]:
        """An environment that takes two runs at once."""
        definition = {"executor": executor, "delivery_max_in_flight": 2}
        async with ExecutorRuntime({"there": definition}) as runtime:
            yield runtime["there"]

    @staticmethod
    async def settled() -> None:
        """Let everything that can happen now happen."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def test_no_more_runs_are_sent_than_allowed(
        self, handle: EnvironmentHandle, executor: Scripted
    ) -> None:
        calls = [begin(handle.run(task, number)) for number in range(6)]
        for done in range(6):
            await executor.runs(min(done + 2, 6))
            await self.settled()
            assert len(executor.sent) == min(done + 2, 6)
            executor.report(executor.sent[done], "task_result", result=done)
            assert await calls[done] == done

    @pytest.mark.parametrize("end", ["error", "cancel", "timeout", "cancel while waiting"])
    async def test_a_run_gives_its_place_back_however_it_ends(
        self, handle: EnvironmentHandle, executor: Scripted, clock: LoopClock, end: str
    ) -> None:
        calls = [begin(handle.options(delivery_timeout=60).run(task)) for _ in range(2)]
        runs = list(await executor.runs(2))
        waiting = [begin(handle.run(task)) for _ in range(2)]
        await self.settled()
        if end == "error":
            executor.report(runs[0], "task_error")
        elif end == "timeout":
            await clock.advance(61)
        else:
            if end == "cancel while waiting":
                waiting.pop(0).cancel()
            calls[0].cancel()
        next_one = (await executor.runs(3))[2]
        executor.report(next_one, "task_result", result="next")
        assert await waiting[0] == "next"

    async def test_a_send_that_fails_gives_its_place_back(self) -> None:
        executor = Scripted(send=raising(OSError("no broker")))
        definition = {"executor": executor, "delivery_max_in_flight": 1}
        async with ExecutorRuntime({"there": definition}) as runtime:
            for _ in range(3):
                with pytest.raises(OSError, match="no broker"):
                    await runtime["there"].run(task)

    async def test_one_run_cannot_change_it(self, handle: EnvironmentHandle, executor: Scripted) -> None:
        with pytest.raises(
            ConfigurationError, match="delivery_max_in_flight belongs to an environment's definition"
        ):
            await handle.options(delivery_max_in_flight=5).run(task)
        assert executor.sent == []

    async def test_callers_that_wait_for_a_place_are_told_when_the_environment_stops(self) -> None:
        executor = Scripted()
        definition = {"executor": executor, "delivery_max_in_flight": 1, "delivery_orphan_policy": "fail"}
        async with ExecutorRuntime({"there": definition}) as runtime:
            calls = [begin(runtime["there"].run(task)) for _ in range(3)]
            await executor.runs()
        await ended(*calls)
        assert isinstance(calls[0].exception(), DeliveryOrphanedError)
        for call in calls[1:]:
            with pytest.raises(WoveError, match="'there' is stopped"):
                await call
        assert len(executor.commands("run_task")) == 1


class TestStop:
    """What becomes of open runs, and that stopping ends."""

    async def stop_with_open_runs(self, executor: Scripted, policy: str) -> list[asyncio.Future[Any]]:
        """Open a queued and a started run, stop, and return the callers."""
        definition = {"executor": executor, "delivery_orphan_policy": policy}
        async with ExecutorRuntime({"there": definition}) as runtime:
            calls = [begin(runtime["there"].run(task)) for _ in range(2)]
            executor.report((await executor.runs(2))[0], "task_started")
            await until(executor.events.empty, "the start was read")
        await ended(*calls)
        return calls

    async def test_cancel_cancels_the_work_and_its_waiters(self, executor: Scripted) -> None:
        calls = await self.stop_with_open_runs(executor, "cancel")
        assert all(call.cancelled() for call in calls)
        cancelled = {frame["run_id"] for frame in executor.commands("cancel_task")}
        assert cancelled == {frame["run_id"] for frame in executor.commands("run_task")}
        assert executor.calls == ["start", "stop"]

    async def test_fail_cancels_the_work_and_tells_its_waiters(self, executor: Scripted) -> None:
        for call in await self.stop_with_open_runs(executor, "fail"):
            with pytest.raises(
                DeliveryOrphanedError, match="environment 'there' was stopped; its work was cancelled"
            ):
                await call
        assert len(executor.commands("cancel_task")) == 2

    async def test_detach_lets_the_work_run_on_and_tells_its_waiters(self, executor: Scripted) -> None:
        for call in await self.stop_with_open_runs(executor, "detach"):
            with pytest.raises(
                DeliveryOrphanedError, match="environment 'there' was stopped; its work runs on"
            ):
                await call
        assert executor.commands("cancel_task") == []

    async def test_each_run_ends_by_a_policy_of_its_own(self, executor: Scripted) -> None:
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            handle = runtime["there"]
            calls = [
                begin(handle.options(delivery_orphan_policy=policy).run(task))
                for policy in ("cancel", "fail", "detach")
            ]
            runs = await executor.runs(3)
        await ended(*calls)
        assert calls[0].cancelled()
        assert [type(call.exception()) for call in calls[1:]] == [DeliveryOrphanedError] * 2
        cancelled = [frame["run_id"] for frame in executor.commands("cancel_task")]
        assert cancelled == [run["run_id"] for run in runs[:2]]

    async def test_a_caller_that_waits_for_an_acknowledgement_waits_no_longer(
        self, executor: Scripted
    ) -> None:
        async with ExecutorRuntime({"there": {"executor": executor}}) as runtime:
            strict = runtime["there"].options(delivery_cancel_mode="require_ack")
            call = begin(strict.run(task))
            await executor.runs()
            call.cancel()
            await executor.cancels()
        await ended(call)
        assert call.cancelled()

    async def test_local_work_is_cancelled(self) -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await never()
            finally:
                cancelled.set()

        async with ExecutorRuntime({"here": {}}) as runtime:
            call = begin(runtime["here"].run(work))
            await begun.wait()
        assert cancelled.is_set()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def test_an_error_in_the_block_stops_too_and_is_what_is_raised(self, executor: Scripted) -> None:
        with pytest.raises(LookupError, match="mine"):
            async with ExecutorRuntime({"there": {"executor": executor}}):
                raise LookupError("mine")
        assert executor.calls == ["start", "stop"]

    @pytest.mark.parametrize("hanging", ["stop", "send"])
    async def test_an_executor_that_hangs_does_not_hold_the_end_up(
        self,
        clock: LoopClock,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        hanging: str,
    ) -> None:
        monkeypatch.undo()
        executor = Scripted()
        runtime = ExecutorRuntime({"there": {"executor": executor}})
        await runtime.start()
        call = begin(runtime["there"].run(task))
        await executor.runs()
        executor.hooks[hanging] = never
        stopping = begin(runtime.stop())
        await ended(call)
        await until(lambda: executor.commands("cancel_task"), "it is stopping")
        await clock.advance(dispatch.STOP_SECONDS + 1)
        await until(stopping.done, "it has stopped", patience=2)
        assert "stop" in executor.calls
        assert hanging == "send" or "stopping the executor took longer than" in caplog.text

    @pytest.mark.parametrize("failing", ["stop", "send"])
    async def test_an_executor_that_fails_does_not_make_the_end_fail(
        self, caplog: pytest.LogCaptureFixture, failing: str
    ) -> None:
        executor, other = Scripted(), Scripted()
        runtime = ExecutorRuntime({"there": {"executor": executor}, "other": {"executor": other}})
        await runtime.start()
        call = begin(runtime["there"].run(task))
        await executor.runs()
        executor.hooks[failing] = raising(OSError("no broker"))
        await runtime.stop()
        await ended(call)
        assert executor.calls == other.calls == ["start", "stop"]
        assert failing == "send" or "stopping the executor failed" in caplog.text

    async def test_no_task_of_ours_is_left(self) -> None:
        before = asyncio.all_tasks()
        executor = Scripted(send=never)
        async with ExecutorRuntime({"there": {"executor": executor}, "here": {}}) as runtime:
            call = begin(runtime["there"].run(task))
            await executor.runs()
        await ended(call)
        assert asyncio.all_tasks() <= before

    async def test_whoever_stops_meanwhile_waits_for_the_end_as_well(self) -> None:
        go_on = asyncio.Event()
        executor = Scripted(stop=go_on.wait)
        runtime = ExecutorRuntime({"there": {"executor": executor}})
        await runtime.start()
        dispatcher = runtime["there"]._dispatcher
        stops = [begin(runtime.stop()), begin(dispatcher.stop())]
        await until(lambda: "stop" in executor.calls, "it is stopping")
        assert not any(stop.done() for stop in stops)
        go_on.set()
        await asyncio.gather(*stops)
        assert executor.calls == ["start", "stop"]

    async def test_a_stop_that_is_cancelled_stops_all_the_same(self) -> None:
        go_on, stopped = asyncio.Event(), asyncio.Event()

        async def stop() -> None:
            await go_on.wait()
            stopped.set()

        executor = Scripted(stop=stop)
        runtime = ExecutorRuntime({"there": {"executor": executor}})
        await runtime.start()
        stopping = begin(runtime.stop())
        await until(lambda: "stop" in executor.calls, "it is stopping")
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        go_on.set()
        await until(stopped.is_set, "it was stopped")

    async def test_handles_of_a_stopped_environment_say_so(self) -> None:
        async with ExecutorRuntime({"here": {}}) as runtime:
            handle = runtime["here"]
        with pytest.raises(WoveError, match="environment 'here' is stopped"):
            await handle.run(abs, -1)


async def test_logging_happens_under_our_own_name_only(
    executor: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    executor.hooks["stop"] = raising(OSError("x"))
    async with ExecutorRuntime({"there": {"executor": executor}}):
        pass
    assert caplog.records
    assert [name for name in {record.name for record in caplog.records} if not name.startswith("wove.")] == []
