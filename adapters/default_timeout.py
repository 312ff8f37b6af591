"""Keeps kombu from leaving the process with another default timeout for its sockets.

``kombu.Connection.collect`` sets the process's default while it drops a broken connection, and sets back what it
found. Two threads at it, as when a broker is away, find what the other one has set: then every socket that the
application opens from there on has a timeout that nobody asked for.
"""

from __future__ import annotations

import socket
import threading
from functools import wraps
from typing import Any

_MARK = "kept_by_wove"
_lock = threading.Lock()
_inside = 0
_before: float | None = None


def keep_default_timeout() -> None:
    """Have the last thread that drops a connection set back what the first one has found. Idempotent."""
    from kombu.connection import Connection

    collect: Any = Connection.collect
    if getattr(collect, _MARK, False):
        return

    @wraps(collect)
    def collect_and_set_back(self: Any, *args: Any, **options: Any) -> Any:
        global _inside, _before
        with _lock:
            if not _inside:
                _before = socket.getdefaulttimeout()
            _inside += 1
        try:
            return collect(self, *args, **options)
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    socket.setdefaulttimeout(_before)

    setattr(collect_and_set_back, _MARK, True)
    setattr(Connection, collect.__name__, collect_and_set_back)
