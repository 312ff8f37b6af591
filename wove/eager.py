"""Coroutines that are run at once, up to where they have to wait: a task of their own costs a turn of the loop."""

from __future__ import annotations

import types
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Generator


def run_now(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
    """Run ``work`` until it is done, or has to wait: then a task does the rest.

    Args:
        work: a coroutine that has not begun, and asks for no current task.
        loop: the running loop.

    Returns:
        None when it is done, else the task.

    Raises:
        Exception: what ``work`` raises before it has to wait.
    """
    try:
        awaited = work.send(None)
    except StopIteration:
        return None
    return loop.create_task(_rest(work, awaited))


async def _rest(work: Coroutine[Any, Any, Any], awaited: Any) -> None:
    await _resume(work, awaited)


@types.coroutine
def _resume(work: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, None]:
    while True:
        try:
            given = yield awaited
        except BaseException as exc:
            step: Callable[[], Any] = partial(work.throw, exc)
        else:
            step = partial(work.send, given)
        try:
            awaited = step()
        except StopIteration:
            return
