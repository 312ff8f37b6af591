"""Puts a process's wall clock wrong by the seconds in the file WOVE_TESTS_CLOCK; they may change while it runs.

In the Python it is started with, and all that it forks. Put this folder on PYTHONPATH. Monotonic clocks stay as they are.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

_real = datetime.datetime
_time = time.time


def _shifted() -> float:
    with open(os.environ["WOVE_TESTS_CLOCK"]) as file:
        return _time() + float(file.read() or 0)


class _Kind(type):
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, _real)


class _Shifted(_real, metaclass=_Kind):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.fromtimestamp(_shifted(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.fromtimestamp(_shifted(), datetime.UTC).replace(tzinfo=None)

    @classmethod
    def today(cls) -> Any:
        return cls.fromtimestamp(_shifted())


# Under the names of what it replaces, so that it pickles as that.
_Shifted.__name__ = _Shifted.__qualname__ = "datetime"
_Shifted.__module__ = "datetime"

time.time = _shifted
time.time_ns = lambda: int(_shifted() * 1e9)
datetime.datetime = _Shifted
