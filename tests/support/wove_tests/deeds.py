"""What the runs of the fault tests do: each execution is noted in a file, also one that nobody hears of."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from wove import current
from wove_tests.tasks import wait_for_file


class Line(NamedTuple):
    """One note; times are CLOCK_MONOTONIC, which the processes of one host share."""

    word: str
    run_id: str
    attempt: int
    pid: int
    at: float


def note(log: str, word: str) -> None:
    """Append a note, in one write: lines of many processes do not mix."""
    run = current()
    line = f"{word} {run.run_id or '-'} {run.attempt} {os.getpid()} {time.monotonic():.6f}\n"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def notes(log: str | Path, word: str = "start") -> list[Line]:
    """Return the notes with that word, in the order they were made."""
    try:
        text = Path(log).read_text("ascii")
    except FileNotFoundError:
        return []
    words = [line.split() for line in text.splitlines()]
    return [Line(w[0], w[1], int(w[2]), int(w[3]), float(w[4])) for w in words if w[0] == word]


def begin(log: str) -> int:
    """Note the start of an execution and return its number, from 1: executions of one call come one by one."""
    note(log, "start")
    return len(notes(log))


# --- what ends well ----------------------------------------------------------------


def hold(log: str, release: str) -> str:
    """Go on until the file ``release`` is there; blind to cancellation."""
    note(log, "start")
    wait_for_file(release)
    note(log, "end")
    return "done"


def hold_number(log: str, release: str, number: int) -> int:
    """As :func:`hold`, and return the number."""
    hold(log, release)
    return number


async def hold_async(log: str, release: str) -> str:
    """As :func:`hold`, as a coroutine; a cancellation ends it."""
    note(log, "start")
    try:
        while not os.path.exists(release):
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        note(log, "cancelled")
        raise
    note(log, "end")
    return "done"


def mark(log: str, value: Any = None) -> Any:
    """Return the value at once."""
    note(log, "start")
    return value


def take(log: str, seconds: float, value: Any = None) -> Any:
    """Return the value after a while."""
    note(log, "start")
    time.sleep(seconds)
    note(log, "end")
    return value


def keep_busy(seconds: float) -> str:
    """Compute, in Python, without a pause."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(5_000))
    return "computed"


async def block_the_loop(seconds: float) -> str:
    """A coroutine that never lets its loop go."""
    time.sleep(seconds)
    return "blocked"


def sleep(seconds: float) -> str:
    """Do nothing for a while."""
    time.sleep(seconds)
    return "slept"


# --- what ends badly ---------------------------------------------------------------


def die(log: str, how: str) -> NoReturn:
    """End this process without a word, once it was reported that the task has started."""
    note(log, "start")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))
    os._exit(4)


class DeathWhenPickled:
    """A result whose process dies while it is encoded: after the task, before its outcome is sent."""

    def __reduce__(self) -> tuple[Any, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        return (str, ())


def return_death(log: str) -> DeathWhenPickled:
    """End well, and die before anybody hears of it."""
    note(log, "start")
    return DeathWhenPickled()


def die_until(log: str, attempt: int) -> int:
    """Die in every attempt before that one."""
    note(log, "start")
    if current().attempt < attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    return current().attempt


def fail(log: str) -> NoReturn:
    """Raise an exception of the task's own."""
    note(log, "start")
    raise LookupError("the task's own")


def leave_a_child(log: str, release: str) -> NoReturn:
    """Fork a child that inherits every connection and outlives this process, then die."""
    note(log, "start")
    time.sleep(1.5)  # the open beat stands by then
    if os.fork() == 0:
        note(log, "child")
        wait_for_file(release)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


# --- what its backend runs again ---------------------------------------------------


def fail_until(log: str, execution: int) -> int:
    """Raise in every execution before that one."""
    number = begin(log)
    if number < execution:
        raise ConnectionError(f"execution {number}")
    return number


def retry_until(log: str, execution: int) -> int:
    """Ask Celery for another execution until then."""
    from celery import current_task

    number = begin(log)
    if number < execution:
        raise current_task.retry(countdown=0, exc=ConnectionError(f"execution {number}"), max_retries=5)
    return number


def reject_until(log: str, execution: int, requeue: bool = True) -> int:
    """Give the message back to the broker until then."""
    from celery.exceptions import Reject

    number = begin(log)
    if number < execution:
        raise Reject(f"execution {number}", requeue=requeue)
    return number


def ignore(log: str) -> NoReturn:
    """Tell Celery to keep no record."""
    from celery.exceptions import Ignore

    note(log, "start")
    raise Ignore("nothing to say")


def return_retry_until(log: str, execution: int, most: int = 5) -> Any:
    """Ask RQ for another execution until then."""
    from rq import Retry

    number = begin(log)
    return Retry(max=most, interval=0) if number < execution else number


# --- what happens after the outcome was delivered ----------------------------------


def kill_the_worker(log: str) -> None:
    """Kill the whole Celery worker, as the first thing that is done."""
    from billiard import current_process

    note(log, "start")
    # The kernel ends pool processes with their parent.
    os.kill(os.getpid() if current_process().name == "MainProcess" else os.getppid(), signal.SIGKILL)
    time.sleep(60)


def die_after_delivery(log: str) -> int:
    """Return; the process dies once the outcome was delivered, before Celery can acknowledge the message."""
    from celery.signals import task_postrun

    number = begin(log)
    task_postrun.connect(_die, weak=False)
    return number


def _die(**_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(job: Any, connection: Any, result: Any) -> None:
    """RQ's ``on_success`` of a job: its outcome was delivered, and RQ does not know yet."""
    if connection.set(f"died:{job.id}", "1", nx=True, ex=60):
        os.kill(os.getpid(), signal.SIGKILL)


# --- attempts ----------------------------------------------------------------------


def hold_attempt(log: str, folder: str) -> str:
    """Go on until this attempt is released, and end as it is told then; blind to cancellation."""
    note(log, "start")
    attempt = current().attempt
    path = Path(folder, f"attempt{attempt}")
    wait_for_file(str(path))
    note(log, "end")
    if path.read_text() == "error":
        raise LookupError(f"attempt {attempt}")
    return f"attempt {attempt}"


def release_attempt(folder: Path, attempt: int, how: str = "") -> None:
    """Let an attempt end, once: with a result, or with an ``error``."""
    path = folder / f"attempt{attempt}"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(how)
        part.rename(path)


def retry_in(log: str, seconds: float) -> NoReturn:
    """Ask Celery for another execution, later."""
    from celery import current_task

    note(log, "start")
    raise current_task.retry(countdown=seconds, max_retries=5)


def number_or_fail(log: str, number: int) -> int:
    """Note the execution; multiples of three fail."""
    note(log, f"start-{number}")
    if number % 3 == 0:
        raise ValueError(f"{number} is a multiple of three")
    return number


def number_or_die(log: str, number: int) -> int:
    """Note the execution; seven kills its process, the first time."""
    begin(f"{log}-{number}")
    if number == 7 and len(notes(f"{log}-{number}")) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def first_holds(log: str, release: str, number: int) -> int:
    """Note the execution; number zero waits until it is released."""
    note(log, f"start-{number}")
    return hold_number(log, release, number) if number == 0 else number


def strange(number: int) -> Any:
    """Return, or raise, something that does not travel like the others."""
    if number == 0:
        return bytes(300_000)
    if number == 1:
        return threading.Lock()
    if number == 2:
        raise SystemExit(3)
    if number == 3:
        raise ValueError("x" * 100_000)
    if number == 4:
        return {1, (2, 3)}
    return current().run_id


async def number_async(number: int) -> int:
    """Report progress, and return the number."""
    current().progress(number / 100, "here")
    await asyncio.sleep(0)
    return number


def until_told(log: str, number: int) -> str:
    """Wait to be cancelled; others return at once."""
    note(log, f"start-{number}")
    if number:
        return "not me"
    while not current().cancelled:
        time.sleep(0.01)
    note(log, "told")
    return "told"
