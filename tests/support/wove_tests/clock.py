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
    """Run a test in a :class:`JumpingLoop` of the fixture ``clock``, which the test may take as well."""
    signature = inspect.signature(test)
    takes_clock = "clock" in signature.parameters

    @functools.wraps(test)
    def run(*args: Any, clock: Clock, **fixtures: Any) -> None:
        if takes_clock:
            fixtures["clock"] = clock
        with asyncio.Runner(loop_factory=lambda: JumpingLoop(clock)) as runner:
            runner.run(test(*args, **fixtures))

    if not takes_clock:
        asked = inspect.Parameter("clock", inspect.Parameter.KEYWORD_ONLY)
        signature = signature.replace(parameters=[*signature.parameters.values(), asked])
    run.__signature__ = signature
    # pytest-asyncio would take it for a coroutine function still, going by what it wraps.
    del run.__wrapped__
    return run
