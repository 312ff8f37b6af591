"""Finds processes that the tests started and did not end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_VARIABLE = "WOVE_TEST_RUN"
_GRACE_SECONDS = 5.0

# Python's own helpers of multiprocessing, which end with the process they belong to.
_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


def mark_descendants() -> dict[str, str]:
    """Return an environment variable by which everything started from now on is recognised."""
    return {_VARIABLE: secrets.token_hex(8)}


def wait_until(condition: Callable[[], bool]) -> bool:
    """Return whether the condition comes true within a short grace."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def wait_until_none_left() -> list[str]:
    """Return the command lines of marked processes that outlive a short grace, after killing them.

    Told by their environment, which a process that changed its session or lost its parent still has. Where
    there is no /proc nothing can be told and nothing is returned.
    """
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := _marked()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid}: {command}" for pid, command in left.items()]


def _marked() -> dict[int, str]:
    mark = f"{_VARIABLE}={os.environ[_VARIABLE]}".encode()
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        command = _read(name, "cmdline")  # empty for a zombie, which runs no more
        if (
            command
            and mark in _read(name, "environ").split(b"\0")
            and not any(h in command for h in _HELPERS)
        ):
            found[int(name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def _read(pid: str, file: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{file}", "rb") as stream:
            return stream.read()
    except OSError:  # gone meanwhile, or somebody else's
        return b""
