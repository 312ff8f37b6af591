"""Coroutines of the user's, executed so that they can be cancelled; loaded with the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wove.worker.context import Cancellable


def drive(awaitable: Any, session: Cancellable) -> Any:
    """Run a coroutine to its end on an event loop of its own."""
    import asyncio
    import contextvars
    import threading

    def on_own_loop() -> Any:
        with asyncio.Runner() as runner:
            return runner.run(supervise(awaitable, session))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return on_own_loop()
    # This thread is inside another loop: the task's loop gets a thread to itself.
    outcome: list[Any] = []
    scope = contextvars.copy_context()

    def capture() -> None:
        try:
            outcome.append((scope.run(on_own_loop), None))
        except BaseException as exc:
            outcome.append((None, exc))

    thread = threading.Thread(target=capture, name="wove-task", daemon=True)
    thread.start()
    thread.join()
    result, exc = outcome[0]
    if exc is not None:
        raise exc
    return result


async def supervise(awaitable: Any, session: Cancellable) -> Any:
    """Await in a task that the courier can cancel."""
    import asyncio

    async def body() -> Any:
        return await awaitable

    loop = asyncio.get_running_loop()
    task = loop.create_task(body())

    def cancel() -> None:
        try:
            loop.call_soon_threadsafe(task.cancel)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    session.on_cancel = cancel
    if session.context.cancelled:  # it came between the start and this line
        task.cancel()
    try:
        return await task
    finally:
        session.on_cancel = None
