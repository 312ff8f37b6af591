"""Endings that no protocol foresees: what tasks return and raise that is hard to carry home."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, NoReturn


class TextFails(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class ReduceFails(Exception):
    """Cannot be pickled, and says so late."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("no pickle")


class Holds(Exception):
    """Holds what no pickle carries."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class SlowToReduce:
    """Takes longer to encode than the task took."""

    def __reduce__(self) -> tuple[Any, ...]:
        time.sleep(1.0)
        return (str, ("encoded",))


def deep() -> list[Any]:
    """A list in a list, a hundred thousand times."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def recurse() -> int:
    """Call oneself for ever."""
    return 1 + recurse()


async def cancel_itself() -> NoReturn:
    """A cancellation that nobody asked for."""
    raise asyncio.CancelledError


def endless() -> Any:
    """A generator."""
    yield 1


def missing_here() -> NoReturn:
    """Raise an exception whose class exists in the worker alone."""
    kind = type("OnlyThere", (Exception,), {"__module__": "only_there"})
    raise kind("from afar")


def chained() -> NoReturn:
    """Raise an exception with a cause, notes, and a group in it."""
    inner = ExceptionGroup("several", [ValueError("one"), TypeError("two")])
    inner.add_note("a note")
    raise LookupError("outer") from inner


def raised(kind: str) -> NoReturn:
    """Raise one of the exceptions here, or a builtin one."""
    mine = globals().get(kind)
    raise mine() if mine is not None else getattr(__import__("builtins"), kind)("on purpose")


RESULTS: dict[str, Any] = {
    "generator": endless,
    "lock": threading.Lock,
    "deep": deep,
}


def returned(kind: str) -> Any:
    """Return one of the results here."""
    return RESULTS[kind]()


def slow_to_reduce() -> SlowToReduce:
    """Return what takes a while to encode."""
    return SlowToReduce()


def out_of_memory() -> NoReturn:
    """Ask for more than there is."""
    bytearray(1 << 62)
    raise AssertionError("there was enough")


def interrupted() -> NoReturn:
    """As by Ctrl-C."""
    raise KeyboardInterrupt


def closed() -> NoReturn:
    """As by a generator's close()."""
    raise GeneratorExit


def stopped() -> NoReturn:
    """What a generator must not raise."""
    raise StopIteration(5)
