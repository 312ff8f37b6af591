"""Clocks that pass only when told to, or when nobody has anything left to do but wait."""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

#: Real seconds after which a loop that waits for nothing but other threads fails its test.
PATIENCE = 20.0


class Clock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += max(0.0, seconds)

    def as_time(self) -> Any:
        """Return what a module may have in place of ``time``: its sleeps end at once, and are counted."""
        return SimpleNamespace(monotonic=self, sleep=self.advance)


class _JumpingSelector(selectors.DefaultSelector):
    """Lets the clock jump to the next timer instead of waiting for it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:  # only another thread can wake the loop
            ready = super().select(PATIENCE)
            assert ready, f"nothing happened for {PATIENCE:g} s, and nothing is going to"
            return ready
        ready = super().select(0)
        if not ready:
            self._clock.advance(timeout)
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting for a time takes none: ``sleep(60)`` ends at once, a minute later."""

    def __init__(self, clock: Clock) -> None:
        self._jumping_clock = clock
        super().__init__(_JumpingSelector(clock))

    def time(self) -> float:
        return self._jumping_clock()


def jumping(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test, which has a fixture named ``clock``, in a :class:`JumpingLoop` of that clock."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=lambda: JumpingLoop(fixtures["clock"])) as runner:
            runner.run(test(*args, **fixtures))

    # pytest-asyncio would take it for a coroutine function still, going by what it wraps.
    run.__signature__ = inspect.signature(test)
    del run.__wrapped__
    return run
