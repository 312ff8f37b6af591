"""A value that misbehaves while it travels harms its own run, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from wove_tests import hostile, tasks

from wove import EncodeError, EnvironmentExecutionError, ExecutorRuntime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from wove_tests.fleets import Fleets

    from wove.handle import EnvironmentHandle


@pytest.fixture(params=["memory", "stdio-1", "http", "grpc", "websocket"])
async def handle(request: pytest.FixtureRequest, fleets: Fleets) -> AsyncIterator[EnvironmentHandle]:
    """Everything real but the broker; and worker services."""
    definition = fleets.executor_definition(request.param, delivery_timeout=30)
    async with ExecutorRuntime({"fleet": definition}) as runtime:
        yield runtime["fleet"]


async def works(handle: EnvironmentHandle) -> None:
    """The environment, its listener and its workers are unharmed."""
    assert await handle.run(tasks.double, 21) == 42


async def test_a_result_that_exits_while_it_is_rebuilt(handle: EnvironmentHandle) -> None:
    with pytest.raises(EnvironmentExecutionError, match="cannot be rebuilt in the submitter: SystemExit"):
        await handle.run(hostile.make, "exits-loaded")
    await works(handle)


async def test_a_result_that_exits_while_it_is_encoded(handle: EnvironmentHandle) -> None:
    with pytest.raises(EnvironmentExecutionError) as caught:
        await handle.run(hostile.make, "exits-pickled")
    assert caught.value.kind == "SystemExit"
    await works(handle)


async def test_an_argument_that_exits_while_it_is_loaded(handle: EnvironmentHandle) -> None:
    with pytest.raises(EnvironmentExecutionError) as caught:
        await handle.run(hostile.take, hostile.ExitsWhenLoaded())
    assert caught.value.kind == "SystemExit"
    await works(handle)


async def test_an_argument_that_exits_while_it_is_encoded(handle: EnvironmentHandle) -> None:
    with pytest.raises(EncodeError, match="SystemExit"):
        await handle.run(hostile.take, hostile.ExitsWhenPickled())
    await works(handle)


async def test_loading_longer_than_the_heartbeat_is_no_loss(handle: EnvironmentHandle) -> None:
    strict = handle.options(delivery_heartbeat_seconds=0.9)
    assert await strict.run(hostile.take, hostile.SlowToLoad(2.0)) == "SlowToLoad"


async def test_encoding_longer_than_the_heartbeat_is_no_loss(handle: EnvironmentHandle) -> None:
    strict = handle.options(delivery_heartbeat_seconds=0.9)
    assert isinstance(await strict.run(hostile.make_slow_to_pickle, 2.0), hostile.SlowToPickle)


async def test_a_short_heartbeat_is_kept_by_a_healthy_task(handle: EnvironmentHandle) -> None:
    strict = handle.options(delivery_heartbeat_seconds=0.5)
    assert await strict.run(tasks.pid_and_sleep, 1.5) > 0
