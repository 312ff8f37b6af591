"""Which functions end within a moment, as far as this process has executed them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds that a short one takes at most: longer ones are reported as started anyway.
SHORT = 0.01
#: How many are remembered; names may be made up for each call.
MAX_NAMES = 1_000

_short: dict[str, bool] = {}


def is_short(function: str) -> bool:
    """Tell whether a function has ended within a moment the last time."""
    return _short.get(function, False)


@contextmanager
def measured(function: str) -> Iterator[None]:
    """Note how long the block takes, which executes a function."""
    begun = time.monotonic()
    try:
        yield
    finally:
        if len(_short) >= MAX_NAMES:
            _short.clear()
        _short[function] = time.monotonic() - begun < SHORT
