"""What this process has refused, counted by reason: for metrics and alarms."""

from __future__ import annotations

import os
import threading

_lock = threading.Lock()
_counts: dict[str, int] = {}


def count_refusal(reason: str) -> None:
    """Count one refusal; ``reason`` is ``side:what``, of the few that docs/security.md lists."""
    with _lock:
        _counts[reason] = _counts.get(reason, 0) + 1


def refusals() -> dict[str, int]:
    """Return how often this process has refused what, since it started; a copy.

    Keys are ``payload:...`` for what its worker side did not take from a broker, ``command:401`` for what a worker
    service did not take from the network, and ``callback:STATUS`` for what its callback listeners answered with an error.
    What never happened is not in it. Safe to call from any thread.
    """
    with _lock:
        return dict(_counts)


def _forget() -> None:
    # What a forked child refuses is counted by the child, and the parent's by the parent.
    global _lock
    _lock = threading.Lock()
    _counts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
