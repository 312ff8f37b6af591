"""For the tests of your own executors: does it keep the contract?

::

    from wove.testing import executor_conformance

    async def test_my_executor():
        await executor_conformance(lambda: {"executor": MyExecutor(), "executor_config": {...}})
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from wove import frames
from wove.errors import EnvironmentExecutionError, WoveError
from wove.executors.registry import coerce_executor
from wove.runtime import ExecutorRuntime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from wove.handle import EnvironmentHandle

__all__ = ["CHECKS", "ConformanceError", "executor_conformance"]

#: Seconds that a single check may take, and that stopping with open runs may.
CHECK_SECONDS = 30.0
STOP_SECONDS = 8.0


class ConformanceError(WoveError, AssertionError):
    """An executor breaks its contract; the message lists each check that failed, and how."""

    def __init__(self, message: str, failures: Mapping[str, BaseException]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


async def executor_conformance(
    definition: Callable[[], Mapping[str, Any]], *, skip: Collection[str] = ()
) -> list[str]:
    """Run every check against an executor.

    Args:
        definition: returns an environment definition; called once per check, and must return a new executor
            each time (an executor serves one environment).
        skip: names of checks (see :data:`CHECKS`) that do not apply to it.

    Returns:
        The names of the checks that it passed.

    Raises:
        ConformanceError: checks failed.
        ValueError: ``skip`` names a check that does not exist.
    """
    for name in skip:
        if name not in CHECKS:
            raise ValueError(f"no check is called {name!r}; known: {', '.join(CHECKS)}")
    passed: list[str] = []
    failures: dict[str, BaseException] = {}
    for name, check in CHECKS.items():
        if name in skip:
            continue
        try:
            async with asyncio.timeout(CHECK_SECONDS) as limit:
                await check(definition)
        except Exception as exc:
            hung = isinstance(exc, TimeoutError) and limit.expired()
            failures[name] = TimeoutError(f"no end within {CHECK_SECONDS:g} s") if hung else exc
        else:
            passed.append(name)
    if failures:
        lines = [f"{name}: {type(exc).__name__}: {exc}" for name, exc in failures.items()]
        raise ConformanceError(
            f"{len(failures)} of {len(failures) + len(passed)} checks failed:\n" + "\n".join(lines), failures
        )
    return passed


# --- what the checks run; workers import it from here ---------------------------


def _echo(value: Any) -> Any:
    return value


def _join(*positional: Any, **keywords: Any) -> Any:
    return positional, keywords


async def _echo_later(value: Any) -> Any:
    await asyncio.sleep(0.01)
    return value


def _fail() -> NoReturn:
    raise ValueError("this is what failed")


def _exit() -> NoReturn:
    raise SystemExit(3)


def _lock() -> Any:
    return threading.Lock()


def _nap(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


# --- the checks -----------------------------------------------------------------


def _expect(value: Any, wanted: Any) -> None:
    if type(value) is not type(wanted) or value != wanted:
        raise ConformanceError(f"expected {wanted!r}, got {value!r}", {})


async def _with_handle(
    definition: Callable[[], Mapping[str, Any]], body: Callable[[EnvironmentHandle], Awaitable[None]]
) -> None:
    async with ExecutorRuntime({"conformance": definition()}) as runtime:
        await body(runtime["conformance"])


async def _results(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        for value in (None, True, -1, 2**80, 1.5, "text", b"bytes", [1, [2]], (1, {2}), {"a": {"b": ()}}):
            _expect(await handle.run(_echo, value), value)
        _expect(await handle.run(_join, 1, two=2), ((1,), {"two": 2}))

    await _with_handle(definition, body)


async def _coroutines(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        _expect(await handle.run(_echo_later, 4), 4)

    await _with_handle(definition, body)


async def _closures(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        offset = 40
        _expect(await handle.run(lambda number: number + offset, 2), 42)

    await _with_handle(definition, body)


async def _exceptions(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        try:
            await handle.run(_fail)
        except ValueError as exc:
            _expect(str(exc), "this is what failed")
        else:
            raise ConformanceError("a task that raised ValueError ended without it", {})

    await _with_handle(definition, body)


async def _exits(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        try:
            await handle.run(_exit)
        except EnvironmentExecutionError:
            pass
        else:
            raise ConformanceError("a task that raised SystemExit ended without an error", {})
        _expect(await handle.run(_echo, 1), 1)

    await _with_handle(definition, body)


async def _unencodable(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        try:
            await handle.run(_lock)
        except Exception:
            _expect(await handle.run(_echo, 1), 1)
        else:
            raise ConformanceError("a lock came back from another process as a result", {})

    await _with_handle(definition, body)


async def _many(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        results = await asyncio.gather(*(handle.run(_echo, number) for number in range(100)))
        _expect(results, list(range(100)))

    await _with_handle(definition, body)


async def _cancelling(definition: Callable[[], Mapping[str, Any]]) -> None:
    async def body(handle: EnvironmentHandle) -> None:
        call = asyncio.ensure_future(handle.run(_nap, 1.0))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        call.cancel()
        await asyncio.wait((call,))
        if not call.cancelled():
            raise ConformanceError("a cancelled call ended otherwise than cancelled", {})
        if time.monotonic() - begun > 0.5:
            raise ConformanceError("cancelling waited for the task", {})
        _expect(await handle.run(_echo, 1), 1)

    await _with_handle(definition, body)


async def _stopping(definition: Callable[[], Mapping[str, Any]]) -> None:
    runtime = ExecutorRuntime({"conformance": definition()})
    await runtime.start()
    call = asyncio.ensure_future(runtime["conformance"].run(_nap, 1.0))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    await runtime.stop()
    took = time.monotonic() - begun
    await asyncio.wait((call,))
    if not call.cancelled():
        raise ConformanceError("stop() left a call open, or ended it otherwise than cancelled", {})
    if took > STOP_SECONDS:
        raise ConformanceError(f"stop() took {took:.1f} s with a run open", {})


async def _stop_is_idempotent(definition: Callable[[], Mapping[str, Any]]) -> None:
    described = definition()
    executor = coerce_executor(described.get("executor", "local"))
    await executor.stop()  # also before start()
    await executor.start(
        environment_name="conformance",
        environment_config=described.get("executor_config") or {},
        run_config={},
    )
    await executor.stop()
    await executor.stop()


async def _frames(definition: Callable[[], Mapping[str, Any]]) -> None:
    """Events are well formed and name their run, and exactly one of them ends it."""
    described = definition()
    executor = coerce_executor(described.get("executor", "local"))
    await executor.start(
        environment_name="conformance",
        environment_config=described.get("executor_config") or {},
        run_config={},
    )
    try:
        ended: list[str] = []
        ids = [f"{number:032x}" for number in range(1, 4)]
        for run_id in ids:
            await executor.send(_command(run_id))
        while len(ended) < len(ids):
            frame = await executor.recv()
            if frames.check_event(frame) and frame["type"] in frames.TERMINAL:
                ended.append(frame["run_id"])
                _expect(frame.get("result"), "awake")
        # A second outcome would come at once, if at all.
        try:
            async with asyncio.timeout(0.3):
                while (frame := await executor.recv())["type"] not in frames.TERMINAL:
                    pass
            raise ConformanceError(f"run {frame['run_id']} ended twice", {})
        except TimeoutError:
            pass
        _expect(sorted(ended), ids)
    finally:
        await executor.stop()


def _command(run_id: str) -> frames.Frame:
    return {
        "type": frames.RUN_TASK,
        "run_id": run_id,
        "task_id": "wove.testing.nap",
        "callable": _nap,
        "positional": (0.01,),
        "args": {},
        "delivery": {"attempt": 1},
    }


#: The checks by name, in the order in which they run.
CHECKS: dict[str, Callable[[Callable[[], Mapping[str, Any]]], Awaitable[None]]] = {
    "results": _results,
    "coroutines": _coroutines,
    "closures": _closures,
    "exceptions": _exceptions,
    "exits": _exits,
    "unencodable": _unencodable,
    "many": _many,
    "cancelling": _cancelling,
    "stopping": _stopping,
    "stop_is_idempotent": _stop_is_idempotent,
    "frames": _frames,
}
