"""Functions that run on the fleets under test; workers import them from here."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wove import current

#: A task that waits for a file gives up after this many seconds, so that no worker is blocked for ever.
PATIENCE = 30.0


def double(number: int) -> int:
    """A plain function."""
    return number * 2


async def double_async(number: int) -> int:
    """A coroutine function."""
    await asyncio.sleep(0.01)
    return number * 2


def echo(value: Any) -> Any:
    """Return what came in."""
    return value


def join(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all arguments."""
    return args, kwargs


class Multiplier:
    """Has a method and is callable."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def times(self, number: int) -> int:
        """A bound method."""
        return self.factor * number

    def __call__(self, number: int) -> int:
        """An instance that is called."""
        return self.factor * number


class Holder:
    """Holds a lot."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def byte_at(self, place: int) -> int:
        """A bound method."""
        return self.data[place]


def look_up(model: Any, row: int) -> tuple[int, int]:
    """Return an element of an array, and this process."""
    return int(model[row]), os.getpid()


def count_in(counts: Any, row: int) -> int:
    """Change an array, and say what it has now."""
    counts[0] += 1
    return int(counts[0])


@dataclass
class Point:
    """A result of a user's own type."""

    x: int
    y: int


def make_point(x: int, y: int) -> Point:
    """Return a dataclass."""
    return Point(x, y)


def long_text(size: int) -> str:
    """Return a large result."""
    return "wove" * (size // 4)


class TwoArguments(Exception):
    """Cannot be unpickled the usual way: its constructor wants more than ``args`` holds."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


def fail_builtin() -> NoReturn:
    """Raise a builtin exception."""
    raise ValueError("a builtin problem")


def fail_custom() -> NoReturn:
    """Raise an exception with two required arguments."""
    raise TwoArguments(7, "seven")


def fail_chained() -> NoReturn:
    """Raise an exception from another."""
    try:
        {}["missing"]
    except KeyError as exc:
        raise LookupError("outer") from exc


def fail_unpicklable() -> NoReturn:
    """Raise an exception that no pickle can carry."""
    raise RuntimeError("holds a lock", threading.Lock())


def fail_system_exit() -> NoReturn:
    """End like a script."""
    raise SystemExit(4)


def die() -> NoReturn:
    """End the process without a word."""
    os._exit(3)


def return_lock() -> Any:
    """Return what cannot be sent."""
    return threading.Lock()


def report_progress() -> str:
    """Report progress and log."""
    run = current()
    run.progress(0.25, "a quarter")
    run.log("half way")
    run.progress(1.0, "done")
    return run.run_id


def touch_and_wait(started: str, release: str) -> str:
    """Create the file ``started``, then wait for the file ``release``; blind to cancellation."""
    Path(started).touch()
    wait_for_file(release)
    return "released"


def count_and_wait(counter: str, release: str, value: Any = None) -> tuple[Any, int]:
    """Note this execution in the file ``counter``, wait for the file ``release``, return ``value`` and the pid."""
    count(counter)
    wait_for_file(release)
    return value, os.getpid()


def count_and_fail(counter: str, release: str) -> NoReturn:
    """As :func:`count_and_wait`, then raise an exception."""
    count(counter)
    wait_for_file(release)
    raise TwoArguments(7, "seven")


def count_until_cancelled(counter: str, seen: str) -> None:
    """Note this execution, run until the caller gives up, then create the file ``seen``."""
    count(counter)
    until_cancelled(counter, seen)


def count_and_retry(counter: str, release: str) -> Any:
    """As :func:`count_and_wait`, but ask RQ the first time to run it again."""
    from rq import Retry

    count(counter)
    wait_for_file(release)
    return Retry(max=1) if len(executions(counter)) == 1 else "at last"


def count(counter: str) -> None:
    """Add this process's id to a file."""
    with open(counter, "a") as file:
        file.write(f"{os.getpid()}\n")


def executions(counter: str | os.PathLike[str]) -> list[int]:
    """Return which processes have noted themselves in a file."""
    path = Path(counter)
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def touch(path: str) -> None:
    """Create a file."""
    Path(path).touch()


def wait_for_file(path: str) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + PATIENCE
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def until_cancelled(started: str, seen: str) -> None:
    """Run until the caller gives up, then create the file ``seen``."""
    Path(started).touch()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if current().cancelled:
            Path(seen).touch()
            return
        time.sleep(0.01)


async def until_cancelled_async(started: str, seen: str) -> None:
    """As :func:`until_cancelled`, as a coroutine."""
    Path(started).touch()
    try:
        await asyncio.sleep(PATIENCE)
    except asyncio.CancelledError:
        Path(seen).touch()
        raise


def pid_and_sleep(seconds: float) -> int:
    """Return this process's id after a while."""
    time.sleep(seconds)
    return os.getpid()


async def sleep_async(seconds: float) -> float:
    """Wait without a thread."""
    await asyncio.sleep(seconds)
    return seconds


async def touch_and_wait_async(started: str, release: str) -> str:
    """As :func:`touch_and_wait`, as a coroutine."""
    Path(started).touch()
    deadline = time.monotonic() + PATIENCE
    while not Path(release).exists() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return "released"


async def block_the_loop(started: str, release: str) -> str:
    """A coroutine that never gives its event loop back."""
    return touch_and_wait(started, release)


def large(size: int) -> bytes:
    """Return so many bytes."""
    return bytes(size)


def say_everything() -> str:
    """Write by every way there is, and read what nobody will type."""
    print("from print")
    print("to stderr", file=sys.stderr)
    os.write(1, b"from write(2)\n")
    os.system("echo from a child process")
    ctypes.CDLL(None).puts(b"from C")
    try:
        input("name? ")
    except EOFError:
        return "nobody there"
    return "somebody there"


def flood(size: int) -> int:
    """Write so many bytes to both, as lines and without an end."""
    line = b"x" * 99 + b"\n"
    for _ in range(size // 100):
        os.write(2, line)
    for _ in range(size // 10_000):
        os.write(1, b"y" * 10_000)
    return size


def kill_own_process(signal_number: int) -> None:
    """Die as the kernel's out-of-memory killer has it."""
    os.kill(os.getpid(), signal_number)
    time.sleep(PATIENCE)


def leave_a_mark(path: str, seconds: float) -> str:
    """Add to a file, so that it can be told how often this was executed."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("x")
    time.sleep(seconds)
    return "marked"


def disobey(number: int) -> Point:
    """Make this worker send a pickle, whatever it was asked for."""
    from wove.worker import courier

    for beating in courier._couriers.values():
        for session in beating._sessions.values():
            session.assignment.plain = False
    return Point(number, number)
