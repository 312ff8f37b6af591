"""Waits are on conditions."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wove.handle import EnvironmentHandle

#: Seconds until a condition that does not come true fails the test.
PATIENCE = 20.0


async def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until ``condition()`` is true and return its value."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain until {what}"
        await asyncio.sleep(0.01)
    return value


async def until_exists(path: Path) -> None:
    """Wait for a file."""
    await until(path.exists, f"{path.name} exists")


async def until_states(handle: EnvironmentHandle, *states: str) -> None:
    """Wait until the environment's open runs are in exactly these states."""
    await until(lambda: sorted(run_states(handle)) == sorted(states), f"the runs are {states}")


def run_states(handle: EnvironmentHandle) -> list[str]:
    """Return the states of the environment's open runs."""
    return [str(run.state) for run in handle._dispatcher.table.open_runs()]
