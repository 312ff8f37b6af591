"""What the runs of the chaos test do; workers import it.

Each execution appends a line to a file when it starts and when it ends, so that the checker knows of every
execution, also of those that nobody heard of. All times are CLOCK_MONOTONIC, which processes of one host share.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wove import current

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names the file; workers are started with it.
LOG_VARIABLE = "CHAOS_EXECUTIONS"


class ChaosError(Exception):
    """What a task raises that is meant to fail; needs both arguments to be built."""

    def __init__(self, key: int, number: int) -> None:
        super().__init__(key, number)
        self.key = key
        self.number = number


def answer(key: int, number: int) -> tuple[int, int]:
    """Return what each task computes, wherever it runs."""
    return key, number * 31 + key % 997


def mirrored(blob: bytes) -> bytes:
    """Return what :func:`mirror` makes of its argument."""
    return blob[::-1]


def noop(key: int, number: int) -> tuple[int, int]:
    """Take no time."""
    with _noted(key):
        return answer(key, number)


def mirror(key: int, blob: bytes) -> bytes:
    """Take and return a large value."""
    with _noted(key):
        return mirrored(blob)


def fail(key: int, number: int) -> NoReturn:
    """Raise an exception of the task's own."""
    with _noted(key):
        raise ChaosError(key, number)


def sleep(key: int, number: int, seconds: float) -> tuple[int, int]:
    """Take a while, blind to cancellation."""
    with _noted(key):
        time.sleep(seconds)
        return answer(key, number)


async def sleep_async(key: int, number: int, seconds: float) -> tuple[int, int]:
    """Take a while on an event loop; a cancellation ends it."""
    with _noted(key):
        await asyncio.sleep(seconds)
        return answer(key, number)


def work(key: int, number: int, seconds: float) -> tuple[int, int]:
    """Keep a processor busy."""
    with _noted(key):
        busy(seconds)
        return answer(key, number)


def busy(seconds: float) -> None:
    """Keep this thread busy."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(2_000))


def be_killed(started: str, seconds: float, *, cpu: bool) -> str:
    """Write this process's id into the file ``started``, then take so long; it is killed meanwhile."""
    path = Path(started)
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(path)
    (busy if cpu else time.sleep)(seconds)
    return "survived"


@contextmanager
def _noted(key: int) -> Iterator[None]:
    run = current()
    words = f"{key} {run.run_id} {run.attempt} {{}} {os.getpid()} {os.getppid()} {{:.6f}}\n"
    file = os.open(os.environ[LOG_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        # One write of less than a page: lines of many processes do not mix.
        os.write(file, words.format("start", time.monotonic()).encode())
        phase = "raised"
        try:
            yield
            phase = "end"
        finally:
            os.write(file, words.format(phase, time.monotonic()).encode())
    finally:
        os.close(file)
