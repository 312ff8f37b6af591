"""Values that misbehave while they travel."""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn


def leave(code: int) -> NoReturn:
    """End the process, as the import of a script-like module does."""
    sys.exit(code)


def slow_object(seconds: float) -> SlowToLoad:
    """Make an object, taking a while."""
    time.sleep(seconds)
    return SlowToLoad(0)


class ExitsWhenLoaded:
    """Unpickling it calls sys.exit()."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (leave, (3,))


class ExitsWhenPickled:
    """Pickling it calls sys.exit()."""

    def __reduce__(self) -> tuple[Any, ...]:
        leave(4)


class SlowToPickle:
    """Pickling it takes a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        time.sleep(self.seconds)
        return (SlowToPickle, (0.0,))


class SlowToLoad:
    """Unpickling it takes a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return (slow_object, (self.seconds,))


def make(kind: str) -> Any:
    """Return a hostile value as a result."""
    return {"exits-loaded": ExitsWhenLoaded, "exits-pickled": ExitsWhenPickled}[kind]()


def make_slow_to_pickle(seconds: float) -> SlowToPickle:
    """Return a result that takes a while to encode."""
    return SlowToPickle(seconds)


def take(value: Any) -> str:
    """Take whatever comes."""
    return type(value).__name__
