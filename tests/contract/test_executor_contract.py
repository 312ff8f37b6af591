"""One contract, one test body, every executor: what a user may rely on wherever a task runs."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from wove_tests import main_program, tasks
from wove_tests.fleets import CONTRACT_FLEETS, FLEETS, SERVICE_SLOTS, fleet_params
from wove_tests.waiting import until, until_exists, until_states

from wove import (
    DeliveryTimeoutError,
    EncodeError,
    EnvironmentExecutionError,
    ExecutorRuntime,
    RemoteTraceback,
    WorkerLostError,
)
from wove.demo.processes import free_port
from wove.worker.starting import FRESH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from wove_tests.fleets import Fleets

    from wove.handle import EnvironmentHandle

#: Worker services, and the processes that the stdio executor starts itself.
SERVICES = tuple(name for name in CONTRACT_FLEETS if FLEETS[name].service or FLEETS[name].executor == "stdio")
#: How many tasks each fleet runs at once; local and memory are told so.
SLOTS = {
    "local": 2,
    "memory": 2,
    "celery-redis-prefork": 2,
    "celery-redis-threads": 4,
    "celery-redis-solo": 1,
    "celery-rabbitmq-prefork": 2,
    "rq-worker": 1,
    "rq-simple": 1,
    **dict.fromkeys(SERVICES, SERVICE_SLOTS),
}
#: Fleets whose backend notices that a task's process has died.
TELLS_OF_DEATH = ("celery-redis-prefork", "celery-rabbitmq-prefork", "rq-worker", *SERVICES)
OUT_OF_PROCESS = tuple(name for name in SLOTS if name not in ("local", "memory"))
#: Those whose worker has a log of its own.
WITH_A_LOG = tuple(name for name in OUT_OF_PROCESS if FLEETS[name].executor != "stdio")


@pytest.fixture(params=fleet_params())
def fleet(request: pytest.FixtureRequest) -> str:
    """The name of the fleet under test."""
    return str(request.param)


@pytest.fixture
def definition(fleet: str, fleets: Fleets) -> dict[str, Any]:
    """Its environment definition."""
    if fleet in ("local", "memory"):
        return fleets.executor_definition(fleet, executor_config={"threads": SLOTS[fleet]})
    return fleets.executor_definition(fleet)


@pytest.fixture
async def handle(definition: dict[str, Any]) -> AsyncIterator[EnvironmentHandle]:
    """The started environment."""
    async with ExecutorRuntime({"fleet": definition}) as runtime:
        yield runtime["fleet"]


class TestCallables:
    """Anything that can be called can be sent."""

    async def test_plain_function(self, handle: EnvironmentHandle) -> None:
        assert await handle.run(tasks.double, 21) == 42

    async def test_coroutine_function(self, handle: EnvironmentHandle) -> None:
        assert await handle.run(tasks.double_async, 21) == 42

    async def test_lambda_and_closure(self, handle: EnvironmentHandle) -> None:
        offset = 40

        def add(number: int) -> int:
            return number + offset

        assert await handle.run(lambda number: number + 1, 41) == 42
        assert await handle.run(add, 2) == 42

    async def test_partial(self, handle: EnvironmentHandle) -> None:
        assert await handle.run(partial(tasks.double, number=4)) == 8
        assert await handle.run(partial(tasks.double_async, 4)) == 8

    async def test_bound_method_and_callable_instance(self, handle: EnvironmentHandle) -> None:
        triple = tasks.Multiplier(3)
        assert await handle.run(triple.times, 14) == 42
        assert await handle.run(triple, 14) == 42

    async def test_arguments_of_all_kinds(self, handle: EnvironmentHandle) -> None:
        assert await handle.run(tasks.join, 1, (2, {3}), key=b"four") == ((1, (2, {3})), {"key": b"four"})

    async def test_what_a_script_defines(self, definition: dict[str, Any]) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            main_program.__file__,
            json.dumps(definition),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert output.decode().strip().endswith("both worked"), output.decode()


class TestResults:
    """A result comes back equal, and of the same type."""

    @pytest.mark.parametrize(
        "value",
        [
            None,
            2**100,
            -(2**64),
            (1, (2, {3, 4}), frozenset({(5,)})),
            {"a": [1, 2.5, None, True], (1, 2): {"nested": ()}},
            b"\x00\xff" * 500,
            bytearray(b"mutable"),
            "text with \N{SNOWMAN} and \ud800",
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_plain_data(self, handle: EnvironmentHandle, value: Any) -> None:
        result = await handle.run(tasks.echo, value)
        assert result == value
        assert type(result) is type(value)

    async def test_dataclass(self, handle: EnvironmentHandle) -> None:
        assert await handle.run(tasks.make_point, 1, y=2) == tasks.Point(1, 2)

    async def test_numpy_array(self, handle: EnvironmentHandle) -> None:
        array = numpy.arange(200_000, dtype="float64").reshape(400, 500)
        result = await handle.run(tasks.echo, array)
        assert (result == array).all()
        result += 1  # as writable as the one that was sent

    async def test_20_mb_of_text(self, handle: EnvironmentHandle) -> None:
        text = await handle.run(tasks.long_text, 20_000_000)
        assert len(text) == 20_000_000
        assert await handle.run(len, text) == 20_000_000

    async def test_a_result_that_cannot_be_sent_is_an_error_that_names_its_type(
        self, handle: EnvironmentHandle, fleet: str
    ) -> None:
        if fleet == "local":
            assert type(await handle.run(tasks.return_lock)) is type(threading.Lock())
            return
        with pytest.raises(EncodeError, match=r"_thread\.lock"):
            await handle.run(tasks.return_lock)


class TestErrors:
    """An exception arrives as itself, with the traceback of where it was raised."""

    async def test_builtin(self, handle: EnvironmentHandle, fleet: str) -> None:
        with pytest.raises(ValueError, match=r"^a builtin problem") as caught:
            await handle.run(tasks.fail_builtin)
        if fleet != "local":
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert "in fail_builtin" in str(caught.value.__cause__)
            note = caught.value.__notes__[-1]
            assert "wove_tests.tasks.fail_builtin" in note
            assert "attempt 1" in note
            if FLEETS[fleet].broker:
                assert f"{FLEETS[fleet].executor} job " in note

    async def test_custom_with_two_required_arguments(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(tasks.TwoArguments) as caught:
            await handle.run(tasks.fail_custom)
        assert (caught.value.code, caught.value.reason) == (7, "seven")

    async def test_chained(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(LookupError, match="outer") as caught:
            await handle.run(tasks.fail_chained)
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.__cause__.args == ("missing",)

    async def test_unpicklable(self, handle: EnvironmentHandle, fleet: str) -> None:
        if fleet == "local":
            with pytest.raises(RuntimeError, match="holds a lock"):
                await handle.run(tasks.fail_unpicklable)
            return
        with pytest.raises(EnvironmentExecutionError, match="holds a lock") as caught:
            await handle.run(tasks.fail_unpicklable)
        assert caught.value.kind == "RuntimeError"
        assert "in fail_unpicklable" in caught.value.payload["traceback"]

    async def test_system_exit_ends_neither_side(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(EnvironmentExecutionError, match="4") as caught:
            await handle.run(tasks.fail_system_exit)
        assert caught.value.kind == "SystemExit"
        assert await handle.run(tasks.double, 1) == 2

    @pytest.mark.parametrize("fleet", fleet_params(*TELLS_OF_DEATH))
    async def test_death_of_the_process(self, handle: EnvironmentHandle) -> None:
        with pytest.raises(WorkerLostError):
            await handle.run(tasks.die)
        assert await handle.run(tasks.double, 1) == 2

    async def test_an_argument_that_cannot_be_sent(self, handle: EnvironmentHandle, fleet: str) -> None:
        if fleet == "local":
            return
        with pytest.raises(EncodeError, match=r"guard: .*lock"):
            await handle.run(tasks.echo, guard=threading.Lock())
        assert len(handle._dispatcher.table) == 0

    @pytest.mark.parametrize("fleet", fleet_params(*OUT_OF_PROCESS))
    async def test_a_function_that_the_worker_cannot_import(
        self, handle: EnvironmentHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = f"only_here_{secrets.token_hex(4)}"
        (tmp_path / f"{name}.py").write_text("def task():\n    return 1\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        module = __import__(name)
        with pytest.raises(ModuleNotFoundError, match=name) as caught:
            await handle.run(module.task)
        assert any("could not load" in note for note in caught.value.__notes__)


class TestDelivery:
    """Deadlines, cancellation, and many runs at once."""

    async def test_delivery_timeout(self, handle: EnvironmentHandle, tmp_path: Path) -> None:
        started, seen = tmp_path / "started", tmp_path / "seen"
        begun = time.monotonic()
        with pytest.raises(DeliveryTimeoutError, match=r"delivery_timeout=1.5"):
            await handle.options(delivery_timeout=1.5).run(tasks.until_cancelled, str(started), str(seen))
        assert time.monotonic() - begun < 5
        if started.exists():
            await until_exists(seen)  # the work is stopped as well

    async def test_cancel_while_running(self, handle: EnvironmentHandle, tmp_path: Path) -> None:
        for number, func in enumerate((tasks.until_cancelled, tasks.until_cancelled_async)):
            started, seen = tmp_path / f"started{number}", tmp_path / f"seen{number}"
            call = asyncio.create_task(handle.run(func, str(started), str(seen)))
            await until_exists(started)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until_exists(seen)

    async def test_cancel_with_acknowledgement(self, handle: EnvironmentHandle, tmp_path: Path) -> None:
        started, seen = tmp_path / "started", tmp_path / "seen"
        patient = handle.options(delivery_cancel_mode="require_ack")
        call = asyncio.create_task(patient.run(tasks.until_cancelled_async, str(started), str(seen)))
        await until_exists(started)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert seen.exists()

    async def test_cancel_while_queued(self, handle: EnvironmentHandle, fleet: str, tmp_path: Path) -> None:
        release, never = tmp_path / "release", tmp_path / "never"
        blockers = []
        for number in range(SLOTS[fleet]):
            started = tmp_path / f"started{number}"
            blockers.append(asyncio.create_task(handle.run(tasks.touch_and_wait, str(started), str(release))))
            await until_exists(started)
        await until_states(handle, *["started"] * SLOTS[fleet])
        # A worker that does not ask for leave to start is told by a cancellation that takes a moment to arrive.
        mode = "require_ack" if fleet in SERVICES else "best_effort"
        cancelled = handle.options(delivery_cancel_mode=mode)
        queued = asyncio.create_task(cancelled.run(tasks.touch, str(never)))
        await until_states(handle, *["started"] * SLOTS[fleet], "submitted")
        # A worker asks for leave to start what is older than a moment.
        submitted = time.monotonic()
        await until(lambda: time.monotonic() - submitted > 2 * FRESH, "the run is not fresh any more")
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        release.touch()
        assert await asyncio.gather(*blockers) == ["released"] * SLOTS[fleet]
        # Whatever was queued behind the blockers has had its turn when these are done.
        await asyncio.gather(*(handle.run(tasks.double, n) for n in range(2 * SLOTS[fleet])))
        assert not never.exists()

    async def test_200_runs_at_once(self, handle: EnvironmentHandle) -> None:
        results = await asyncio.gather(*(handle.run(tasks.double, n) for n in range(200)))
        assert results == [2 * n for n in range(200)]
        assert len(handle._dispatcher.table) == 0

    async def test_map_in_order_and_as_completed(self, handle: EnvironmentHandle) -> None:
        assert [r async for r in handle.map(tasks.double, range(20))] == [2 * n for n in range(20)]
        unordered = {r async for r in handle.map(tasks.double_async, range(20), ordered=False)}
        assert unordered == {2 * n for n in range(20)}

    async def test_progress_and_log(self, handle: EnvironmentHandle) -> None:
        seen: list[Any] = []
        watched = handle.options(on_progress=seen.append)
        run_id = await watched.run(tasks.report_progress)
        assert [(f["type"], f.get("fraction"), f["message"]) for f in seen] == [
            ("progress", 0.25, "a quarter"),
            ("log", None, "half way"),
            ("progress", 1.0, "done"),
        ]
        assert {f["run_id"] for f in seen} == {run_id}

    async def test_two_runtimes_share_a_fixed_port(self, definition: dict[str, Any], fleet: str) -> None:
        config = dict(definition.get("executor_config", {}))
        if fleet == "memory" or FLEETS[fleet].broker:
            config["callback_port"] = free_port()
        shared = {**definition, "executor_config": config}
        async with ExecutorRuntime({"one": shared}) as first:
            async with ExecutorRuntime({"two": shared}) as second:
                results = await asyncio.gather(
                    first["one"].run(tasks.double, 1), second["two"].run(tasks.double, 2)
                )
                assert results == [2, 4]
            # The second one's end does not take the listener from the first.
            assert await first["one"].run(tasks.double, 3) == 6


@pytest.mark.parametrize("fleet", fleet_params(*WITH_A_LOG))
async def test_the_worker_shows_the_users_function(
    handle: EnvironmentHandle, fleet: str, fleets: Fleets
) -> None:
    secret = f"argument-{secrets.token_hex(8)}"
    await handle.run(tasks.echo, value=secret)
    log = fleets.worker(fleet).log_text()
    assert "wove_tests.tasks.echo" in log
    assert secret not in log, "arguments may be secrets and are shown by type only"


@pytest.mark.parametrize("fleet", fleet_params(*OUT_OF_PROCESS))
async def test_tasks_run_elsewhere(handle: EnvironmentHandle) -> None:
    assert await handle.run(os.getpid) != os.getpid()
