"""Coroutines that are run at once, up to where they have to wait."""

from __future__ import annotations

import asyncio

import pytest

from wove.eager import run_now


async def test_what_need_not_wait_is_done_at_once() -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    assert run_now(work(), asyncio.get_running_loop()) is None
    assert done == [1]


async def test_what_has_to_wait_goes_on_as_a_task() -> None:
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    got: list[object] = []

    async def work() -> None:
        got.append(await first)
        try:
            await second
        except ValueError as exc:
            got.append(exc)

    task = run_now(work(), loop)
    assert task is not None
    first.set_result(1)
    failure = ValueError("said to it")
    second.set_exception(failure)
    await task
    assert got == [1, failure]


async def test_what_it_raises_at_once_is_raised() -> None:
    async def work() -> None:
        raise KeyError("at once")

    with pytest.raises(KeyError):
        run_now(work(), asyncio.get_running_loop())


async def test_what_it_raises_later_is_its_task_s() -> None:
    loop = asyncio.get_running_loop()
    waited = loop.create_future()

    async def work() -> None:
        await waited
        raise KeyError("later")

    task = run_now(work(), loop)
    assert task is not None
    waited.set_result(None)
    with pytest.raises(KeyError):
        await task


async def test_its_task_can_be_cancelled() -> None:
    loop = asyncio.get_running_loop()
    waited = loop.create_future()

    async def work() -> None:
        await waited

    task = run_now(work(), loop)
    assert task is not None
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert waited.cancelled()
