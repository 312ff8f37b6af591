"""Tasks end in ways that are hard to carry home. Rows 17-21 of the fault matrix; see also test_hostile_values.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from wove_tests import endings, tasks

from wove import EnvironmentExecutionError, ExecutorRuntime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from wove_tests.crew import Crew

    from wove.handle import EnvironmentHandle

#: Seconds within which each of them is told: most need milliseconds.
SOON = 10.0


@pytest.fixture(
    params=[
        "memory",
        *(
            pytest.param(name, marks=pytest.mark.redis)
            for name in ("celery-prefork", "celery-threads", "rq-worker")
        ),
    ]
)
async def handle(request: pytest.FixtureRequest, crew: Crew) -> AsyncIterator[EnvironmentHandle]:
    memory = {"executor": "memory", "delivery_timeout": 30}
    definition = memory if request.param == "memory" else crew.definition(request.param)
    async with ExecutorRuntime({"fleet": definition}) as runtime:
        yield runtime["fleet"]


async def failure(handle: EnvironmentHandle, func: Any, *args: Any) -> BaseException:
    """Return what the caller gets, soon; the environment is unharmed."""
    begun = time.monotonic()
    with pytest.raises(Exception) as caught:
        await handle.run(func, *args)
    assert time.monotonic() - begun < SOON
    assert await handle.run(tasks.double, 21) == 42
    assert len(handle._dispatcher.table) == 0
    return caught.value


def kind_of(error: BaseException) -> str:
    return error.kind if isinstance(error, EnvironmentExecutionError) else type(error).__name__


@pytest.mark.parametrize(
    ("kind", "said"), [("generator", "generator"), ("lock", "lock"), ("deep", "deep|list|recursion")]
)
async def test_row_17_a_result_that_cannot_be_encoded_is_an_error_that_names_it(
    handle: EnvironmentHandle, kind: str, said: str
) -> None:
    error = await failure(handle, endings.returned, kind)
    assert kind_of(error) in ("EncodeError", "RecursionError")
    assert any(word in str(error).lower() for word in said.split("|")), str(error)


@pytest.mark.parametrize("kind", ["Holds", "ReduceFails"])
async def test_row_18_an_exception_that_cannot_be_pickled_keeps_its_name(
    handle: EnvironmentHandle, kind: str
) -> None:
    error = await failure(handle, endings.raised, kind)
    assert kind_of(error) == kind
    assert "in raised" in _traceback(error)


async def test_row_18_an_exception_with_required_arguments_is_itself(handle: EnvironmentHandle) -> None:
    error = await failure(handle, tasks.fail_custom)
    assert isinstance(error, tasks.TwoArguments)
    assert (error.code, error.reason) == (7, "seven")


async def test_row_18_an_exception_whose_class_is_missing_here_keeps_its_name_and_text(
    handle: EnvironmentHandle,
) -> None:
    error = await failure(handle, endings.missing_here)
    assert kind_of(error) == "OnlyThere"
    assert "from afar" in str(error)


async def test_row_18_causes_notes_and_groups_arrive(handle: EnvironmentHandle) -> None:
    error = await failure(handle, endings.chained)
    assert isinstance(error, LookupError)
    text = _traceback(error)
    for part in ("several", "one", "two", "a note", "in chained"):
        assert part in text


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (tasks.fail_system_exit, "SystemExit"),
        (endings.interrupted, "KeyboardInterrupt"),
        (endings.closed, "GeneratorExit"),
        (endings.cancel_itself, "TaskCancelledItself"),
        (endings.stopped, "StopIteration"),
    ],
)
async def test_row_19_what_is_no_exception_of_a_task_is_an_error_of_its_call(
    handle: EnvironmentHandle, func: Any, kind: str
) -> None:
    error = await failure(handle, func)
    assert kind_of(error) == kind


@pytest.mark.parametrize("kind", ["TextFails"])
async def test_row_20_an_exception_whose_text_fails_is_an_error_all_the_same(
    handle: EnvironmentHandle, kind: str
) -> None:
    error = await failure(handle, endings.raised, kind)
    assert kind_of(error) == kind


async def test_row_20_a_result_that_takes_its_time_to_encode_arrives(handle: EnvironmentHandle) -> None:
    assert await handle.options(delivery_heartbeat_seconds=0.6).run(endings.slow_to_reduce) == "encoded"


@pytest.mark.parametrize(
    ("func", "kind"), [(endings.recurse, "RecursionError"), (endings.out_of_memory, "MemoryError")]
)
async def test_row_21_recursion_and_memory_errors_arrive(
    handle: EnvironmentHandle, func: Any, kind: str
) -> None:
    error = await failure(handle, func)
    assert kind_of(error) == kind


def _traceback(error: BaseException) -> str:
    """Return all that is said of the other side."""
    cause = error.__cause__
    said = [str(error), *getattr(error, "__notes__", [])]
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__
    if isinstance(error, EnvironmentExecutionError):
        said.append(str(error.payload))
    return "\n".join(said)
