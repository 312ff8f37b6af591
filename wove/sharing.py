"""Calls with equal ``delivery_idempotency_key`` share one run while it is open."""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from typing import TYPE_CHECKING, Any

from wove.errors import ConfigurationError, DeliveryTimeoutError, safe_text
from wove.wire import callable_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from wove.waiter import OnProgress

logger = logging.getLogger("wove.dispatch")

#: Longest key, in characters.
MAX_KEY = 1_000


def sharing_key(
    template: str | Callable[..., str],
    func: Callable[..., Any],
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
) -> str:
    """Return the key of a call.

    Args:
        template: a string; one with braces is formatted with the call's arguments by name
            (``"{account_id}"``) or position (``"{0}"``); or a callable that takes them.
        func: the function called, for its parameters' names.
        positional: its positional arguments.
        keywords: its keyword arguments.

    Raises:
        ConfigurationError: the template does not fit the arguments.
    """
    try:
        if callable(template):
            key = template(*positional, **keywords)
        elif "{" in template:
            key = template.format(*positional, **_by_name(func, positional, keywords))
        else:
            key = template
    except Exception as exc:
        names = ", ".join(_by_name(func, positional, keywords)) or "none"
        raise ConfigurationError(
            f"delivery_idempotency_key {template!r} does not fit the call of {callable_name(func)}, whose arguments "
            f"are {names}: {type(exc).__name__}: {safe_text(exc, 200)}"
        ) from exc
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
        raise ConfigurationError(
            f"delivery_idempotency_key of {callable_name(func)} is a string of 1 to {MAX_KEY} characters; "
            f"got {key!r:.100}"
        )
    return key


def _by_name(
    func: Callable[..., Any], positional: Sequence[Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = inspect.signature(func).bind(*positional, **keywords)
    except (TypeError, ValueError):  # a builtin, or arguments that do not fit: the call will say so
        return dict(keywords)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


class _Shared:
    """One open run and the callers that wait for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.task: asyncio.Task[Any] | None = None
        self.waiters = 0
        self.listeners: list[OnProgress] = []

    def report(self, frame: Mapping[str, Any]) -> None:
        """Hand progress to every caller that asked for it."""
        for listener in tuple(self.listeners):
            try:
                listener(frame)
            except Exception:
                logger.exception("on_progress failed for run %s", frame.get("run_id"))


class SharedCalls:
    """The runs of one environment that have a key, by key."""

    def __init__(self, environment: str) -> None:
        self._environment = environment
        self._open: dict[str, _Shared] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def call(
        self,
        key: str,
        func: Callable[..., Any],
        begin: Callable[[OnProgress], Coroutine[Any, Any, Any]],
        *,
        patience: float | None,
        on_progress: OnProgress | None,
    ) -> Any:
        """Wait for the run with that key, beginning it when there is none.

        Cancelling one caller leaves the run to the others; cancelling the last cancels it.

        Args:
            key: what the call is known by.
            func: the function called.
            begin: returns the coroutine of a new run; it is given a callable for progress.
            patience: seconds this caller waits for a run that another one has begun.
            on_progress: this caller's own.

        Raises:
            ConfigurationError: the key is in use for another function.
            DeliveryTimeoutError: this caller's time is up.
            Exception: as the run itself.
        """
        shared = self._open.get(key)
        began = shared is None
        if shared is None:
            shared = self._begin(key, func, begin)
        elif shared.name != callable_name(func):
            raise ConfigurationError(
                f"environment {self._environment!r}: the delivery_idempotency_key {key!r} of {callable_name(func)} "
                f"is in use for an open run of {shared.name}: keys of different functions have to differ"
            )
        if on_progress is not None:
            shared.listeners.append(on_progress)
        shared.waiters += 1
        try:
            return await self._wait(key, shared, None if began else patience)
        finally:
            shared.waiters -= 1
            if on_progress is not None:
                shared.listeners.remove(on_progress)

    def _begin(
        self,
        key: str,
        func: Callable[..., Any],
        begin: Callable[[OnProgress], Coroutine[Any, Any, Any]],
    ) -> _Shared:
        shared = _Shared(callable_name(func))
        # A task of its own: it belongs to no caller more than to another.
        shared.task = asyncio.create_task(begin(shared.report), name="wove-shared-run")
        self._open[key] = shared
        shared.task.add_done_callback(lambda _: self._forget(key, shared))
        return shared

    def _forget(self, key: str, shared: _Shared) -> None:
        if self._open.get(key) is shared:
            del self._open[key]
        if shared.task is not None and shared.task.done() and not shared.task.cancelled():
            shared.task.exception()  # fetched, so that asyncio does not report it as forgotten

    async def _wait(self, key: str, shared: _Shared, patience: float | None) -> Any:
        task = shared.task
        if task is None:
            raise RuntimeError("a shared run without a task")
        try:
            done, _ = await asyncio.wait({task}, timeout=patience)
        except asyncio.CancelledError:
            if shared.waiters == 1:
                await self._cancel(key, shared, task)
            raise
        if not done:
            if shared.waiters == 1:
                await self._cancel(key, shared, task)
            raise DeliveryTimeoutError(
                f"the run with delivery_idempotency_key {key!r} in environment {self._environment!r}, begun by another "
                f"caller, had no outcome within this caller's delivery_timeout={patience:g} s"
            )
        if task.cancelled():
            raise asyncio.CancelledError(f"the shared run {key!r} was cancelled")
        exception = task.exception()
        if exception is not None:
            raise _own(exception) if shared.waiters > 1 else exception
        return task.result()

    async def _cancel(self, key: str, shared: _Shared, task: asyncio.Task[Any]) -> None:
        # Whoever asks for the key from now on begins a run of its own.
        self._forget(key, shared)
        task.cancel()
        await asyncio.wait({task})
        self._forget(key, shared)


def _own(exception: BaseException) -> BaseException:
    """Return a copy for one of several callers: each raises, and adds to, its own."""
    try:
        twin = copy.copy(exception)
    except Exception:
        return exception
    if type(twin) is not type(exception) or twin.args != exception.args:
        return exception
    twin.__cause__ = exception.__cause__
    twin.__context__ = exception.__context__
    twin.__suppress_context__ = exception.__suppress_context__
    twin.__traceback__ = exception.__traceback__
    notes = getattr(exception, "__notes__", None)
    if notes is not None:
        twin.__notes__ = list(notes)
    return twin
