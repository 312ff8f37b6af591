"""The handle ``runtime["name"]``: run a function in that environment."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from wove.errors import ConfigurationError
from wove.policy import DeliveryPolicy
from wove.waiter import Call
from wove.wire import callable_name

if TYPE_CHECKING:
    from wove.dispatch import Dispatcher
    from wove.shared_parts import SharedCallable
    from wove.waiter import OnProgress

    _Future = asyncio.Future[Any] | Call

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")

#: Runs that ``map`` keeps in flight unless ``delivery_max_in_flight`` or ``in_flight`` says otherwise.
MAP_IN_FLIGHT = 128
#: Up to how many that grows while runs are short, and within how many seconds so many have to end.
MAX_MAP_IN_FLIGHT = 1024
MOMENT_SECONDS = 0.1


class EnvironmentHandle:
    """Runs functions in one environment; get it by ``runtime["name"]``.

    Handles are cheap and share the environment; :meth:`options` returns a changed one.
    """

    __slots__ = ("_dispatcher", "_on_progress", "_settings")

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._settings = dict(settings or {})
        self._on_progress = on_progress

    def __repr__(self) -> str:
        return f"<EnvironmentHandle {self.name!r}>"

    @property
    def name(self) -> str:
        """The environment's name."""
        return self._dispatcher.name

    def options(self, *, on_progress: OnProgress | None = None, **settings: Any) -> EnvironmentHandle:
        """Return a handle with other delivery settings.

        Args:
            on_progress: called in the event loop with each ``progress`` (``fraction``,
                ``message``) and ``log`` (``message``) frame of the runs made by the handle.
            settings: any ``delivery_*`` setting, such as ``delivery_timeout=60`` (seconds).

        Raises:
            ConfigurationError: an unknown setting, or a value it cannot have.
        """
        for key in settings:
            if not key.startswith("delivery_"):
                raise ConfigurationError(
                    f"unknown option {key!r}: options() takes on_progress and delivery_* settings"
                )
        DeliveryPolicy.resolve(settings)
        return EnvironmentHandle(
            self._dispatcher, {**self._settings, **settings}, on_progress or self._on_progress
        )

    @overload
    async def run(self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def run(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def run(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``func(*args, **kwargs)`` in the environment and return its result.

        Cancelling the awaiting task cancels the run.

        Raises:
            Exception: what ``func`` raised there, with the remote traceback as its cause.
            EnvironmentExecutionError: it failed and its exception cannot be rebuilt here.
            WorkerLostError: its worker died.
            DeliveryTimeoutError: a delivery deadline passed.
            EncodeError: an argument cannot be sent; nothing was submitted.
        """
        return await self._call(func, args, kwargs)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shared: SharedCallable | None = None,
    ) -> Coroutine[Any, Any, Any]:
        return self._dispatcher.call(
            func, args, kwargs, settings=self._settings or None, on_progress=self._on_progress, shared=shared
        )

    @overload
    def map(
        self,
        func: Callable[[Item], Awaitable[T]],
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        in_flight: int | None = None,
    ) -> AsyncIterator[T]: ...
    @overload
    def map(
        self,
        func: Callable[[Item], T],
        items: Iterable[Item] | AsyncIterable[Item],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        in_flight: int | None = None,
    ) -> AsyncIterator[T]: ...
    def map(
        self,
        func: Callable[[Any], Any],
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        in_flight: int | None = None,
    ) -> AsyncIterator[Any]:
        """Run ``func(item)`` for each item and iterate over the results.

        Args:
            func: takes one item.
            items: an iterable or async iterable; read as runs come free, so it may be endless.
            ordered: results in the order of the items; False: as they are ready.
            return_exceptions: yield exceptions like results. Otherwise the first one is
                raised and cancels the runs that are open.
            in_flight: runs open at once; default ``delivery_max_in_flight``, or from 128 up to 1024: as many as
                end within a moment.

        A ``func`` that does not go by name, such as ``partial(score, model=weights)``, is encoded at the first
        run, and a large one sent once to each worker process: later changes to what it holds do not
        reach the runs of this ``map``.

        Leaving the loop early cancels the open runs (at once when the iterator is closed
        with ``aclose()``, or by ``contextlib.aclosing``).
        """
        limit = in_flight if in_flight is not None else self._dispatcher.settings.policy.max_in_flight
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ConfigurationError(f"map(): in_flight is a whole number from 1; got {in_flight!r}")
        return self._map(func, items, ordered, return_exceptions, limit)

    async def _map(
        self,
        func: Callable[[Any], Any],
        items: Iterable[Any] | AsyncIterable[Any],
        ordered: bool,
        return_exceptions: bool,
        limit: int | None,
    ) -> AsyncIterator[Any]:
        window = _Window(limit, ordered=ordered, raise_errors=not return_exceptions)
        window.feed(items, self._beginner(func))
        try:
            while ready := await window.ready():
                for task in ready:
                    yield _outcome(task, return_exceptions)
        finally:
            await window.abandon()

    def _beginner(self, func: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any] | Call]:
        """Return what begins the call of ``func`` with an item."""
        dispatcher, on_progress = self._dispatcher, self._on_progress
        if not callable(func):
            raise TypeError(f"map() takes a callable, not {type(func).__name__}")
        policy = dispatcher.settings.policy_for(self._settings or None)
        shared = dispatcher.share(func)
        if dispatcher.begins(policy):
            name = callable_name(func)
            return lambda item: dispatcher.begin(func, item, policy, on_progress, name, shared)
        return lambda item: self._call(func, (item,), {}, shared)


class _Window:
    """The runs of a ``map`` that were begun and whose results were not handed out yet."""

    def __init__(self, limit: int | None, *, ordered: bool, raise_errors: bool) -> None:
        self._limit = MAP_IN_FLIGHT if limit is None else limit
        self._widens = limit is None
        self._ended = 0
        self._counted_at = time.monotonic()
        self._ordered = ordered
        self._raise_errors = raise_errors
        self._begun: dict[_Future, None] = {}
        self._done: deque[_Future] = deque()
        self._failed: _Future | None = None
        self._feeder: asyncio.Future[Any] | None = None
        self._change = asyncio.Event()
        self._room = asyncio.Event()

    def feed(
        self, items: Iterable[Any] | AsyncIterable[Any], begin: Callable[[Any], Awaitable[Any] | Call]
    ) -> None:
        """Begin a run for each item, as fast as there is room."""
        self._feeder = asyncio.ensure_future(self._feed(items, begin))
        self._feeder.add_done_callback(lambda _: self._change.set())

    async def _feed(
        self, items: Iterable[Any] | AsyncIterable[Any], begin: Callable[[Any], Awaitable[Any] | Call]
    ) -> None:
        async with aclosing(_source(items)) as source:
            async for item in source:
                begun = begin(item)
                task = begun if isinstance(begun, Call) else asyncio.ensure_future(begun)
                self._begun[task] = None
                task.add_done_callback(self._finished)
                while len(self._begun) >= self._limit:
                    self._widen()
                    self._room.clear()
                    await self._room.wait()

    def _widen(self) -> None:
        """Let as many runs be open as end within a moment: then no worker waits for the next ones."""
        now = time.monotonic()
        if self._widens and now - self._counted_at > MOMENT_SECONDS:
            in_a_moment = int(self._ended * MOMENT_SECONDS / (now - self._counted_at))
            self._limit = min(MAX_MAP_IN_FLIGHT, max(MAP_IN_FLIGHT, in_a_moment))
            self._ended, self._counted_at = 0, now

    def _finished(self, task: _Future) -> None:
        self._ended += 1
        # Fetching the exception also keeps asyncio from reporting it as forgotten.
        failed = task.cancelled() or task.exception() is not None
        if failed and self._raise_errors and self._failed is None:
            self._failed = task
        if not self._ordered:
            self._done.append(task)
        self._change.set()

    async def ready(self) -> list[_Future]:
        """Wait for the next results and take them out; nothing is left when none come.

        An error that is to be raised is handed out at once, ahead of earlier items.
        """
        while True:
            self._change.clear()
            if self._failed is not None:
                return [self._failed]
            ready = self._take_done()
            if ready:
                self._room.set()
                return ready
            if self._feeder is not None and self._feeder.done():
                self._feeder.result()  # the items themselves may have failed
                if not self._begun:
                    return []
            await self._change.wait()

    def _take_done(self) -> list[_Future]:
        ready = []
        if self._ordered:
            for task in self._begun:
                if not task.done():
                    break
                ready.append(task)
        else:
            ready = list(self._done)
            self._done.clear()
        for task in ready:
            del self._begun[task]
        return ready

    async def abandon(self) -> None:
        """Cancel what is open and wait until that has been passed on."""
        running: list[_Future] = [task for task in self._begun if not task.done()]
        if self._feeder is not None:
            running.append(self._feeder)
        for task in running:
            task.cancel()
        # The calls of `begin` have ended by now.
        waited_for = [task for task in running if isinstance(task, asyncio.Future)]
        if waited_for:
            await asyncio.wait(waited_for)
        for task in (*self._begun, *running):
            if task.done() and not task.cancelled():
                task.exception()  # fetched, so that asyncio does not report it as forgotten
        self._begun.clear()


def _outcome(task: _Future, return_exceptions: bool) -> Any:
    if return_exceptions and not task.cancelled():
        exception = task.exception()
        return task.result() if exception is None else exception
    return task.result()


async def _source(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
